"""Two models of one folder name (checkpoint-1000/model, checkpoint-2000/model) are two models in every comparison."""

import json
import re

import pytest

from dart_eval.results import inputs
from dart_eval.results.check import FELL, Thresholds, check, junit
from dart_eval.results.compare import compare_folders, compare_rows
from dart_eval.results.frame import cells, counterparts
from dart_eval.results.report.build import build
from dart_eval.results.store import Store
from dart_eval.util.errors import UserError
from tests.helpers.records import FLOPS, answered, right, save, tables

OLD, NEW = "aaaa1111bbbb2222", "cccc3333dddd4444"


def of(weights, method, share, seed=0, revision=None, **more):
    sparsity = 0.0 if method == "dense" else 0.5
    model = {"name": "model", "revision": revision, "weights": weights}
    made = answered("arc", right(share, seed=seed), method, sparsity, model=model, **more)
    made.flops.update(FLOPS)
    return made


def both(folder):
    """Dense and griffin of each of two models of one name; each model's griffin is as good as its own dense."""
    return save(
        folder, of(OLD, "dense", 0.9), of(OLD, "griffin", 0.9), of(NEW, "dense", 0.2, 1, created="2026-01-02"),
        of(NEW, "griffin", 0.2, 1, created="2026-01-02"),
    )  # fmt: skip


def test_a_method_is_not_held_against_another_models_dense(tmp_path):
    out = save(tmp_path, of(OLD, "griffin", 0.9), of(NEW, "dense", 0.2, 1))
    with pytest.raises(UserError, match="no cell in common"):
        compare_rows("dense", "griffin", [out])


def test_each_model_is_compared_with_itself_and_named(tmp_path):
    found = compare_rows("dense", "griffin", [both(tmp_path)])
    assert [r["contrast"] for r in found.rows] == [
        "dense (model=aaaa1111) vs griffin (model=aaaa1111) 50 %",
        "dense (model=cccc3333) vs griffin (model=cccc3333) 50 %",
    ]
    assert [r["difference"] for r in found.rows] == [0, 0]


def test_two_revisions_of_the_hub_are_two_models(tmp_path):
    out = save(
        tmp_path, *(of(None, m, 0.9, revision=r) for m in ("dense", "griffin") for r in ("f00d0000", "beef0000"))
    )
    found = compare_rows("dense", "griffin", [out])
    assert [r["contrast"] for r in found.rows] == [
        "dense (model=beef0000) vs griffin (model=beef0000) 50 %",
        "dense (model=f00d0000) vs griffin (model=f00d0000) 50 %",
    ]


def test_models_of_one_name_are_compared_where_both_rows_name_theirs(tmp_path):
    out = both(tmp_path)
    (row,) = compare_rows("griffin (model=aaaa1111)", "griffin (model=cccc3333)", [out]).rows
    assert row["contrast"] == "griffin (model=aaaa1111) 50 % vs griffin (model=cccc3333) 50 %" and row["better"] == "A"


# -- two folders -----------------------------------------------------------------------------------------------------


def test_two_folders_are_compared_model_against_model_and_it_is_said(tmp_path):
    a = save(tmp_path / "a", of(OLD, "dense", 0.9), of(OLD, "griffin", 0.9))
    b = save(tmp_path / "b", of(NEW, "dense", 0.2, 1), of(NEW, "griffin", 0.2, 1))
    found = compare_folders(a, b)
    assert [(r["contrast"], r["better"]) for r in found.rows] == [("dense", "A"), ("griffin 50 %", "A")]
    assert "model.weights (aaaa1111bbbb in A, cccc3333dddd in B)" in " ".join(found.notes)


def test_between_folders_the_same_weights_go_together_first(tmp_path):
    a = save(tmp_path / "a", of(OLD, "dense", 0.9))
    found = compare_folders(a, both(tmp_path / "b"))
    assert [r["difference"] for r in found.rows] == [0]
    (said,) = found.notes
    assert said.startswith(f"Only in {tmp_path / 'b'}: arc under griffin (model=aaaa1111) 50 %, ")
    assert said.count("cccc3333") == 2


