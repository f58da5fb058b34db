"""Files of results that were damaged, forged or written by another program: one line, never a traceback or a number."""

import hashlib
import json
import math
import shutil
import zlib

import pytest

from dart_eval.results.check import thresholds_from
from dart_eval.results.store import Journal, Store
from dart_eval.util.errors import UserError
from tests.helpers.commands import command
from tests.helpers.records import FLOPS, answered, right, save, sealed

DEEP = "[" * 100_000 + "]" * 100_000


def _nested(levels):
    data = 1
    for _ in range(levels):
        data = {"a": data}
    return data


# What may be wrong with a record whose digest fits: path and value; None takes the entry out.
FORGED = {
    "no inputs": (("inputs",), 3),
    "no model": (("inputs", "model"), None),
    "a model that is a name": (("inputs", "model"), "tiny"),
    "a hash that is a number": (("inputs", "model", "weights"), 7),
    "a sparsity that is text": (("inputs", "sparsity"), "0.5"),
    "a sparsity that is no number": (("inputs", "sparsity"), math.nan),
    "a count that is no number": (("by_task",), {"arc": {"documents": math.nan, "cut": 1}}),
    "parameters that are a list": (("inputs", "params"), []),
    "a method that is a list": (("inputs", "method"), ["dart"]),
    "no task": (("inputs", "task"), None),
    "a seed that is a mapping": (("inputs", "seed"), {"a": 1}),
    "versions of versions": (("inputs", "versions"), {"torch": {"a": 1}}),
    "metrics by name": (("metrics",), {"acc": 1}),
    "a value that is text": (("metrics", 0, "value"), "high"),
    "a task that is a number": (("metrics", 0, "task"), 7),
    "half a document": (("metrics", 0, "n"), 1.5),
    "no n": (("metrics", 0, "n"), None),
    "costs of no task": (("by_task",), {"arc": 1}),
    "FLOPs in words": (("flops",), {"prefill": "many"}),
    "no moment": (("measured",), {}),
    "settings without names": (("settings",), []),
    "tokens in words": (("tokens",), "many"),
    "a file outside": (("files", "samples", "name"), "../../etc/passwd"),
    "a file above": (("files", "samples", "name"), ".."),
    "a lone surrogate": (("inputs", "task"), "\ud800"),
    "nesting": (("settings", "more"), _nested(400)),
}


def _forge(path, where, value):
    """Change a record in its file; its digest fits again."""
    data = json.loads(path.read_text())
    at = data
    for step in where[:-1]:
        at = at[step]
    if value is None:
        del at[where[-1]]
    else:
        at[where[-1]] = value
    path.write_text(json.dumps(sealed(data)))


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """Runs a command; its status, output and messages."""
    monkeypatch.chdir(tmp_path)
    return command


def _records(task="arc"):
    made = [answered(task, right(0.8, seed=i), method, sparsity) for i, (method, sparsity) in enumerate(
        [("dense", 0.0), ("griffin", 0.5), ("dart", 0.5)])]  # fmt: skip
    for r in made:
        r.flops.update(FLOPS)
    return made


@pytest.fixture
def results(tmp_path):
    """A folder of three cells, each in a file of its own name."""
    store = Store(tmp_path / "out")
    for r in _records():
        store.save(f"arc-{r.inputs['method']}-0.5", r)
    return tmp_path / "out"


def _file(results, method):
    return next((results / "cells").glob(f"arc-{method}-*.json"))


QUICK = {
    "tables": ("tables", "out"),
    "compare": ("compare", "out", "out"),
    "methods": ("compare", "out", "--row", "dense,griffin"),
}
VERBS = {**QUICK, "report": ("report", "out")}


@pytest.mark.parametrize("verb", QUICK)
@pytest.mark.parametrize("forged", FORGED)
def test_a_forged_record_is_named_and_left_out(results, shown, forged, verb):
    _forge(_file(results, "dart"), *FORGED[forged])
    status, out, errors = shown(*VERBS[verb])
    assert status == 0
    assert errors.startswith(f"note: left out: {_file(results, 'dart').relative_to(results.parent)} cannot be read (")
    assert "Traceback" not in errors
    if verb == "tables":
        assert "griffin" in out
        assert "dart" not in out.replace("dart-eval", "")


NO_RECORDS = [DEEP, '{"a":' * 5000 + "1" + "}" * 5000, "{", "[]", "null", '"x"', "\xff", ""]


@pytest.mark.parametrize("text", NO_RECORDS)
@pytest.mark.parametrize("verb", QUICK)
def test_a_file_that_is_no_record_is_named_and_left_out(results, shown, verb, text):
    _file(results, "dart").write_text(text, encoding="latin-1")
    status, _, errors = shown(*VERBS[verb])
    assert status == 0
    assert len(set(errors.splitlines())) == 1
    assert f"{_file(results, 'dart').relative_to(results.parent)} cannot be read (" in errors


