"""A model spread over two cards by accelerate: every part of a method's state lies where its layer is."""

import contextlib
import dataclasses

import pytest
import torch
from accelerate import dispatch_model
from transformers import AutoModelForCausalLM

from dart_eval.executors import jobs
from dart_eval.models import Resolved
from dart_eval.plan import config_from
from tests.cards import Cards, OnCard
from tests.conftest import run_local, save_tiny

METHODS = "dense,griffin,dart,dart-plus,dart-code,wanda-sp,random,magnitude"


def spread(model):
    """Layers in turn on one card and the other; the rest on the first."""
    places = {}
    for name, module in model.named_modules():
        above = name.rpartition(".")[0]
        if above in places or any(name.startswith(f"{place}.") for place in places):
            continue
        last = name.rpartition(".")[2]
        if last.isdigit():
            places[name] = f"lazy:{int(last) % 2}"
        elif not list(module.children()):
            places[name] = "lazy:0"
    return dispatch_model(model, places)


class _Watch(jobs.Silent):
    def __init__(self):
        self.errors = []

    def failed(self, cell, error, where):
        self.errors.append(f"{cell.name}: {error}")
        self.where = where


def _load(self):
    from transformers import AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(self.source, attn_implementation="eager")
    return model.eval(), AutoTokenizer.from_pretrained(self.source)


@pytest.mark.parametrize("family", ["llama"])
def test_a_spread_model_has_the_numbers_of_one_that_is_not(tmp_path, tokenizer, monkeypatch, family):
    folder = save_tiny(tmp_path / "model", tokenizer)
    config = config_from(None, {
        "model": str(folder), "tasks": "smoke", "method": METHODS, "sparsity": "0.5", "limit": 4, "device": "cpu",
        "output": str(tmp_path / "one"),
    })  # fmt: skip
    monkeypatch.setattr(Resolved, "load", _load)
    wanted = run_local(config, jobs.Silent())

    def load(self):
        model, tokenizer = _load(self)
        return spread(model), tokenizer

    monkeypatch.setattr(Resolved, "load", load)
    monkeypatch.setattr(torch, "autocast", lambda **_: contextlib.nullcontext())  # knows no card but CUDA's
    with Cards():
        found = run_local(dataclasses.replace(config, output=str(tmp_path / "two")), view := _Watch())
    assert not found.failed, view.errors
    for a, b in zip(found.records, wanted.records, strict=True):
        assert a.metrics == b.metrics
        assert a.samples == b.samples
