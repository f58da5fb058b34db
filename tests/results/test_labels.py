"""What rows are called: what was typed, and whatever else tells two cells apart; two models of one name are two models.

Models of one name are checkpoint-1000/model and checkpoint-2000/model.
"""

import csv
import dataclasses
import io
import json

import pytest

from dart_eval.models.loading import Identity
from dart_eval.results import check, inputs
from dart_eval.results.board import boards
from dart_eval.results.check import FELL, Thresholds
from dart_eval.results.compare import compare_folders, compare_rows
from dart_eval.results.frame import cells, counterparts, lines, lines_of, typed
from dart_eval.results.inputs import labels, specs
from dart_eval.results.report.build import build
from dart_eval.results.store import Store
from dart_eval.util.errors import UserError
from tests.helpers.records import FLOPS, answered, record, render, right, save, tables

UNIFORM = "dart:allocation=uniform"
OLD, NEW = "aaaa1111bbbb2222", "cccc3333dddd4444"


def of(spec, share=0.9, seed=0, weights=None, revision=None, **more):
    """A record of a method as it was typed."""
    method = spec.partition(":")[0]
    own = {} if method == "dense" else {"allocation": "uniform" if "uniform" in spec else "depth"}
    model = {"model": {"name": "model", "revision": revision, "weights": weights}} if weights or revision else {}
    sparsity = 0.0 if method == "dense" else 0.5
    made = answered("arc", right(share, seed=seed), method, sparsity, params=own, **model, **more)
    made.settings["method"] = spec
    made.flops.update(FLOPS)
    return made


def test_every_output_calls_a_row_as_it_was_typed(tmp_path):
    """Also where a method has one setting; data have method and parameters beside it."""
    out = save(tmp_path / "out", of("dense"), of("griffin"), of(UNIFORM))
    records = Store(out).load()
    assert [{row[1] for row in t.body} for t in tables(records)] == [{"dense", "griffin", UNIFORM}] * 2
    for made in (json.loads(render(records, "json")), list(csv.DictReader(io.StringIO(render(records, "csv"))))):
        (row,) = (r for r in made if r["method"] == "dart")
        params = row["params"] if isinstance(row["params"], dict) else json.loads(row["params"])
        assert (row["label"], params) == (UNIFORM, {"allocation": "uniform"})
    assert UNIFORM in build(Store(out))
    (row,) = compare_rows("griffin", UNIFORM, [out]).rows
    assert row["contrast"] == f"griffin at 50 % vs {UNIFORM} at 50 %"
    file = tmp_path / "b.json"
    check.write_baseline(file, cells(out))
    fallen = cells(save(tmp_path / "now", of("dense"), of("griffin"), of(UNIFORM, 0.1)))
    for now in (fallen, [c for c in fallen if c.inputs["method"] != "dart"]):
        (row,) = check.bad(check.check(now, check.load_baseline(file), Thresholds(), "b.json"))
        assert row["cell"] == f"{UNIFORM} at 50 %"


def cell(key, spec=None, **params):
    """A cell of parameters; spec: what was typed, which older records do not say."""
    one = record(key=key, params=params, method=(spec or "dart").partition(":")[0])
    return dataclasses.replace(one, settings={**one.settings, "method": spec}) if spec else one


DETECTS = cell("k1", "dart", window=10, detect=True)
QUIET = cell("k2", "dart:detect=false", window=10, detect=False)
TABLE, CHOICE = "dart:allocation=table:a.json", "choice.threshold"


@pytest.mark.parametrize(("records", "names"), [
    ([cell("k1", ring=24, window=8, detect=True), cell("k2", ring=24, window=10, detect=False)],
     ["dart:detect=true:window=8", "dart:detect=false:window=10"]),
    ([DETECTS, QUIET], ["dart", "dart:detect=false"]), ([QUIET], ["dart:detect=false"]),
    # Of a version with other defaults: the name alone says too little.
    ([DETECTS, cell("k3", "dart", window=8, detect=True)], ["dart:window=10", "dart:window=8"]),
    ([cell("k1", TABLE, allocation="table:a.json", window=10), cell("k2", TABLE, allocation="table:a.json", window=8)],
     ["dart:window=10", "dart:window=8"]),
    # One setting has one name, whoever made it; and where all have it, it is not told.
    ([cell("k1", allocation="uniform"), cell("k2", UNIFORM, allocation="uniform"),
      cell("k3", "dart", allocation="uniform")], [UNIFORM] * 3),
    ([cell("k1", "dart", window=8), cell("k2", "dart", window=8)], ["dart"] * 2),
    # What an older version could not say is what it always did, and not what another cell says.
    ([cell("k0", "griffin", allocation="uniform"), cell("k1", "cats", allocation="uniform"),
      cell("k5", "griffin:draw=sample", allocation="uniform", draw="sample"),
      cell("k6", "griffin", allocation="uniform", draw="best"),
      cell("k7", f"cats:{CHOICE}=calibrated", **{"allocation": "uniform", CHOICE: "calibrated"})],
     ["griffin", "cats", "griffin:draw=sample", "griffin", f"cats:{CHOICE}=calibrated"]),
])  # fmt: skip
def test_settings_are_called_as_they_were_typed_where_that_tells_them_apart(records, names):
    found = specs(records) if len(records) == 5 else labels(records)
    assert found == dict(zip((r.key for r in records), names, strict=True))


