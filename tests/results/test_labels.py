"""Rows say what was typed: the parameters that are not a method's defaults, in every table, report and check."""

import csv
import dataclasses
import io
import json

import pytest

from dart_eval.cli import view
from dart_eval.models.loading import Identity
from dart_eval.results.board import boards
from dart_eval.results.check import (
    Thresholds,
    bad,
    check,
    junit,
    load_baseline,
    table,
    workflow_commands,
    write_baseline,
)
from dart_eval.results.compare import compare_folders, compare_rows
from dart_eval.results.frame import cells, lines_of, typed
from dart_eval.results.inputs import labels, specs
from dart_eval.results.report.build import build
from dart_eval.results.show import Table, folded, show
from dart_eval.results.store import Store
from dart_eval.sweep.events import Event
from tests.helpers.records import FLOPS, answered, record, render, right, save, tables

UNIFORM = "dart:allocation=uniform"
LONG = "dart:allocation=uniform:detect=false:window=12:blend=0.5:reference=kept:memory=running"


def of(spec, share=0.9, task="arc", **params):
    """A record of a method as it was typed."""
    method = spec.partition(":")[0]
    own = {} if method == "dense" else {"allocation": "uniform" if "uniform" in spec else "depth", **params}
    made = answered(task, right(share), method, 0.0 if method == "dense" else 0.5, params=own)
    made.settings["method"] = spec
    made.flops.update(FLOPS)
    return made


@pytest.fixture
def out(tmp_path):
    return save(tmp_path / "out", of("dense"), of("griffin"), of(UNIFORM))


def test_every_table_says_it_also_where_a_method_has_one_setting(out):
    records = Store(out).load()
    made = tables(records)
    assert len(made) == 2
    for t in made:
        assert {row[1] for row in t.body} == {"dense", "griffin", UNIFORM}
    for form in ("md", "tex"):
        assert render(records, form).count(UNIFORM) == 2


def test_data_keeps_method_and_parameters_beside_the_label(out):
    records = Store(out).load()
    for lines in (json.loads(render(records, "json")), list(csv.DictReader(io.StringIO(render(records, "csv"))))):
        (row,) = (r for r in lines if r["method"] == "dart")
        assert row["label"] == UNIFORM
        params = row["params"] if isinstance(row["params"], dict) else json.loads(row["params"])
        assert params == {"allocation": "uniform"}


def test_the_report_says_it_on_its_board_and_in_its_filter(out):
    html = build(Store(out))
    assert f'<th scope="row">{UNIFORM} ' in html and f"{UNIFORM} 50 %</option>" in html


def test_comparisons_say_it(out, tmp_path):
    (row,) = compare_rows("griffin", UNIFORM, [out]).rows
    assert row["contrast"] == f"griffin 50 % vs {UNIFORM} 50 %"
    other = save(tmp_path / "other", of("dense"), of(UNIFORM))
    found = compare_folders(other, out)
    assert [row["contrast"] for row in found.rows] == [f"{UNIFORM} 50 %", "dense"]
    found = compare_folders(out, save(tmp_path / "third", of("dense")))
    assert f"arc under {UNIFORM} 50 %" in " ".join(found.notes)


def test_a_check_says_it_and_its_baseline_keeps_it(out, tmp_path):
    file = tmp_path / "b.json"
    write_baseline(file, cells(out))
    assert [c.get("method") for c in json.loads(file.read_text())["cells"]].count(UNIFORM) == 1
    fallen = cells(save(tmp_path / "now", of("dense"), of("griffin"), of(UNIFORM, 0.1)))
    report = check(fallen, load_baseline(file), Thresholds(), "b.json")
    (row,) = bad(report)
    assert row["cell"] == f"{UNIFORM} 50 %"
    assert table(report).body[0][0] == f"{UNIFORM} 50 %"
    assert f'classname="{UNIFORM} 50 %"' in junit(report)
    assert f"{UNIFORM} 50 %25, arc acc" in workflow_commands(report)[0]
    (missing,) = check(fallen[:2], [c for c in load_baseline(file) if "uniform" in c.key], Thresholds(), "b").rows
    assert missing["cell"] == f"{UNIFORM} 50 %"


# -- names -----------------------------------------------------------------------------------------------------------


def _typed(key, spec, **params):
    made = record(key=key, params=params, method=spec.partition(":")[0])
    return dataclasses.replace(made, settings={**made.settings, "method": spec})


def test_what_an_older_version_could_not_say_is_what_it_always_did():
    """Not what another cell says: `draw` was new, and its value there is not the old one."""
    old = [_typed(f"k{i}", name, allocation="uniform") for i, name in enumerate(("griffin", "cats"))]
    new = [
        _typed("k5", "griffin:draw=sample", allocation="uniform", draw="sample"),
        _typed("k6", "griffin", allocation="uniform", draw="best"),
        _typed("k7", "cats:choice.threshold=calibrated", **{"allocation": "uniform", "choice.threshold": "calibrated"}),
    ]
    assert specs([*old, *new]) == {
        "k0": "griffin", "k1": "cats", "k5": "griffin:draw=sample", "k6": "griffin",
        "k7": "cats:choice.threshold=calibrated",
    }  # fmt: skip


def test_one_setting_has_one_name_whoever_made_it():
    old = record(key="k1", params={"allocation": "uniform"})  # does not say what was typed
    other = _typed("k2", "dart", allocation="uniform")  # of a version where that was the default
    assert set(specs([old, _typed("k3", UNIFORM, allocation="uniform"), other]).values()) == {UNIFORM}


