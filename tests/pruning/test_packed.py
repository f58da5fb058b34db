"""Rounded weights in a packed product: the same numbers, timed beside the model's own, which comes back."""

import json
from contextlib import nullcontext

import pytest
import torch
from transformers import LlamaConfig

from dart_eval.bench import decode
from dart_eval.bench.decode import packed_ffns
from dart_eval.bench.subject import COLUMNS, Subject
from dart_eval.layers.find import find_ffns
from dart_eval.pruning.registry import make
from dart_eval.results import speeds
from dart_eval.util.bits import parse
from dart_eval.util.errors import UserError
from dart_eval.weights.rounding import rounded_ffns, served_bits, served_share
from tests.helpers.commands import command
from tests.helpers.models import made, random_tokens, tiny
from tests.helpers.sessions import bits, same
from tests.matrix import types

WIDE = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def wide():
    return made(lambda: LlamaConfig(**WIDE), scale=1, dtype=torch.bfloat16)


def test_the_model_says_the_same_through_packed_products_and_is_itself_afterwards():
    model, tokens = wide(), torch.tensor([random_tokens(1)])
    before = model(tokens).logits
    with packed_ffns(model, parse("4:128")):
        inside = model(tokens).logits
    assert torch.equal(model(tokens).logits, before) and not torch.equal(inside, before)
    with rounded_ffns(model, "4:128"):
        torch.testing.assert_close(inside, model(tokens).logits, rtol=0.05, atol=0.1)
    refused = pytest.raises(UserError, match="the kernels read 4, 5, 6 or 8 bits")
    with refused, packed_ffns(tiny("llama"), parse("4:16")):
        pass


@pytest.mark.slow
def test_rounding_alone_is_timed_and_kept_for_its_own_row(tmp_path, tokenizer):
    model = wide()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    out = command(
        "bench", "decode", "--model", str(tmp_path / "model"), "--method", "griffin", "--ffn-bits", "4:128",
        "--steps", "2", "--rounds", "1", "--prompt", "8", "--format", "json", "--output", str(tmp_path / "out"),
    )  # fmt: skip
    griffin, dense, _ = json.loads(out.out)
    bits = 4 + 16 * (2 / 64 + 1 / 128) / 3  # a scale for each row
    assert (
        griffin["method"] == "griffin"
        and dense["bits"] == "4:128"
        and dense["weights_read"] == pytest.approx(bits / 16)
    )
    assert dense["speedup"] > 0 and dense["ceiling"] > 1 and dense["speedup_n"] == 2
    kept = speeds.load_speeds(tmp_path / "out")
    found = {(s.sparsity, s.ffn_bits): s for s in kept}
    alone, own, on_four = (found[key] for key in ((0.0, "4:128"), (0.7, None), (0.7, "4:128")))
    inputs = {"model": alone.model, "dtype": "bfloat16", "params": alone.params, "sparsity": 0.0}
    pruned = {**inputs, "params": own.params, "sparsity": 0.7}
    assert speeds.of_cell(kept, {**inputs, "ffn_bits": "4:128"}) is alone and speeds.of_cell(kept, inputs) is None
    assert speeds.of_cell(kept, pruned) is own and speeds.of_cell(kept, {**pruned, "ffn_bits": "4:128"}) is on_four


@pytest.mark.slow
def test_what_no_packed_product_takes_is_counted_on_rounded_weights(tmp_path, tokenizer):
    """4.5 and 3.5 bits of 16, and what a method reads of these."""
    wide().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = (
        "bench", "decode", "--model", str(tmp_path / "model"), "--method", "griffin", "--ffn-bits", "4,3",
        "--steps", "2", "--rounds", "1", "--prompt", "8", "--sparsity", "0.5", "--format", "json",
    )  # fmt: skip
    found = {(r["method"], r.get("bits")): r for r in json.loads(command(*words).out)}
    assert list(found) == [("griffin", None), ("dense", "4"), ("griffin", "4"), ("dense", "3"), ("griffin", "3")]
    for (method, few), row in found.items():
        if few:
            # A scale of down stands for 32 neurons: those of all neurons are read.
            own = int(few) + 0.5
            share = (own if method == "dense" else 0.5 * own + 0.5 * 0.5 / 3) / 16
            assert row["why"] and row["speedup"] is None
            assert row["weights_read"] == pytest.approx(share)
            ffn = 1 - 1 / found["dense", "4"]["ceiling"]  # saved at 4.5 of 16 bits
            assert 1 - 1 / row["ceiling"] == pytest.approx(ffn * (1 - row["weights_read"]) / (1 - 4.5 / 16))


@pytest.mark.slow
def test_methods_out_of_reach_on_rounded_weights_alone_are_left_out_there(tmp_path, tokenizer):
    wide().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = ("bench", "decode", "--model", str(tmp_path / "model"), "--steps", "2", "--rounds", "1", "--prompt", "8")
    done = command(*words, "--method", "decdec,rounding", "--ffn-bits", "2", "--sparsity", "0.6", "--format", "json")
    found = [(r["method"], r.get("bits")) for r in json.loads(done.out)]
    assert found == [("decdec", None), ("rounding", None), ("dense", "2")] and done.err.count("is left out") == 2


def test_what_cannot_be_rounded_is_refused_before_anything_is_timed(saved_llama, monkeypatch):
    monkeypatch.setattr(decode, "measure", lambda *given, **more: pytest.fail("timed"))
    words = ("bench", "decode", "--method", "griffin", "--ffn-bits", "4")
    checked = []
    monkeypatch.setattr("dart_eval.bench.subject.refuse_fixed", lambda ffns: checked.append(len(ffns)))
    with pytest.raises(pytest.fail.Exception, match="timed"):
        command(*words, "--model", saved_llama)
    assert checked == [3]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_its_own_again_after_methods_on_rounded_weights(monkeypatch, fails):
    model = wide()
    subject, before = Subject(model, None, {"name": "tiny"}, "bfloat16"), bits(model)
    if fails:
        stock = decode.prune
        monkeypatch.setattr(decode, "prune", lambda *a, **k: 1 / 0 if k["execution"] == "masked" else stock(*a, **k))
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        rows = subject.rows([make("griffin")], 0.25, decode.Setting(8, 2, 1), [parse("3")], print)
        assert [COLUMNS["method"](row) for row, _ in rows] == ["griffin", "dense on 3 bits", "griffin on 3 bits"]
    assert same(model, before) and served_share(find_ffns(model)) == 1


@pytest.mark.parametrize(("family", "spelled"), [("llama", "3"), ("gpt2", "4:row"), ("qwen3_moe", "8:row")])
def test_what_is_read_of_rounded_weights_counts_every_row(family, spelled):
    """Rows of down have another width than those of gate and up: as the same weights count when they are in place."""
    model = types.tiny(family) if family == "qwen3_moe" else tiny(family)
    read = served_bits(find_ffns(model), parse(spelled)) / 16
    with rounded_ffns(model, spelled):
        assert read == pytest.approx(served_share(find_ffns(model)), rel=1e-12)
