"""Files of results that were damaged, forged or written by another program: named, never a traceback or a number."""

import hashlib
import json
import math
import shutil
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dart_eval.results import frame, show, tables
from dart_eval.results.board import boards
from dart_eval.results.check import Thresholds, check, load_baseline, write_baseline
from dart_eval.results.frame import cells
from dart_eval.results.store import Journal, Store
from dart_eval.util.errors import UserError
from tests.helpers.commands import command
from tests.helpers.records import FLOPS, answered, right, save, sealed

DEEP = "[" * 100_000 + "]" * 100_000
NO_RECORDS = [DEEP, '{"a":' * 5000 + "1" + "}" * 5000, "{", "[]", "null", '"x"', "\xff", ""]
NESTED = json.loads('{"a":' * 400 + "1" + "}" * 400)

# What may be wrong with a record whose digest fits: path and value; None takes the entry out.
FORGED = [
    (("inputs",), 3), (("inputs", "model"), None), (("inputs", "model"), "tiny"), (("inputs", "model", "weights"), 7),
    (("inputs", "sparsity"), "0.5"), (("inputs", "sparsity"), math.nan), (("inputs", "params"), []),
    (("by_task",), {"arc": {"documents": math.nan, "cut": 1}}), (("by_task",), {"arc": 1}),
    (("inputs", "method"), ["dart"]), (("inputs", "task"), None), (("inputs", "seed"), {"a": 1}),
    (("inputs", "versions"), {"torch": {"a": 1}}), (("metrics",), {"acc": 1}), (("metrics", 0, "value"), "high"),
    (("metrics", 0, "task"), 7), (("metrics", 0, "n"), 1.5), (("metrics", 0, "n"), None),
    (("flops",), {"prefill": "many"}), (("measured",), {}), (("settings",), []), (("tokens",), "many"),
    (("files", "samples", "name"), "../../etc/passwd"), (("files", "samples", "name"), ".."),
    (("inputs", "task"), "\ud800"), (("settings", "more"), NESTED),
]  # fmt: skip


def _put(data, where, value):
    for step in where[:-1]:
        data = data[step]
    if value is None:
        del data[where[-1]]
    else:
        data[where[-1]] = value


def _forge(path, where, value):
    """Change a record in its file; its digest fits again."""
    data = json.loads(path.read_text())
    _put(data, where, value)
    path.write_text(json.dumps(sealed(data)))


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """Runs a command; its status, output and messages."""
    monkeypatch.chdir(tmp_path)
    return command


def _records():
    made = [answered("arc", right(0.8, seed=i), method, sparsity) for i, (method, sparsity) in enumerate(
        [("dense", 0.0), ("griffin", 0.5), ("dart", 0.5)])]  # fmt: skip
    for r in made:
        r.flops.update(FLOPS)
    return made


def _saved(folder):
    """A folder of three cells, each in a file of its own name."""
    for r in _records():
        Store(folder).save(f"arc-{r.inputs['method']}-0.5", r)
    return folder


@pytest.fixture
def results(tmp_path):
    return _saved(tmp_path / "out")


def _file(results, method):
    return next((results / "cells").glob(f"arc-{method}-*.json"))


VERBS = [("tables", "out"), ("compare", "out", "out"), ("compare", "out", "--row", "dense,griffin"), ("report", "out")]


@pytest.mark.parametrize("verb", VERBS)
def test_every_kind_of_bad_record_is_named_and_left_out(results, shown, verb):
    whole, bad = _file(results, "dart"), []
    for i, forged in enumerate(FORGED):
        bad.append(shutil.copy(whole, whole.with_name(f"forged-{i}.json")))
        _forge(bad[-1], *forged)
    for i, text in enumerate(NO_RECORDS):
        bad.append(whole.with_name(f"no-record-{i}.json"))
        bad[-1].write_text(text, encoding="latin-1")
    whole.unlink()
    status, out, errors = shown(*verb)
    assert status == 0 and "dart" not in out.replace("dart-eval", "")
    lines = sorted({*errors.splitlines()})
    assert len(lines) == len(bad)
    assert all(str(file.relative_to(results.parent)) in line for line, file in zip(lines, sorted(bad), strict=True))
    for method in ("dense", "griffin"):  # where every record is bad nothing is shown
        _file(results, method).unlink()
    status, out, errors = shown(*verb)
    assert (status, out, errors.count("\n")) == (2, "", 1) and sorted(bad)[0].name in errors