def test_where_several_could_be_meant_none_is_taken(tmp_path):
    a = save(tmp_path / "a", of("eeee5555", "dense", 0.9))
    with pytest.raises(UserError, match=r"model@eeee5555 in .*a, model@aaaa1111, model@cccc3333 in .*b; keep each"):
        compare_folders(a, both(tmp_path / "b"))


def test_one_model_that_each_side_has_alone_goes_with_the_other(tmp_path):
    a = save(tmp_path / "a", of(OLD, "dense", 0.9), of("eeee5555", "dense", 0.8))
    b = save(tmp_path / "b", of(OLD, "dense", 0.9), of(NEW, "dense", 0.8))
    left, right_ = cells(a), cells(b)
    found = counterparts(left, right_)
    weights = {c.inputs["model"]["weights"]: found[c.key].inputs["model"]["weights"] for c in left}
    assert weights == {OLD: OLD, "eeee5555": NEW}


# -- a baseline ------------------------------------------------------------------------------------------------------


def test_a_changed_model_is_held_against_the_baseline_and_said(tmp_path):
    then = cells(save(tmp_path / "then", of(OLD, "dense", 0.9), of(OLD, "griffin", 0.9)))
    now = cells(save(tmp_path / "now", of(NEW, "dense", 0.9), of(NEW, "griffin", 0.3)))
    report = check(now, then, Thresholds(), "b.json")
    assert [(r["cell"], r["verdict"]) for r in report.rows] == [("dense", "ok"), ("griffin 50 %", FELL)]
    assert any("aaaa1111bbbb then, cccc3333dddd now" in note for note in report.notes)


def test_results_of_several_models_are_not_held_against_one_of_their_name(tmp_path):
    """The old checkpoint's results still lie there: they must not stand in for the new one's."""
    then = cells(save(tmp_path / "then", of(OLD, "dense", 0.9), of(OLD, "griffin", 0.9)))
    with pytest.raises(UserError, match=r"b\.json has one: model@aaaa1111, model@cccc3333; keep each"):
        check(cells(both(tmp_path / "now")), then, Thresholds(), "b.json")


def test_a_baseline_of_two_models_checks_each_against_itself(tmp_path):
    now = cells(both(tmp_path))
    report = check(now, now, Thresholds(), "b.json")
    assert {r["cell"] for r in report.rows} == {
        "dense (model=aaaa1111)", "dense (model=cccc3333)", "griffin (model=aaaa1111) 50 %",
        "griffin (model=cccc3333) 50 %",
    }  # fmt: skip
    assert all(r["verdict"] == "ok" and r["recovery"] == 1 for r in report.rows)
    assert 'classname="griffin (model=cccc3333) 50 %"' in junit(report)


# -- tables, the report, drift --------------------------------------------------------------------------------


def test_tables_tell_them_apart(tmp_path):
    methods = {row[1] for row in tables(Store(both(tmp_path)).load())[0].body}
    assert methods == {f"{m} (model={h[:8]})" for m in ("dense", "griffin") for h in (OLD, NEW)}


def test_a_report_has_a_board_of_each_which_is_held_against_its_own_dense(tmp_path):
    html = build(Store(both(tmp_path)))
    boards = re.findall(r"<h3>(model@\w+),[^<]*</h3>\s*<div", html)
    assert boards == ["model@aaaa1111", "model@cccc3333"]
    assert html.count(">100 % [") == 2  # griffin is as good as its own dense


def test_the_question_names_the_model_with_its_weights():
    first, second = (json.loads(inputs.identity(of(w, "dart", 0.9).inputs)) for w in (OLD, NEW))
    assert {k for k in first if first[k] != second[k]} == {"model"}
    assert inputs.model_of({"name": "hub/model", "revision": None, "weights": None}) == "hub/model"