@pytest.mark.parametrize(("changes", "names"), [
    ([{"scope": "scored"}, {"scope": "generated"}], ["dart (scope=scored)", "dart (scope=generated)"]),
    ([{"execution": "masked"}, {"execution": "sliced"}], ["dart (execution=masked)", "dart (execution=sliced)"]),
    ([{"execution": None}, {"execution": "masked"}], ["dart (execution=default)", "dart (execution=masked)"]),
    ([{"seed": 0}, {"seed": 1}], ["dart (seed=0)", "dart (seed=1)"]),
    # A setting that follows from the task can be left out.
    ([{"limit": 100}, {"limit": 64, "task": "xsum"}], ["dart", "dart"]),
    ([{"limit": 100}, {"limit": 64, "task": "xsum"}, {"limit": 10, "task": "xsum"}],
     ["dart (limit=100)", "dart (limit=64)", "dart (limit=10)"]),
    # A batch size that only some cells have (it cannot move the others' numbers) tells no two apart.
    ([{"batch_size": None}, {"batch_size": 8, "method": "griffin"}], ["dart", "griffin"]),
    ([{"batch_size": None, "method": "griffin"}, {"batch_size": 8}, {"batch_size": 4}],
     ["griffin", "dart (batch_size=8)", "dart (batch_size=4)"]),
    # So does a calibration text that another method reads; of one method it does.
    ([{"calibration": "a" * 64}, {"calibration": "b" * 64, "method": "dense", "ffn_bits": "gptq4:32"}],
     ["dart", "dense on gptq4:32"]),
    ([{"calibration": "a" * 64}, {"calibration": "b" * 64}], [f"dart (calibration={8 * x})" for x in "ab"]),
    # The code of a method stands in a label only where nothing else tells cells apart.
    ([{"method_code": "a" * 10}, {"method_code": "b" * 10, "method": "griffin"}], ["dart", "griffin"]),
    ([{"method_code": "a" * 10}, {"method_code": "b" * 10}],
     ["dart (method_code=aaaaaaaa)", "dart (method_code=bbbbbbbb)"]),
])  # fmt: skip
def test_cells_that_differ_in_a_setting_of_the_run_are_told_apart(changes, names):
    records = [record(key=f"k{i}") for i in range(len(changes))]
    for r, change in zip(records, changes, strict=True):
        r.inputs.update(change)
    assert list(labels(records).values()) == names


def test_a_name_that_is_no_unicode_stands_in_tables_and_frames():
    odd = "dart:allocation=table:\udcff.json"  # as a file's name may be
    records = [of("dense"), of(odd)]
    assert [[row[1] for row in t.body] for t in tables(records)] == [["dense", odd]] * 2
    frame = typed(lines_of({}, records))
    assert list(frame["label"]) == ["dense", odd]
    assert frame["value"].dtype == float and frame["n"].dtype == int


def test_a_cell_whose_key_has_come_to_hold_the_batch_size_is_the_newer_run(tmp_path):
    older, newer = (
        of("dart", batch_size=size, created=created) for size, created in ((None, "2026-01"), (8, "2026-02"))
    )
    (found,) = cells(save(tmp_path / "out", older, newer))
    assert found.key == newer.key


def test_a_model_without_code_of_its_own_is_named_as_before():
    made = Identity("m", None, "abc").to_json()
    assert made == {"name": "m", "revision": None, "weights": "abc"}
    assert Identity("m", None, "abc", remote_code=True).to_json()["remote_code"] is True


def test_settings_that_differ_behind_their_fortieth_character_make_two_rows(tmp_path):
    """Two temperatures behind a length: the board has a row for each, and not the last one for both."""
    settings = [f"do_sample=true,max_gen_toks=1000,temperature={heat}" for heat in ("0.7", "1.0")]
    out = Store(save(tmp_path, *(of(m, gen_kwargs=text) for text in settings for m in ("dense", "dart"))))
    (board,) = boards(out, out.load())
    assert [len(row.keys) for row in board.rows if row.keys] == [1, 1, 1, 1]


def each(weights, dense=0.9, griffin=0.9, seed=0, **more):
    return [of(m, share, seed, weights, **more) for m, share in (("dense", dense), ("griffin", griffin))]


