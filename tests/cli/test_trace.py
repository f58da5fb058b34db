"""`dart-eval trace` and `bench overhead`: the numbers that they write."""

import json

import pytest
import torch

from dart_eval.bench import shapes, tracing
from dart_eval.bench.overhead import measure
from dart_eval.cli.trace import draw
from dart_eval.layers.find import find_ffns
from dart_eval.layers.shape import shape_of
from dart_eval.pruning.registry import make, parse
from dart_eval.util.errors import UserError
from tests.helpers.commands import command
from tests.helpers.models import random_tokens, tiny
from tests.helpers.sessions import RESTLESS, cache_of


def words(count, seed=0):
    return " ".join(f"w{t}" for t in random_tokens(count, seed))


def traced(tokenizer, prompt, then=None, spec="dart", tokens=40, **params):
    model = tiny("llama").float()
    name, given = parse(spec)
    return model, tracing.trace(model, tokenizer, make(name, {**given, **params}), 0.5, prompt, then, tokens)


def test_a_given_text_is_fed_and_scored(tokenizer):
    model, found = traced(tokenizer, words(30), words(25, 1), **RESTLESS)
    assert found["prompt_tokens"] == 30
    assert found["tokens"] == words(25, 1).split()
    assert len(found["logprobs"]) == 25
    with torch.no_grad():  # the first comes from the dense prompt
        logits = model(torch.tensor([random_tokens(30)])).logits[0, -1].log_softmax(-1)
    assert found["logprobs"][0] == pytest.approx(float(logits[random_tokens(25, 1)[0]]), abs=1e-4)
    assert found["detector"]["alarms"] == [r["token"] for r in found["remasks"]] == list(range(3, 25, 3))
    assert sum(found["layers"]["kept"]) == 60
    assert all(len(r["overlap"]) == 3 for r in found["remasks"])


def test_what_is_read_is_of_pruned_tokens_whenever_the_text_ends(tokenizer):
    """After an alarm tokens run dense for a while; here one is raised by every window."""
    alarmed = {"remask.sigma": -1000.0, "remask.floor": -3.0, "remask.window": 3, "remask.dense_tokens": 6}
    found = [
        traced(tokenizer, words(30), words(25, 1), "dart-code", tokens, **alarmed)[1]["weights_read"]
        for tokens in (5, 8, 12, 16)
    ]
    assert found == pytest.approx([0.5] * 4, abs=0.01)


@pytest.mark.parametrize("tokens", [1, 2, 25])
def test_the_first_token_comes_from_the_dense_prompt(tokenizer, tokens):
    _, found = traced(tokenizer, words(20), words(25, 1), "griffin", tokens)
    assert len(found["tokens"]) == tokens
    assert found["effective_sparsity"] == pytest.approx(0.5 * (tokens - 1) / tokens)


def test_without_a_text_the_model_writes(tokenizer):
    model, found = traced(tokenizer, words(12), spec="griffin", tokens=5)
    assert len(found["tokens"]) == 5
    assert found["detector"] is None and found["remasks"] == []
    with torch.no_grad():
        out = model(torch.tensor([random_tokens(12)]), use_cache=True)
    assert found["tokens"][0] == tokenizer.decode([int(out.logits[0, -1].argmax())])
    assert cache_of(out) is not None


@pytest.mark.parametrize(("prompt", "spec", "params", "ending"), [
    (30, "griffin", {}, ".png"), (30, "dart", RESTLESS, ".svg"),
    (30, "dart", {"remask.act": False, "remask.window": 3}, ".png"), (5, "dart", {}, ".svg"),  # too short to detect
])  # fmt: skip
def test_pictures_of_every_kind(tokenizer, tmp_path, prompt, spec, params, ending):
    _, found = traced(tokenizer, words(prompt), words(25, 1), spec, **params)
    draw(found, tmp_path / f"a{ending}")
    assert (tmp_path / f"a{ending}").stat().st_size > 5000
    json.dumps(found, allow_nan=False)


def test_what_cannot_be_traced_is_refused(tokenizer):
    for spec, prompt, then, word in (
        ("random", words(9), None, "prompt"), ("oracle", words(9), None, "prompt"), ("dart", "w5", None, "two"),
        ("dart", words(9), "", "none"), ("dart", words(250), None, "256"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=word):
            traced(tokenizer, prompt, then, spec)


def test_the_command_writes_what_is_asked_for_and_the_table_can_be_used(saved_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompt.txt").write_text(words(40))
    common = ["trace", "--model", saved_llama, "--file", "prompt.txt", "--tokens", "12"]
    assert command(*common).code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["prompt.txt"]
    assert command(*common, "--output", "trace.json").code == 0
    found = json.loads((tmp_path / "trace.json").read_text())
    keep = [k / n for k, n in zip(*found["layers"].values(), strict=True)]
    (tmp_path / "layers.json").write_text(json.dumps({"keep": keep, "sizes": found["layers"]["sizes"]}))
    again = [*common, "--method", "dart:allocation=table:allocation.file=layers.json:remask=never"]
    assert command(*again, "--output", "again.json", "--plot", "again.svg").code == 0
    assert json.loads((tmp_path / "again.json").read_text())["layers"] == found["layers"]
    assert (tmp_path / "again.svg").exists()
    other = command(*again, "--sparsity", "0.7")  # the table is one of 0.5
    (tmp_path / "layers.json").write_text("{")
    for done in (other, command(*again)):
        assert done.code == 2 and "table" in done.err


# -- overhead ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_shape(monkeypatch):
    config = tiny("llama").config  # made here: a tiny model is made once, and where shapes are read it has no weights
    monkeypatch.setitem(shapes.SHAPES, "small", lambda: config)
    return "small"


@pytest.mark.parametrize("name", ["griffin", "dart", "dart-code"])
def test_overhead_is_that_of_the_real_state(small_shape, name):
    found = measure(make(name), small_shape, 0.5, prompts=(700, 1000))
    assert found.state_bytes[700] == found.state_bytes[1000] == sum(found.parts.values())
    neurons = 3 * 40
    assert found.parts["masks"] == neurons
    assert found.parts["scores"] == neurons * 4
    assert found.shared_bytes == 0
    # 24 inputs of each layer, which of them are real, and where the next one goes
    assert found.parts["recent inputs"] == (3 * 24 * 32 * 2 + 24 + 8 if name == "dart" else 0)
    assert (found.remask_tokens > 0) == (name != "griffin")
    if name == "dart-code":  # 30 dense tokens, each for what a pruned one saves
        model = tiny("llama")
        sizes = shape_of(model, find_ffns(model))
        saved = 1 - sizes.decode(1025, 0.5) / sizes.decode(1025)
        scoring = (30 * 5 + 3) * neurons / sizes.decode(1025)
        assert found.remask_tokens == pytest.approx(30 * saved + scoring)
    reads = {"dart": 2 / 3, "dart-code": 30 * 0.5}
    assert found.remask_read == pytest.approx(reads.get(name, 0))


@pytest.mark.parametrize("name", ["dart", "dart-code"])
def test_the_claim_of_ten_megabytes_and_a_thousandth_of_the_flops(name):
    """The paper's: under 10 MB whatever the prompt's length, overhead under 0.1 % of a dense token's FLOPs."""
    found = measure(make(name), "llama-3.1-8b", 0.7, prompts=(64, 704))
    assert max(found.state_bytes.values()) < 10**7
    assert found.decode_share < 0.001
    assert found.scoring_share < 0.001
