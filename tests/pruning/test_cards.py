"""A model spread over two cards by accelerate: every part of a method's state lies where its layer is."""

import contextlib
import dataclasses

import pytest
import torch
from accelerate import dispatch_model
from transformers import AutoModelForCausalLM

from dart_eval.layers import projection
from dart_eval.models.loading import ModelSpec, Resolved, resolve
from dart_eval.sweep import run as sweep_run
from dart_eval.sweep.events import silent
from dart_eval.sweep.options import config_from
from dart_eval.util.errors import UserError
from tests.helpers.cards import Cards, OnCard
from tests.helpers.commands import Watch
from tests.helpers.matrices import product
from tests.helpers.models import random_tokens, tiny
from tests.helpers.sessions import RESTLESS, decoded, open_session

CELLS = (
    {"tasks": "smoke_questions", "limit": 1, "method": "dense,dart,wanda-sp"},
    {"tasks": "smoke_summary", "limit": 1, "method": "dense,griffin", "gen_kwargs": "max_gen_toks=4"},
    {"tasks": "smoke_questions", "limit": 2, "method": "griffin", "num_fewshot": 2},  # all have a prefix in common
)
# What differs in where its tensors are made. The tensors of these cards do not take other data (`rounding`'s weights).
SETTINGS = [
    ("griffin", {}, False), ("dart", RESTLESS, False), ("dart", RESTLESS, True), ("griffin", {"draw": "sample"}, False),
    ("dart-code", {**RESTLESS, "remask.dense_tokens": 1}, False), ("cats", {"choice.threshold": "calibrated"}, False),
    ("m-countdown", {}, False), ("teal", {}, False), ("wina", {"entries.weigh": "all"}, False),
    ("noise", {}, False), ("larosa", {}, False), ("rsparse", {}, False),
    ("grinqh", {}, False), ("graded-both", {"entries.neurons": 0.4}, False),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _cards_hold_plain_numbers(monkeypatch):
    monkeypatch.setattr(projection, "PLAIN", (*projection.PLAIN, OnCard))


def spread(model):
    """Layers in turn on the second card and the first, the last one on the second; all else on the first."""
    places = {}
    for name, module in model.named_modules():
        above = name.rpartition(".")[0]
        if above in places or any(name.startswith(f"{place}.") for place in places):
            continue
        last = name.rpartition(".")[2]
        if last.isdigit():
            places[name] = f"lazy:{(int(last) + 1) % 2}"
        elif not list(module.children()):
            places[name] = "lazy:0"
    return dispatch_model(model, places)


def _rounded(value):
    """Batches on a card are others than on a CPU: the last digits are, too."""
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return pytest.approx(value, rel=1e-5, abs=1e-4) if isinstance(value, float) else value


def _load(self, note=print):
    from transformers import AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(self.source, attn_implementation="eager")
    return model.eval(), AutoTokenizer.from_pretrained(self.source)


@pytest.mark.slow
def test_a_spread_models_records_are_those_of_one_that_is_not(tmp_path, saved_llama, monkeypatch):
    def run(output, view):
        given = {"model": saved_llama, "device": "cpu", "output": str(tmp_path / output)}
        return sweep_run.begin_sweep([config_from(None, given | cells) for cells in CELLS], view).run_here()

    def load(self, note=print):
        model, tokenizer = _load(self)
        return spread(model), tokenizer

    monkeypatch.setattr(Resolved, "load", _load)
    wanted = run("one", silent)
    monkeypatch.setattr(Resolved, "load", load)
    monkeypatch.setattr(torch, "autocast", lambda **_: contextlib.nullcontext())  # knows no cards but real ones
    view = Watch()
    with Cards():
        found = run("two", view)
    assert not found.failed, view.broken
    assert len(found.records) == len(wanted.records) == 3 + 2 + 1
    for a, b in zip(found.records, wanted.records, strict=True):
        assert _rounded([dataclasses.asdict(m) for m in a.metrics]) == _rounded(
            [dataclasses.asdict(m) for m in b.metrics]
        )
        for side in (a, b):  # a KL at the edge of a bin
            for sample in side.samples:
                sample.pop("kl_bins", None)
        assert _rounded(a.samples) == _rounded(b.samples)


@pytest.mark.parametrize(
    ("family", "method", "params", "shared"), product(["llama", "gpt2", "opt"], SETTINGS, every=len(SETTINGS))
)
@pytest.mark.slow
def test_a_spread_model_decodes_as_one_that_is_not(family, method, params, shared):
    prompts = [random_tokens(20, seed) for seed in (3, 4)]
    found = []
    for cards in (contextlib.nullcontext(), Cards()):
        model = tiny(family, attention="eager")
        with cards:
            if found:
                model = spread(model)
                assert {str(p.device) for p in model.parameters()} == {"lazy:0", "lazy:1"}
            start = model.get_input_embeddings().weight.device
            with open_session(model, method, 0.5, execution="masked", shared_mask=shared, **params) as session:
                logits, events, share = decoded(model, session, torch.tensor(prompts, device=start), steps=4)
            found.append((logits.cpu(), [e["token"] for e in events], share))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]
    assert bool(found[0][1]) == any(name.startswith("remask") for name in params)  # masks did change


def test_what_cards_would_refuse_is_refused():
    with Cards():
        a, b = torch.ones(3).to("lazy:0"), torch.ones(3).to("lazy:1")
        for wrong in (lambda: a + b, lambda: a * torch.ones(3), lambda: a[b.long()], lambda: torch.cat([a, b])):
            with pytest.raises(RuntimeError, match="expected all tensors on the same device"):
                wrong()
        assert (a + torch.tensor(1.0)).tolist() == [2, 2, 2] and a[torch.tensor([0])].device == a.device
        b.copy_(a * 2)
        assert b.tolist() == [2, 2, 2] and str((b + 1).device) == "lazy:1" and b.to("cpu").device.type == "cpu"


def test_a_model_that_does_not_fit_is_refused(saved_llama):
    """Where accelerate leaves layers on the disk their weights are nowhere until they run."""
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "cpu", "model.layers.2": "disk"}
    with pytest.raises(UserError, match="the model does not fit"):
        resolve(ModelSpec(saved_llama, device_map=places)).load()
    model, _ = resolve(ModelSpec(saved_llama, device_map="auto")).load()
    assert {p.device.type for p in model.parameters()} <= {"cpu", "cuda"}