def _places(data, above=()):
    """The paths to all entries of a record."""
    entries = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path for key, value in entries for path in ((*above, key), *_places(value, (*above, key)))]


PLACES = [path for path in _places(json.loads(json.dumps(_records()[2].to_json()))) if path != ("digest",)]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
ANYTHING = st.recursive(
    SCALARS, lambda x: st.lists(x, max_size=2) | st.dictionaries(st.text(max_size=5), x, max_size=2)
)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A store, the file of one of its records, and the text of it."""
    folder = _saved(tmp_path_factory.mktemp("three"))
    return Store(folder), _file(folder, "dart"), _file(folder, "dart").read_text()


@given(where=st.sampled_from(PLACES), value=ANYTHING)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_record_with_any_entry_changed_is_understood_or_refused_by_name(three, capsys, where, value):
    store, file, whole = three
    file.write_text(whole)
    _forge(file, where, value)
    records = store.load()
    assert len(records) == 3 or file.name in capsys.readouterr().err
    show.render(tables.board_tables(boards(store, records)), "md")
    frame.lines(store, records)


@pytest.mark.parametrize("verb", VERBS)
def test_a_record_may_lack_costs_and_groups_that_are_their_own_members_go_round_once(results, shown, verb):
    for part, value in (("flops", {}), ("memory", {}), ("measured", {"seconds": 1, "created": "2026"})):
        _forge(_file(results, "dart"), (part,), value)
    status, out, errors = shown(*verb)
    assert (status, errors) == (0, "") and ("dart" in out) == ("report" not in verb and "--row" not in verb)
    acc = {"metric": "acc", "value": 1.0, "stderr": 0.1, "n": 60, "higher_is_better": True}
    groups = (("arc", None), ("a", "arc"), ("b", "a"), ("a", "b"))
    _forge(_file(results, "dart"), ("metrics",), [{**acc, "task": task, "part_of": group} for task, group in groups])
    status, _, errors = shown(*verb)
    assert (status, errors) == (0, "")


@pytest.mark.parametrize("text", [DEEP, "[]", "[1, 2, 3]", '[{}, "x", 1]', "{}", "[{}, 1, null]", '{"a": "'])
def test_a_forged_journal_counts_up_to_what_is_forged(tmp_path, text):
    path = tmp_path / "cell.jsonl"
    journal = Journal(path)
    journal.add({"a": [1]}, 10, 0.5)
    whole = path.read_bytes()
    path.write_bytes(whole + b"%08x %s\n" % (zlib.crc32(text.encode()), text.encode()))
    again = Journal(path)
    assert (again, again.state_bytes, again.seconds) == ({"a": [1]}, 10, 0.5)
    assert path.read_bytes() == whole


def test_no_check_passes_and_no_baseline_shrinks_by_a_record_that_cannot_be_read(results, shown, tmp_path):
    for name in ("b.json", "untouched.json"):
        assert shown("check", "out", "--baseline", name, "--update")[0] == 0
    assert shown("check", "out", "--baseline", "b.json")[0] == 0
    save(tmp_path / "good", *_records())
    before = (tmp_path / "b.json").read_bytes()
    _forge(_file(results, "dart"), ("tokens",), "many")  # it may be a later run of a cell that can be read
    for words in (("out", "--baseline", "b.json"), ("good", "--baseline", "out"),
                  ("out", "--baseline", "b.json", "--update")):  # fmt: skip
        status, out, errors = shown("check", *words)
        assert (status, out) == (2, "") and _file(results, "dart").name in errors
    assert (tmp_path / "b.json").read_bytes() == before


LINES = [
    lambda line: [line], lambda line: {k: v for k, v in line.items() if k != "task"},
    lambda line: {**line, "doc_id": "first"}, lambda line: {**line, "metrics": [1]},
    lambda line: {**line, "responses": "yes"}, lambda line: {**line, "doc_hash": 5},
    lambda line: {**line, "drift": {"signal": ["low"], "window": 10}}, lambda line: {**line, "responses": [NESTED]},
]  # fmt: skip


def test_forged_samples_are_named_and_the_others_compared(tmp_path, shown):
    """Each kind at a sparsity of its own."""
    dense, griffin, _ = _records()
    pruned = [answered("arc", right(0.7), "dart", (i + 1) / 10) for i in range(len(LINES))]
    save(tmp_path / "good", dense, griffin, *pruned)
    save(tmp_path / "out", dense, griffin, *pruned)
    for record in Store(tmp_path / "out").load():
        if record.inputs["method"] == "dart":
            samples = tmp_path / "out" / "samples" / record.files["samples"]["name"]
            lines = samples.read_text().splitlines()
            lines[3] = json.dumps(LINES[round(10 * record.inputs["sparsity"]) - 1](json.loads(lines[3])))
            samples.write_text("\n".join(lines) + "\n")
            (file,) = (f for f in (tmp_path / "out" / "cells").iterdir() if record.key in f.read_text())
            _forge(file, ("files", "samples", "sha256"), hashlib.sha256(samples.read_bytes()).hexdigest())
    places = [f"dart at {100 - 10 * (i + 1)} % in out" for i in range(len(LINES))]
    status, out, errors = shown("compare", "out", "out")
    assert status == 0 and "griffin at 50 %" in out and "dart" not in out
    assert all(place in errors for place in places)
    assert shown("compare", "out", "--row", "griffin,dart")[0] == 2
    assert shown("tables", "out")[0] == shown("report", "out")[0] == 0
    shown("check", "good", "--baseline", "b.json", "--update")
    status, out, errors = shown("check", "out", "--baseline", "b.json")
    assert status == 1 and all(place in out for place in places)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    """Cells, and the text of their baseline."""
    folder = tmp_path_factory.mktemp("baseline")
    now = cells(_saved(folder / "out"))
    write_baseline(folder / "b.json", now)
    return now, (folder / "b.json").read_text()


CELL, DOCUMENT = ("cells", 0), ("cells", 0, "documents", 0)


@pytest.mark.parametrize(("where", "value"), [
    ((), DEEP), ((), ""), ((), "[]"), ((), "{}"), ((), '{"schema": 1, "cells": []}'), (("schema",), 2),
    (("cells",), {"a": 1}), (CELL, [1]), (CELL, 3), ((*CELL, "inputs", "model"), None),
    ((*CELL, "inputs", "model"), ["tiny"]), ((*CELL, "inputs", "sparsity"), "0.5"), ((*CELL, "measures", 0, 1), 3),
    ((*CELL, "measures", 0, 2), "up"), ((*CELL, "measures", 0, 3), "arc"), ((*DOCUMENT, 6), None),
    ((*DOCUMENT, 6), [1]), ((*DOCUMENT, 3), 5), ((*CELL, "inputs", "params"), NESTED),
    ((*DOCUMENT, 6, "acc"), "good"), ((*DOCUMENT, 6, "acc"), [1]), ((*CELL, "measures", 0, 1), "accc"),
    ((*CELL, "documents"), "pairs"),
])  # fmt: skip
def test_a_forged_baseline_is_refused_by_name(baseline, tmp_path, where, value):
    """Also one whose values cannot be held against those of the results."""
    now, text = baseline
    data, file = json.loads(text), tmp_path / "b.json"
    if value == "pairs":
        value = [[*line[:6], {"acc": [1, 2]}] for line in data["cells"][0]["documents"]]
    if where:
        _put(data, where, value)
    file.write_text(json.dumps(data) if where else value)
    with pytest.raises(UserError, match=r"b\.json") as refused:
        check(now, load_baseline(file), Thresholds(), str(file))
    assert len(str(refused.value)) < 600


def test_a_record_that_stands_twice_counts_once(results, shown):
    copied = _file(results, "dart").with_name("copy.json")
    copied.write_bytes(_file(results, "dart").read_bytes())
    status, out, _ = shown("tables", "out", "--format", "json")
    assert (status, len(json.loads(out))) == (0, 3)
    assert shown("check", "out", "--baseline", "b.json", "--update")[0] == 0
    assert len(json.loads((results.parent / "b.json").read_text())["cells"]) == 3


def test_of_a_record_that_was_made_twice_the_later_one_counts(tmp_path):
    first, again = (answered("arc", right(s), created=c) for s, c in ((0.9, "2026-01-01"), (0.1, "2026-02-01")))
    again.__dict__["key"] = first.key
    Store(tmp_path).save("b", first)
    Store(tmp_path / "other").save("a", again)
    for copied in (tmp_path / "other").rglob("*.json*"):  # folders of two machines are put together
        copied.rename(tmp_path / copied.relative_to(tmp_path / "other"))
    (read,) = Store(tmp_path).load()
    assert read.created == "2026-02-01"