@pytest.fixture
def both(tmp_path):
    """Dense and griffin of each of two models of one name; each model's griffin is as good as its own dense."""
    return save(tmp_path / "both", *each(OLD), *each(NEW, 0.2, 0.2, 1, created="2026-01-02"))


def test_each_model_is_held_against_its_own_dense_and_named(both, tmp_path):
    found = compare_rows("dense", "griffin", [both])
    names = [f"dense (model={h[:8]}) vs griffin (model={h[:8]}) at 50 %" for h in (OLD, NEW)]
    assert [(r["contrast"], r["difference"]) for r in found.rows] == [(name, 0) for name in names]
    methods = {row[1] for row in tables(Store(both).load())[0].body}
    assert methods == {f"{m} (model={h[:8]})" for m in ("dense", "griffin") for h in (OLD, NEW)}
    assert len(boards(Store(both), Store(both).load())) == 2
    rows = lines(Store(both), Store(both).load()).to_dict("records")
    assert [row["recovery"] for row in rows if row["method"] == "griffin"] == [1, 1]
    (row,) = compare_rows("griffin (model=aaaa1111)", "griffin (model=cccc3333)", [both]).rows
    assert (row["contrast"], row["better"]) == (
        "griffin (model=aaaa1111) at 50 % vs griffin (model=cccc3333) at 50 %",
        "A",
    )
    hub = save(tmp_path / "hub", *(r for name in (OLD, NEW) for r in each(None, revision=name)))  # two revisions
    assert [r["contrast"] for r in compare_rows("dense", "griffin", [hub]).rows] == names
    out = save(tmp_path / "out", each(OLD)[1], each(NEW, 0.2, seed=1)[0])
    with pytest.raises(UserError, match="no cell in common"):
        compare_rows("dense", "griffin", [out])


def test_two_folders_are_compared_model_against_model_and_the_same_weights_go_first(both, tmp_path):
    a, b = save(tmp_path / "a", *each(OLD)), save(tmp_path / "b", *each(NEW, 0.2, 0.2, 1))
    found = compare_folders(a, b)
    assert [(r["contrast"], r["better"]) for r in found.rows] == [("dense", "A"), ("griffin at 50 %", "A")]
    assert "aaaa1111bbbb in A, cccc3333dddd in B" in " ".join(found.notes)
    found = compare_folders(save(tmp_path / "c", each(OLD)[0]), both)
    assert [r["difference"] for r in found.rows] == [0] and found.notes[0].count("cccc3333") == 2
    other = save(tmp_path / "d", each("eeee5555")[0])
    with pytest.raises(UserError, match=r"eeee5555 .*aaaa1111.*cccc3333"):  # none is taken where several could be meant
        compare_folders(other, both)


def test_one_model_that_each_side_has_alone_goes_with_the_other(tmp_path):
    left, right_ = (cells(save(tmp_path / w, of("dense", weights=OLD), of("dense", 0.8, weights=w)))
                    for w in ("eeee5555", NEW))  # fmt: skip
    found = counterparts(left, right_)
    weights = {c.inputs["model"]["weights"]: found[c.key].inputs["model"]["weights"] for c in left}
    assert weights == {OLD: OLD, "eeee5555": NEW}


def test_a_changed_model_is_held_against_the_baseline_unless_there_are_several(both, tmp_path):
    then, now = cells(save(tmp_path / "then", *each(OLD))), cells(save(tmp_path / "now", *each(NEW, griffin=0.3)))
    report = check.check(now, then, Thresholds(), "b.json")
    assert [(r["cell"], r["verdict"]) for r in report.rows] == [("dense", "ok"), ("griffin at 50 %", FELL)]
    assert any("aaaa1111bbbb then, cccc3333dddd now" in note for note in report.notes)
    # The old checkpoint's results still lie there: they must not stand in for the new one's.
    with pytest.raises(UserError, match=r"b\.json .*aaaa1111.*cccc3333"):
        check.check(cells(both), then, Thresholds(), "b.json")
    report = check.check(cells(both), cells(both), Thresholds(), "b.json")
    assert {r["cell"] for r in report.rows} == {
        "dense (model=aaaa1111)", "dense (model=cccc3333)", "griffin (model=aaaa1111) at 50 %",
        "griffin (model=cccc3333) at 50 %",
    }  # fmt: skip
    assert all(r["verdict"] == "ok" and r["recovery"] == 1 for r in report.rows)


def test_the_question_names_the_model_with_its_weights():
    first, second = (json.loads(inputs.identity(of("dart", weights=w).inputs)) for w in (OLD, NEW))
    assert {k for k in first if first[k] != second[k]} == {"model"}
    assert inputs.model_of({"name": "hub/model", "revision": None, "weights": None}) == "hub/model"