def test_a_report_leaves_out_every_kind_of_bad_record(results, shown):
    """All of them beside good ones: a page takes its time."""
    whole, bad = _file(results, "dart"), []
    for i, forged in enumerate(FORGED.values()):
        bad.append(shutil.copy(whole, whole.with_name(f"forged-{i}.json")))
        _forge(bad[-1], *forged)
    for i, text in enumerate(NO_RECORDS):
        bad.append(whole.with_name(f"no-record-{i}.json"))
        bad[-1].write_text(text, encoding="latin-1")
    whole.unlink()
    status, out, errors = shown("report", "out")
    assert status == 0
    assert out.startswith("wrote ")
    lines = sorted(errors.splitlines())
    assert len(lines) == len(bad)
    for line, file in zip(lines, sorted(bad), strict=True):
        assert line.startswith(f"note: left out: {file.relative_to(results.parent)} cannot be read (")


@pytest.mark.parametrize("verb", VERBS)
def test_where_every_record_is_bad_nothing_is_shown(results, shown, verb):
    for i, file in enumerate(sorted((results / "cells").iterdir())):
        file.write_text(DEEP if i else "{")
    status, out, errors = shown(*VERBS[verb])
    assert (status, out) == (2, "")
    first = sorted((results / "cells").iterdir())[0].relative_to(results.parent)
    assert errors.startswith(f"error: {first} cannot be read (")
    assert "; repeat the `dart-eval run` that made it" in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize("verb", VERBS)
def test_a_record_that_lacks_costs_is_shown_without_them(results, shown, verb):
    for part, value in (("flops", {}), ("memory", {}), ("measured", {"seconds": 1, "created": "2026"})):
        _forge(_file(results, "dart"), (part,), value)
    status, out, errors = shown(*VERBS[verb])
    assert (status, errors) == (0, "")
    assert verb not in ("tables", "compare") or "dart" in out


def test_groups_that_are_their_own_members_go_round_only_once(results, shown):
    data = {"task": "arc", "metric": "acc", "value": 1.0, "stderr": 0.1, "n": 60, "higher_is_better": True}
    own = [{**data, "task": task, "part_of": group} for task, group in (("a", "arc"), ("b", "a"), ("a", "b"))]
    _forge(_file(results, "dart"), ("metrics",), [{**data, "part_of": None}, *own])
    for verb in VERBS.values():
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


def test_a_check_does_not_pass_over_a_record_that_it_cannot_read(results, shown):
    assert shown("check", "out", "--baseline", "b.json", "--update")[0] == 0
    assert shown("check", "out", "--baseline", "b.json")[0] == 0
    _forge(_file(results, "dart"), ("tokens",), "many")
    status, out, errors = shown("check", "out", "--baseline", "b.json")
    assert (status, out) == (2, "")  # it may be a later run of a cell that can be read
    assert "error: out/cells/arc-dart" in errors and "cannot be read" in errors


def test_a_baseline_does_not_shrink_by_a_record_that_cannot_be_read(results, shown, tmp_path):
    for r in _records():
        save(tmp_path / "good", r)
    _file(results, "dart").write_text("{")
    for args in (("good", "--baseline", "out"), ("out", "--baseline", "b.json", "--update")):
        status, _, errors = shown("check", *args)
        assert status == 2
        assert "arc-dart" in errors
    assert not (tmp_path / "b.json").exists()


# -- samples ---------------------------------------------------------------------------------------------------------

LINES = {
    "a list": lambda line: [line],
    "no task": lambda line: {k: v for k, v in line.items() if k != "task"},
    "a document that is a name": lambda line: {**line, "doc_id": "first"},
    "metrics in a list": lambda line: {**line, "metrics": [1]},
    "answers in words": lambda line: {**line, "responses": "yes"},
    "a hash that is a number": lambda line: {**line, "doc_hash": 5},
    "a signal in words": lambda line: {**line, "drift": {"signal": ["low"], "window": 10}},
    "nesting": lambda line: {**line, "responses": [_nested(400)]},
}


@pytest.mark.parametrize("line", LINES)
def test_forged_samples_are_named_and_the_others_compared(tmp_path, shown, line):
    save(tmp_path / "out", *_records())
    (record,) = (r for r in Store(tmp_path / "out").load() if r.inputs["method"] == "dart")
    samples = tmp_path / "out" / "samples" / record.files["samples"]["name"]
    lines = samples.read_text().splitlines()
    lines[3] = json.dumps(LINES[line](json.loads(lines[3])))
    samples.write_text("\n".join(lines) + "\n")
    digest = hashlib.sha256(samples.read_bytes()).hexdigest()
    (file,) = (f for f in (tmp_path / "out" / "cells").iterdir() if record.key in f.read_text())
    _forge(file, ("files", "samples", "sha256"), digest)
    status, out, errors = shown("compare", "out", "out")
    assert status == 0
    assert "griffin 50 %" in out
    assert "dart 50 %" not in out
    assert "left out: the samples of arc under dart at 50 % in out cannot be read (" in errors
    assert shown("compare", "out", "--row", "griffin,dart")[0] == 2
    assert shown("tables", "out")[0] == 0
    assert shown("report", "out")[0] == 0
    shown("check", "out", "--baseline", "b.json", "--update")
    for r in _records():
        save(tmp_path / "good", r)
    shown("check", "good", "--baseline", "b.json", "--update")
    status, out, _ = shown("check", "out", "--baseline", "b.json")
    assert status == 1
    assert "the samples of arc under dart at 50 % in out cannot be read" in out


