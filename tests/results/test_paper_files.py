"""Papers of one's own: late refusals, rows that are no rivals, and which setting counts."""

import dataclasses
import math

import numpy as np
import pytest

from dart_eval.cli import paper as command
from dart_eval.results.claims import OPEN, table
from dart_eval.results.paper_layout import PaperColumn, PaperRow
from dart_eval.results.paper_tables import Paper
from dart_eval.results.record import Metric
from dart_eval.results.store import Store
from dart_eval.sweep.options import config_from
from dart_eval.sweep.paper import load
from dart_eval.sweep.run import RunResult
from dart_eval.util.errors import UserError
from tests.helpers.commands import command as typed
from tests.helpers.records import answered, metric_of
from tests.results.test_claims import SHAPE, _claim
from tests.results.test_paper import BASE, SMALL, A, B, _cell, _file, _layout


def test_a_group_of_sweeps_that_cannot_run_costs_no_other_its_tables(tmp_path, monkeypatch):
    """The second group has a chat template, which the model has not; a task of another group is misspelt."""

    def run_all(configs, view, skip_missing):
        if configs[0].chat_template:
            raise UserError("model tiny has no chat template")
        return RunResult(["a record"], [], {})

    monkeypatch.setattr("dart_eval.cluster.run.run_all", run_all)
    chat = {"name": "chat", "title": "C", "chat_template": True, "columns": SMALL["tables"][0]["columns"]}
    spec = load(_file(tmp_path, tables=[*SMALL["tables"], chat]), config_from(None, BASE))
    result, _, refused = command._run(spec, False)
    assert result.records == ["a record"] and [str(e) for e in refused] == ["model tiny has no chat template"]
    with pytest.raises(UserError, match="no chat template"):  # nothing is lost yet
        command._run(load(_file(tmp_path, tables=[chat]), config_from(None, BASE)), False)


@pytest.mark.parametrize(("task", "said"), [
    ("smoke_sumary", "unknown task 'smoke_sumary'; did you mean smoke_summary"), ("arc", "error: it begins\n"),
])  # fmt: skip
def test_tasks_are_known_before_the_first_sweep(tmp_path, monkeypatch, task, said):
    def run(spec, verbose):
        raise UserError("it begins")

    monkeypatch.setattr(command, "_run", run)
    late = {"name": "late", "title": "L", "max_length": 64, "columns": {"S": {"task": task, "metric": "acc"}}}
    done = typed("paper", _file(tmp_path, tables=[*SMALL["tables"], late]), "--output", tmp_path / "out")
    assert done.code == 2 and said in done.err


def test_a_shape_that_cannot_be_counted_is_refused_before_the_first_cell(tmp_path, monkeypatch):
    monkeypatch.setattr("dart_eval.cluster.run.run_all", lambda *a, **k: pytest.fail("a cell ran"))
    cats = {**SHAPE, "shape": "llama-3.2-1b", "method": "cats", "column": "overhead %"}
    with pytest.raises(UserError, match="claim 'c': cats reads 1 of the FFN's 3 matrices whole"):
        command._run(load(_file(tmp_path, claims=[cats]), config_from(None, BASE)), False)
    with pytest.raises(UserError, match="sparsity"):
        load(_file(tmp_path, claims=[{**SHAPE, "sparsity": 70}]), config_from(None, BASE))
    for prompt in (0, -5, 10**10):
        with pytest.raises(UserError, match=f"claim 'c': a prompt has 1 to 1,048,576 tokens, not {prompt}"):
            load(_file(tmp_path, claims=[{**SHAPE, "prompt": prompt}]), config_from(None, BASE))


def test_the_commands_revision_is_that_of_the_commands_model(tmp_path):
    own = {
        "name": "own",
        "title": "O",
        "model": "gemma-3-270m",
        "columns": {"S": {"task": "smoke_stories", "metric": "acc"}},
    }
    file = _file(tmp_path, tables=[*SMALL["tables"], own])
    found = load(file, config_from(None, {**BASE, "model": "org/x", "revision": "step1000"})).sweeps
    revisions = {(config.model, config.revision) for configs in found.values() for config in configs}
    assert revisions == {("org/x", "step1000"), ("gemma-3-270m", None)}


def test_the_divergence_from_a_rounded_model_stands_beside_no_other(tmp_path):
    """C's KL is from dense on 4 bits, A's and B's from dense."""
    store, draw, cells = Store(tmp_path), np.random.default_rng(0), []
    for method, scale, more in (("a", 0.3, {}), ("b", 0.5, {"params": {"x": 1}}), ("c", 0.1, {"ffn_bits": "4"})):
        values = [{"acc": 1.0, "kl": [5 * scale * draw.gamma(4, 0.25), 5]} for _ in range(40)]
        found = [metric_of("easy", "acc", values), metric_of("easy", "kl", values, False)]
        cells.append(store.save(method, answered("easy", values, method, metrics=found, **{"params": {}, **more})))
    rows = (A, B, PaperRow("C on 4 bits", "c", {}, True, {"ffn_bits": "4"}))
    paper, column = Paper(store, {None: cells}, {}, "x"), PaperColumn("KL", ("easy",), "kl")
    shown, _ = paper.table(_layout((column,), rows))
    assert [row[2] == "-" for row in shown.body] == [False, False, True] and shown.bold == {(0, 2)}
    alike = dataclasses.replace(column, asked={"ffn_bits": "4"})  # a table of 4 bits: one dense for all
    assert paper.table(_layout((alike,), rows))[0].body[2][2] != "-"


