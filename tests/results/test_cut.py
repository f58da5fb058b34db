"""Prompts that do not fit into the context are counted per task, and recorded."""

import dataclasses
import json

import pytest
from transformers import LlamaForCausalLM, LlamaModel

from dart_eval.results.record import Record
from dart_eval.results.store import Store
from dart_eval.sweep.events import silent
from dart_eval.sweep.options import config_from
from tests.helpers.commands import run_local
from tests.helpers.records import record, rows, sealed

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


@pytest.mark.parametrize("said", [12, None])
def test_the_number_of_cut_prompts_is_data_and_older_records_lack_it(said):
    data = json.loads(json.dumps(dataclasses.replace(record(), cut=12).to_json()))
    if said is None:
        del data["cut"]
    read = Record.from_json(json.dumps(sealed(data)))
    assert read.cut == said and {r["cut"] for r in rows([read])} == {said}