# -- baselines and thresholds ----------------------------------------------------------------------------------------

CHANGES = {
    "cells by name": lambda d: d.update(cells={"a": 1}),
    "a cell that is a list": lambda d: d["cells"].append([1]),
    "no model": lambda d: d["cells"][0]["inputs"].pop("model"),
    "a model that is a list": lambda d: d["cells"][0]["inputs"].update(model=["tiny"]),
    "a sparsity that is text": lambda d: d["cells"][0]["inputs"].update(sparsity="0.5"),
    "a metric that is a number": lambda d: d["cells"][0]["measures"][0].__setitem__(1, 3),
    "a direction in words": lambda d: d["cells"][0]["measures"][0].__setitem__(2, "up"),
    "members in one word": lambda d: d["cells"][0]["measures"][0].__setitem__(3, "arc"),
    "a document too short": lambda d: d["cells"][0]["documents"][0].pop(),
    "values in a list": lambda d: d["cells"][0]["documents"][0].__setitem__(6, [1]),
    "a hash that is a number": lambda d: d["cells"][0]["documents"][0].__setitem__(3, 5),
    "nesting": lambda d: d["cells"][0]["inputs"].update(params=_nested(400)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_forged_baseline_is_refused_in_one_line(results, shown, tmp_path, change):
    shown("check", "out", "--baseline", "b.json", "--update")
    data = json.loads((tmp_path / "b.json").read_text())
    CHANGES[change](data)
    (tmp_path / "b.json").write_text(json.dumps(data))
    status, out, errors = shown("check", "out", "--baseline", "b.json")
    assert (status, out) == (2, "")
    assert errors.startswith("error: ")
    assert "b.json" in errors
    assert errors.count("\n") == 1


def test_a_baseline_nested_too_deeply_is_refused_in_one_line(results, shown, tmp_path):
    (tmp_path / "b.json").write_text(DEEP)
    status, _, errors = shown("check", "out", "--baseline", "b.json")
    assert status == 2
    assert "baseline b.json cannot be read (baseline: Invalid JSON: recursion limit exceeded at " in errors


def _another_shape(cell):
    for document in cell["documents"]:
        document[6]["acc"] = [1, 2]


def _a_list_among_numbers(cell):
    cell["documents"][3][6]["acc"] = [1]


def _a_measure_of_no_document(cell):
    cell["measures"][0][1] = "accc"


@pytest.mark.parametrize("change", [_another_shape, _a_list_among_numbers, _a_measure_of_no_document])
def test_values_that_cannot_be_held_against_each_other_are_no_traceback(results, shown, tmp_path, change):
    shown("check", "out", "--baseline", "b.json", "--update")
    data = json.loads((tmp_path / "b.json").read_text())
    change(data["cells"][0])
    (tmp_path / "b.json").write_text(json.dumps(data))
    status, _, errors = shown("check", "out", "--baseline", "b.json")
    assert status == 2
    assert "b.json" in errors and "arc acc" in errors


def test_a_record_that_stands_twice_counts_once(results, shown):
    copied = _file(results, "dart").with_name("copy.json")
    copied.write_bytes(_file(results, "dart").read_bytes())
    status, out, _ = shown("tables", "out", "--format", "json")
    assert status == 0
    assert len(json.loads(out)) == 3
    assert "3 cells" in shown("check", "out", "--baseline", "b.json", "--update")[1]


def test_of_a_record_that_was_made_twice_the_later_one_counts(tmp_path):
    first, again = (answered("arc", right(s), created=c) for s, c in ((0.9, "2026-01-01"), (0.1, "2026-02-01")))
    again.__dict__["key"] = first.key
    Store(tmp_path).save("b", first)
    Store(tmp_path / "other").save("a", again)
    for copied in (tmp_path / "other").rglob("*.json*"):  # folders of two machines are put together
        copied.rename(tmp_path / copied.relative_to(tmp_path / "other"))
    (read,) = Store(tmp_path).load()
    assert read.created == "2026-02-01"


@pytest.mark.parametrize(("text", "words"), [
    ("[]", "must contain keys and values"), ("0", "must contain keys"), ("''", "must contain keys and values"),
    ("recovery: 2024-99-99", "not YAML"), ("[" * 5000 + "]" * 5000, "not YAML"),
])  # fmt: skip
def test_thresholds_that_are_no_mapping_are_refused(tmp_path, text, words):
    file = tmp_path / "t.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=words) as refused:
        thresholds_from(file)
    assert str(file) in refused.value.problem
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("text", ["", "{}", "null", "# nothing"])
def test_thresholds_that_say_nothing_are_the_usual_ones(tmp_path, text):
    file = tmp_path / "t.yaml"
    file.write_text(text)
    assert thresholds_from(file) == thresholds_from(None)
