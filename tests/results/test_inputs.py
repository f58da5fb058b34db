"""The fields of a cell's inputs stand once, with their roles; what follows from roles follows from them."""

import json

import pytest
from transformers import LlamaConfig

from dart_eval.models.loading import Identity, ModelSpec, Resolved
from dart_eval.results import inputs, metrics
from dart_eval.results.record import Metric
from dart_eval.sweep.options import RunConfig
from dart_eval.sweep.plan import plan
from tests.helpers.records import answered, right


def test_every_input_of_a_planned_cell_has_a_role_and_no_role_is_of_none():
    model = Resolved(ModelSpec(), "", Identity("tiny", None, "f00d"), "float32", config=LlamaConfig())
    said = {
        "chat_template": True, "fewshot_as_multiturn": True, "system_instruction": "x", "gen_kwargs": "n=1",
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
