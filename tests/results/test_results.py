"""Records, the rows of them as data, the inputs of cells, and the standard error of perplexities."""

import csv
import dataclasses
import io
import json
import math

import numpy as np
import pytest
from transformers import LlamaConfig

# The formula alone, held against its derivation: a model's perplexities are no round numbers.
from dart_eval.evaluation.evaluate import _stderr
from dart_eval.models.loading import Identity, ModelSpec, Resolved
from dart_eval.results import inputs, metrics
from dart_eval.results.record import SCHEMA, Metric, Record
from dart_eval.sweep.options import RunConfig
from dart_eval.sweep.plan import plan
from tests.helpers.records import answered, record, render, right, rows, sealed, tables


def test_a_record_survives_json_without_its_samples_and_with_keys_of_a_later_version():
    made = record(params={"window": 8, "detect": True})
    assert "samples" not in made.to_json()
    for data in (made.to_json(), sealed({**made.to_json(), "extra": 1})):
        assert Record.from_json(json.dumps(data)) == dataclasses.replace(made, samples=[])


DATA = record().to_json()


@pytest.mark.parametrize(("data", "words"), [
    *(({**DATA, "schema": schema}, f"schema {schema} is not known") for schema in (SCHEMA + 1, "1", None, 0)),
    *((sealed({k: v for k, v in DATA.items() if k != name}), f"record.{name}")
      for name in ("metrics", "inputs", "effective_sparsity")),
    *(({**DATA, name: value}, "digest")
      for name, value in (("mask_sparsity", 0.51), ("tokens", 1235), ("key", "k2"), ("extra", 1))),
])  # fmt: skip
def test_a_record_of_another_schema_without_a_field_or_edited_is_refused(data, words):
    with pytest.raises(ValueError, match=words):
        Record.from_json(json.dumps(data))


def test_json_and_csv_have_one_row_per_metric_in_one_order():
    records = [record(key="k1"), record("dense", 0.0, key="k2"), record(params={"window": 8}, sparsity=0.7, key="k3")]
    assert rows(records) == rows(records[::-1])
    assert [r["sparsity"] for r in rows(records)] == [0.0, 0.5, 0.7] * 2
    expected = {
        "effective_sparsity": 0.4321, "method": "dart", "metric": "acc", "model": "tiny", "n": 400,
        "params": {"window": 8}, "scope": "scored", "sparsity": 0.7, "stderr": 0.0123, "task": "arc_easy",
        "value": 0.6251, "weights_read": 0.4996,
    }  # fmt: skip
    for data in (json.loads(render(records, "json")), list(csv.DictReader(io.StringIO(render(records, "csv"))))):
        (row,) = (r for r in data if r["key"] == "k3" and r["metric"] == "acc")
        texts = isinstance(row["n"], str)
        assert len(data) == 6
        assert {k: type(v)(json.loads(row[k]) if texts and k == "params" else row[k]) for k, v in expected.items()} == (
            expected
        )
        assert {r["stderr"] for r in data if r["metric"] == "acc_norm"} == {"" if texts else None}


def test_no_form_shows_members_of_a_group_unless_asked_for_and_json_has_no_nan():
    metrics = [Metric("mmlu", "acc", 0.3, 0.01, 200, True), Metric("mmlu_law", "acc", 0.2, 0.02, 100, True, "mmlu")]
    made = [record(metrics=metrics)]
    for form in ("md", "csv", "json"):
        assert "mmlu_law" not in render(made, form)
        assert "mmlu_law" in render(made, form, subtasks=True)
    text = render([record(metrics=[Metric("t", "acc", math.nan, math.inf, 3, True)])], "json")
    assert json.loads(text, parse_constant=pytest.fail)[0]["value"] is None


def test_costs_are_shown_with_all_that_the_method_adds():
    costs = tables([record()])[-1]
    shown = dict(zip(costs.columns, costs.body[0], strict=True))
    assert {name: shown[name] for name in ("prefill", "decode", "/ dense", "memory", "state", "peak", "tokens/s")} == {
        "prefill": "4.0 M", "decode": "150 k", "/ dense": f"{(150_000 + 12.5) / 200_000:.3f}", "memory": "3.0 kB",
        "state": "512 B", "peak": "3.1 MB", "tokens/s": f"{1234 / 1.5:.1f}",
    }  # fmt: skip


def perplexity(ll, weight):
    return np.exp(-ll / weight)


def bits(ll, weight):
    return -ll / weight / math.log(2)