def test_a_file_in_a_method_is_no_parameter():
    first = _typed("k1", "dart:allocation=table:a.json", allocation="table:a.json", window=10)
    later = _typed("k2", "dart:allocation=table:a.json", allocation="table:a.json", window=8)
    assert list(labels([first, later]).values()) == ["dart:window=10", "dart:window=8"]


def test_a_name_that_is_no_unicode_stands_in_tables_and_frames():
    odd = "dart:allocation=table:\udcff.json"  # as a file's name may be
    records = [of("dense"), of(odd)]
    assert [[row[1] for row in t.body] for t in tables(records)] == [["dense", odd]] * 2
    frame = typed(lines_of({}, records))
    assert list(frame["label"]) == ["dense", odd]
    assert frame["value"].dtype == float and frame["n"].dtype == int


# -- on a terminal -----------------------------------------------------------------------------------------------------


def test_long_names_are_readable_where_there_is_no_terminal(capsys):
    body = [["arc_easy", LONG, "0.5", "0.6251 ± 0.0123", "400"], ["arc_easy", "dense", "0", "0.7000 ± 0.0100", "400"]]
    show(Table("Accuracy", ["task", "method", "sparsity", "acc", "n"], body, ["note"]))
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 100 for line in lines)
    shown = "".join(line[9:].split("  0.5")[0].strip() for line in lines if ":" in line)
    assert shown == LONG
    assert sum(":" in line for line in lines) > 1
    assert any("0.6251 ± 0.0123" in line for line in lines)


@pytest.mark.parametrize(("name", "lines"), [
    ("dense", ["dense"]),
    (UNIFORM, ["dart", "  :allocation=uniform"]),
    ("dart:window=8 50 % vs griffin 50 %", ["dart:window=8 50 % vs", "  griffin 50 %"]),
    ("dart (model=aaaa1111 limit=100)", ["dart (model=aaaa1111", "  limit=100)"]),
    ("a" * 40, ["a" * 40]),
])  # fmt: skip
def test_names_are_broken_between_parameters_and_words(name, lines):
    assert folded(name, 22) == lines


@pytest.mark.parametrize("width", [80, 120])
def test_a_long_name_leaves_room_for_its_bar(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))

    class Cell:
        key, title = "k", f"smoke_questions {LONG} 0.5"

    shown = view.TerminalView()
    shown(Event("planned", of=1))
    shown(Event("started", cell=Cell))
    (title,) = [t.description for t in shown.progress.tasks if "dart" in t.description]
    assert title == Cell.title[: width - 47] + "…"


def _shaped(spec, size, created="2026-01-01T00:00:00+00:00"):
    """A cell whose key holds the batch size, or (None) does not, as it cannot move its numbers."""
    made = of(spec)
    inputs = {**made.inputs, "batch_size": size, "share_prefix": None if size is None else True}
    measured = {**made.measured, "created": created}
    return dataclasses.replace(made, inputs=inputs, key=f"{spec}{size}".ljust(64, "0"), measured=measured)


def test_a_batch_size_that_only_some_cells_have_tells_no_two_apart():
    plain = [_shaped("dense", None), _shaped("griffin", None), _shaped("dart-choice", 8)]
    assert list(labels(plain).values()) == ["dense", "griffin", "dart-choice"]
    two = labels([*plain, _shaped("dart-choice", 4)])
    assert list(two.values()) == ["dense", "griffin", "dart-choice (batch_size=8)", "dart-choice (batch_size=4)"]


def test_a_cell_whose_key_has_come_to_hold_the_batch_size_is_the_newer_run(tmp_path):
    older, newer = _shaped("dart-choice", None), _shaped("dart-choice", 8, "2026-02-01T00:00:00+00:00")
    folder = save(tmp_path / "out", of("dense"), older, newer)
    found = [c for c in cells(folder) if c.inputs["method"] == "dart-choice"]
    assert [c.key for c in found] == [newer.key]


def test_a_model_without_code_of_its_own_is_named_as_before():
    made = Identity("m", None, "abc").to_json()
    assert made == {"name": "m", "revision": None, "weights": "abc"}
    assert Identity("m", None, "abc", remote_code=True).to_json()["remote_code"] is True


def test_settings_that_differ_behind_their_fortieth_character_make_two_rows(tmp_path):
    """Two temperatures behind a length: the board has a row for each, and not the last one for both."""
    settings = "do_sample=true,max_gen_toks=1000,temperature="
    made = [
        answered("texts", right(share), method, 0.0 if method == "dense" else 0.5, gen_kwargs=f"{settings}{heat}")
        for heat, shares in (("0.7", (0.8, 0.7)), ("1.0", (0.6, 0.3)))
        for method, share in zip(("dense", "dart"), shares, strict=True)
    ]
    out = save(tmp_path / "out", *made)
    records = Store(out).load()
    assert len(set(labels(records).values())) == 4
    (board,) = boards(Store(out), records)
    assert sorted(len(row.keys) for row in board.rows if row.keys) == [1, 1, 1, 1]


def test_the_code_of_a_method_stands_in_a_label_only_where_nothing_else_tells_cells_apart():
    cells = (("griffin", "aaaaaaaaaa"), ("dart", "bbbbbbbbbb"), ("dart", "cccccccccc"))
    made = [answered("arc", right(0.5), method, method_code=code) for method, code in cells]
    assert set(labels(made[:2]).values()) == {"griffin", "dart"}
    assert [*labels(made).values()][1:] == ["dart (method_code=bbbbbbbb)", "dart (method_code=cccccccc)"]
