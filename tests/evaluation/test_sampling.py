"""Where the shape of a batch shows: it is part of the key, and random numbers do not depend on what ran before."""

import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import DbrxConfig, LlamaConfig, MixtralConfig

from dart_eval.evaluation import tasks
from dart_eval.evaluation.lm import PrunedLM
from dart_eval.models.loading import Identity, ModelSpec, Resolved
from dart_eval.pruning.session import Session
from dart_eval.results.store import Journal
from dart_eval.sweep.options import RunConfig
from dart_eval.sweep.plan import plan
from tests.helpers.models import random_tokens, tiny

KWARGS = {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0}


def requests(count=5, kwargs=KWARGS, repeats=1):
    made = []
    for i in range(count):
        text = " ".join(f"w{t}" for t in random_tokens(5 + i, seed=i))
        made += [Instance("generate_until", {}, (text, dict(kwargs)), 0, metadata=("t", i, repeats))] * repeats
    return made


def answers(tokenizer, asked, batch_size=2, journal=None):
    torch.manual_seed(7)
    lm = PrunedLM(tiny("llama").float(), tokenizer, batch_size, max_length=64)
    lm.begin(Session(), {}, journal)
    return lm.generate_until(asked)


def keys(batch_size, dtype="float32", method="cats", drawn=(), settings=None):
    config = RunConfig(method=(method,), batch_size=batch_size)
    model = Resolved(ModelSpec(), "", Identity("m", None, "w"), dtype, config=settings or LlamaConfig())
    return [cell.key for cell in plan(config, model, {"t": "h"}, "cpu", drawn)]


@pytest.mark.parametrize(
    ("method", "dtype", "drawn", "moves"),
    [
        ("cats", "float32", (), True), ("dart", "float32", (), False), ("dense", "float32", (), False),
        ("dense", "float32", ("t",), True), ("dart", "float32", ("other",), False), ("dart", "bfloat16", (), True),
        ("teal", "float32", (), True), ("wina", "float32", (), True),
        ("rounding", "float32", (), False),
    ],
)  # fmt: skip
def test_the_batch_size_is_part_of_the_key_where_it_moves_numbers(method, dtype, drawn, moves):
    assert (keys(1, dtype, method, drawn) != keys(8, dtype, method, drawn)) == moves


@pytest.mark.parametrize(("settings", "moves"), [(LlamaConfig(), False), (MixtralConfig(), True), (DbrxConfig(), True)])
def test_so_it_is_where_a_router_chooses_experts(settings, moves):
    assert (keys(1, method="dense", settings=settings) != keys(8, method="dense", settings=settings)) == moves


@pytest.mark.parametrize(
    ("kwargs", "drawn"),
    [
        ({"do_sample": True, "temperature": 0.7}, True), ({"temperature": 0.7}, True), ({"do_sample": False}, False),
        ({}, False), ({"temperature": 0.0, "until": ["x"]}, False),
    ],
)  # fmt: skip
def test_what_draws(kwargs, drawn):
    assert tasks.draws(kwargs) == drawn


def test_a_stopped_run_draws_what_a_whole_one_does(tokenizer, tmp_path):
    whole = Journal(tmp_path / "whole.jsonl")
    texts = answers(tokenizer, requests(), journal=whole)
    assert texts == answers(tokenizer, requests())
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "part.jsonl").write_text("".join(lines[:2]))
    part = Journal(tmp_path / "part.jsonl")
    assert 0 < len(part) < 5
    assert answers(tokenizer, requests(), journal=part) == texts
    assert answers(tokenizer, requests(), batch_size=5) != texts  # other prompts share the batch


def test_draws_of_one_prompt_differ(tokenizer):
    texts = answers(tokenizer, requests(2, repeats=4), batch_size=8)
    assert len(set(texts[:4])) > 1 and len(set(texts[4:])) > 1
    greedy = answers(tokenizer, requests(2, {**KWARGS, "do_sample": False, "temperature": 0.0}, repeats=3))
    assert len(set(greedy[:3])) == 1