@pytest.mark.parametrize(("metric", "value"), [
    ("word_perplexity", perplexity), ("byte_perplexity", perplexity), ("bits_per_byte", bits),
])  # fmt: skip
def test_the_standard_error_of_a_perplexity_agrees_with_jackknife_and_bootstrap(metric, value):
    """Of documents whose length and difficulty vary."""
    n, generator = 300, np.random.default_rng(1)
    weight = generator.integers(50, 1500, n).astype(float)
    ll = -weight * generator.gamma(9, 0.35, n)
    left_out = value(ll.sum() - ll, weight.sum() - weight)
    jackknife = np.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum())
    drawn = np.random.default_rng(1).integers(0, n, (4000, n))
    bootstrap = value(ll[drawn].sum(1), weight[drawn].sum(1)).std(ddof=1)
    ours = _stderr(metric, list(zip(ll.tolist(), weight.tolist(), strict=True)))
    assert ours == pytest.approx(jackknife, rel=0.1)
    assert ours == pytest.approx(bootstrap, rel=0.1)


@pytest.mark.parametrize(("samples", "error"), [
    ([(-20.0, 10.0), (-40.0, 20.0)], pytest.approx(0)),  # documents of equal quality have no error
    ([], None), ([(-3.0, 2.0)], None), ([0.5, 1.0], None), ([(-3.0, 2.0), 1.0], None),  # nor what is no two pairs
    ([(-1e6, 1), (-2e6, 2)], None), ([(-1.0, 0), (-2.0, 0)], None),  # an error bar never stops a cell
])  # fmt: skip
def test_there_is_an_error_of_two_documents_that_are_pairs(samples, error):
    assert _stderr("word_perplexity", samples) == error


def test_every_input_of_a_planned_cell_has_a_role_and_no_role_is_of_none():
    model = Resolved(ModelSpec(), "", Identity("tiny", None, "f00d"), "float32", config=LlamaConfig())
    said = {
        "chat_template": True, "fewshot_as_multiturn": True, "system_instruction": "x", "gen_kwargs": "top_k=1",
        "enable_thinking": True, "think_end_token": "</think>", "tokenizer": "t", "attn_implementation": "eager",
        "add_bos_token": True,
    }  # fmt: skip
    (cell,) = plan(RunConfig(method=("flap",), tasks=("arc",), ffn_bits=("4",), **said), model, {"arc": "h"}, "cpu")
    of_a_data_set = {"calibration_tokens", "calibration_seed"}  # and of older cells
    assert set(cell.inputs) | of_a_data_set == set(inputs.FIELDS)


@pytest.mark.parametrize("name", inputs.FIELDS)
def test_cells_answer_one_question_unless_they_differ_in_what_was_asked(name):
    """A dense cell and a pruned one go together if they differ in how they prune, on one dtype and device."""
    here = answered("arc", right(0.5)).inputs
    there = json.loads(json.dumps(here))
    there[name] = {"name": "other"} if name == "model" else {"other": 1} if name in ("params", "versions") else "other"
    role = inputs.FIELDS[name].role
    assert (inputs.identity(here) == inputs.identity(there)) == (role != "asked")
    goes_together = name in inputs.UNLIKE_DENSE or (role != "asked" and name not in ("dtype", "device"))
    assert (inputs.question(here) == inputs.question(there)) == goes_together


def test_the_main_metric_of_a_task_is_the_one_of_the_lowest_rank_wherever_it_stands():
    made = [
        Metric("qa", "rougeL", 0.1, None, 9, True), Metric("qa", "exact_match,strict", 0.1, None, 9, True),
        Metric("text", "summary_words", 9.0, None, 9, None), Metric("text", "empty", 0.0, None, 9, False),
        Metric("arc", "acc_norm", 0.2, None, 9, True), Metric("arc", "acc", 0.1, None, 9, True),
        Metric("answers", "gold_ll", -3.0, None, 9, True),  # stands beside metrics, and is none by itself
    ]  # fmt: skip
    assert [(m.task, m.metric) for m in metrics.main(made)] == [
        ("qa", "exact_match,strict"), ("text", "empty"), ("arc", "acc"),
    ]  # fmt: skip


def test_a_field_that_older_versions_lacked_asks_nothing_new_at_what_they_did():
    old = {"mask": "prompt", "score.norm": "l2"}
    now = {**old, "draw": "best", "entries": "all", "compensation.over": "calibration"}
    model = {"name": "tiny"}
    before = inputs.identity({"model": model, "params": old})
    assert before == inputs.identity({"model": model, "params": now})
    assert before != inputs.identity({"model": model, "params": {**now, "draw": "sample"}})
