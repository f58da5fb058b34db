"""Prompts that do not fit into the context are counted per task, recorded, and said."""

import dataclasses
import json

import pytest
from transformers import LlamaForCausalLM, LlamaModel

from dart_eval.cli.view import TerminalView
from dart_eval.results.record import Record
from dart_eval.results.report.build import build
from dart_eval.results.store import Store
from dart_eval.sweep.events import Event, silent
from dart_eval.sweep.options import config_from
from tests.helpers.commands import run_local
from tests.helpers.records import record, render, rows, sealed

NEW = 48  # tokens of a summary at most
LENGTHS = {"smoke_questions": 14, "smoke_summary": 350 + NEW}  # of the six prompts some fit
# What the model is asked once a batch at least
STEP = {"smoke_questions": (LlamaModel, "forward"), "smoke_summary": (LlamaForCausalLM, "generate")}


def _config(folder, output, task, **changes):
    options = {"method": "dense,griffin", "sparsity": "0.5", "limit": 6, "batch_size": 2, "max_length": LENGTHS[task]}
    return config_from(None, {"model": folder, "output": str(output), "tasks": task, **options, **changes})


def _too_long(store, record, tokenizer, length):
    """How many prompts do not fit, by their texts."""

    def tokens(text):
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    texts = store.texts(record).values()
    if record.inputs["task"] == "smoke_summary":
        return sum(tokens(t["prompt"]) > length - NEW for t in texts)
    return sum(tokens(t["prompt"]) + max(tokens(c) for c in t["choices"]) > length + 1 for t in texts)


@pytest.mark.slow
@pytest.mark.parametrize("task", LENGTHS)
def test_cut_prompts_are_counted_also_where_a_run_goes_on(saved_llama, tmp_path, monkeypatch, tokenizer, task):
    whole = run_local(_config(saved_llama, tmp_path / "whole", task), silent).records
    expected = _too_long(Store(tmp_path / "whole"), whole[0], tokenizer, LENGTHS[task])
    assert 0 < expected < 6
    for r in whole:
        assert r.cut == r.by_task[task]["cut"] == expected
        assert (r.by_task[task]["documents"], r.by_task[task]["length"]) == (6, LENGTHS[task])
    stock, output = getattr(*STEP[task]), tmp_path / "again"

    def stops(self, *args, **kwargs):
        if any(p.stat().st_size for p in output.glob("partial/*")):  # something is answered
            raise KeyboardInterrupt
        return stock(self, *args, **kwargs)

    config = _config(saved_llama, output, task)
    monkeypatch.setattr(*STEP[task], stops)
    with pytest.raises(KeyboardInterrupt):
        run_local(config, silent)
    monkeypatch.undo()
    again = run_local(config, silent).records
    assert [r.by_task for r in again] == [r.by_task for r in whole]


def test_where_every_prompt_fits_none_is_counted(saved_llama, tmp_path):
    config = _config(saved_llama, tmp_path, "smoke_questions", max_length=200, method="dense")
    (made,) = run_local(config, silent).records
    assert (made.cut, made.by_task["smoke_questions"]["cut"]) == (0, 0)
    assert "cut to fit" not in render([made], "md")


def _cut(cut=12, task="arc_easy", key="k1"):
    made = record(key=key)
    made.inputs["task"] = task
    parts = {"arc_easy": {"documents": 100, "cut": cut, "length": 512}}
    return dataclasses.replace(made, cut=cut, by_task=parts)


def test_it_is_said_under_the_tables_and_kept_as_data(tmp_path):
    text = render([_cut(), _cut(key="k2")], "md")
    quality = text.split("### FLOPs")[0]
    assert quality.count("12 of 100 prompts of arc_easy were cut to fit with the answer into 512 tokens.") == 1
    assert r"1 of 100 prompts of arc\_easy was cut" in render([_cut(1)], "tex")
    assert {r["cut"] for r in rows([_cut()])} == {12}
    Store(tmp_path).save("cell", _cut())
    assert "12 of 100 prompts of arc_easy were cut" in build(Store(tmp_path))


def test_members_of_a_group_are_counted_together_and_each_alone():
    made = _cut(task="mmlu")
    made.by_task["law"] = {"documents": 50, "cut": 3, "length": 512}
    assert "15 of 150 prompts of mmlu were cut" in render([made], "md")


def test_the_line_of_a_cell_says_it(capsys):
    class Cell:
        key, title = "k", "arc_easy dart 0.5"

    view = TerminalView()
    view(Event("planned", of=1))
    view(Event("finished", cell=Cell, record=_cut()))
    assert "3 re-masks, 12 cut prompts  2 s" in capsys.readouterr().err


def test_a_record_that_did_not_count_them_says_nothing():
    older = json.loads(json.dumps(record().to_json()))
    del older["digest"], older["cut"]
    read = Record.from_json(json.dumps(sealed(older)))
    assert read.cut is None
    assert "cut to fit" not in render([read], "md")
    assert {r["cut"] for r in rows([read])} == {None}