def test_an_upper_bound_is_named_and_never_the_best_row(tmp_path):
    store = Store(tmp_path)
    cells = [_cell(store, "a", 30), _cell(store, "b", 10, params={"x": 1})]
    oracle = _cell(store, "oracle", 40)
    settings = {**oracle.settings, "method": "oracle", "upper_bound": True}
    oracle = store.save("o", dataclasses.replace(oracle, settings=settings, samples=store.samples(oracle)))
    rows = (A, B, PaperRow("Oracle", "oracle", {}, True))
    shown, _ = Paper(store, {None: [*cells, oracle]}, {}, "x").table(_layout(rows=rows))
    assert shown.bold == {(0, 2)} and "oracle is an upper bound: it looks ahead." in shown.note


def test_a_pruner_without_a_sparsity_is_a_rival_in_its_block(tmp_path):
    """2:4 has no sparsity to set; it stands in the block that its row names, and is better than A."""
    store = Store(tmp_path)
    cells = [_cell(store, "a", 20), _cell(store, "b", 4, params={"x": 1}), _cell(store, "wanda", 38, sparsity=0.0)]
    rows = (A, B, PaperRow("2:4", "wanda", {}, False, {}, (0.5,)))
    assert Paper(store, {None: cells}, {}, "x").table(_layout(rows=rows))[0].bold == {(2, 2)}


def test_a_row_on_rounded_weights_takes_no_other_row_out_of_the_test(tmp_path):
    """Its bytes are of 4 bits: no row of its sparsity reads as few, and all of them run pruned."""
    store = Store(tmp_path)
    cells = [_cell(store, "a", 30), _cell(store, "b", 10, params={"x": 1})]
    made = _cell(store, "c", 5)
    inputs = {**made.inputs, "ffn_bits": "4"}
    made = dataclasses.replace(made, key="4", inputs=inputs, effective_sparsity=0.86, samples=store.samples(made))
    rows = (A, B, PaperRow("C on 4 bits", "c", {}, True, {"ffn_bits": "4"}))
    shown, _ = Paper(store, {None: [*cells, store.save("4", made)]}, {}, "x").table(_layout(rows=rows))
    assert shown.bold == {(0, 2)} and "no part" not in shown.note


def test_a_measured_number_that_no_test_takes_is_not_called_unmeasured(tmp_path):
    """Matthews' correlation does not follow from single documents; of flips the smaller number is the better one."""
    store, cells = Store(tmp_path), []
    for method, flips, params in (("a", 8, {}), ("b", 24, {"x": 1})):
        values = [{"acc": 1.0, "flips": float(i < flips)} for i in range(40)]
        found = [metric_of("t", "acc", values), metric_of("t", "flips", values, False)]
        found.append(Metric("t", "mcc", 0.4, 0.05, 40, True))
        cells.append(store.save(method, answered("t", values, method, metrics=found, params=params)))
    paper = Paper(store, {None: cells}, {}, "x")
    said = []
    for metric, more in (("mcc", {}), ("flips", {"times": 2.0})):
        layout = _layout((PaperColumn("Easy", ("t",), metric),), (A, B))
        said += [row[1:3] for row in table([_claim(**more)], paper, {"t": layout}, lambda claim: 0).body]
    assert [verdict for verdict, _ in said] == [OPEN, OPEN]
    assert said[0][1].startswith("not tested: ") and "smaller value is the better one" in said[1][1]


def test_the_nearest_setting_counts(tmp_path):
    """The command line before the file, and a table before it, too."""
    column = {"X": {"task": "xsum", "metric": "rougeL"}}
    one = {"name": "t", "title": "T", "columns": column}
    typed = {**BASE, "model": "org/typed", "chat_template": True}
    asked = _file(tmp_path, model="org/file", chat_template=False, tables=[one])
    (config, *_) = load(asked, config_from(None, typed)).configs
    assert (config.model, config.chat_template) == ("org/typed", True)
    near = {**one, "chat_template": False}
    (config, *_) = load(_file(tmp_path, chat_template=True, tables=[near]), config_from(None, BASE)).configs
    assert config.chat_template is False
    for name in ("max_gen_toks", "max_new_tokens"):
        short = {"X": {"task": "xsum", "metric": "rougeL", "gen_kwargs": {name: 50}}}
        asked = _file(tmp_path, max_new_tokens=1000, tables=[{**one, "columns": short}])
        (config, *_) = load(asked, config_from(None, BASE)).configs
        assert config.gen_kwargs == f"{name}=50"


def test_a_mean_over_the_same_documents_has_their_error(tmp_path):
    """A task under two numbers of examples, with the same answers: the mean is as uncertain as each."""
    store, values = Store(tmp_path), [{"acc": float(i % 2)} for i in range(100)]
    error = math.sqrt(0.25 / 99)
    cells = [
        answered("easy", values, "a", params={}, num_fewshot=n, metrics=[Metric("easy", "acc", 0.5, error, 100, True)])
        for n in (0, 5)
    ]
    columns = tuple(PaperColumn(f"{n} shots", ("easy",), "acc", asked={"num_fewshot": n}) for n in (0, 5))
    paper = Paper(store, {None: [store.save(c.key, c) for c in cells]}, {}, "x")
    _, numbers = paper.table(_layout(columns, (A,), mean=True))
    assert list(numbers["stderr"]) == pytest.approx([error] * 3)
