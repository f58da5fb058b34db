"""Rounded weights in torch's packed products: the same numbers, timed beside the model's own, which comes back."""

import json

import pytest
import torch
from transformers import LlamaConfig

from dart_eval.bench import kept, packed
from dart_eval.bits import parse
from dart_eval.errors import UserError
from dart_eval.rounding import rounded, rounded_ffns
from tests.helpers.commands import command
from tests.helpers.models import made, random_tokens, tiny

WIDE = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def wide():
    return made(lambda: LlamaConfig(**WIDE), scale=1, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", ["4", "4:64", "8:row"])
def test_a_packed_product_is_that_of_the_rounded_weights(bits, dtype):
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(48, 128, generator=generator), torch.randn(48, generator=generator)
    held = rounded(weight, parse(bits))
    x = torch.randn(2, 3, 128, generator=generator)
    expected = x @ held.values.T + bias
    found = packed.product(held, bias.to(dtype), dtype)(x.to(dtype)).float()
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0.3 if dtype == torch.bfloat16 else 0.02)


@pytest.mark.parametrize("bits", ["3", "8", "4:row", "4:16"])
def test_bits_that_torch_cannot_multiply_are_refused(bits):
    with pytest.raises(UserError, match="has no packed product for"):
        packed.product(rounded(torch.randn(4, 64), parse(bits)), None, torch.bfloat16)


def test_the_model_says_the_same_through_packed_products_and_is_itself_afterwards():
    model, tokens = wide(), torch.tensor([random_tokens(12)])
    before = model(tokens).logits
    with packed.packed_ffns(model, parse("4")):
        inside = model(tokens).logits
    assert torch.equal(model(tokens).logits, before) and not torch.equal(inside, before)
    with rounded_ffns(model, 4):
        torch.testing.assert_close(inside, model(tokens).logits, rtol=0.05, atol=0.1)
    with pytest.raises(UserError, match="has no packed product"), packed.packed_ffns(tiny("llama"), parse("4:16")):
        pass


def test_rounding_alone_is_timed_and_kept_for_its_own_row(tmp_path, tokenizer):
    model = wide()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    out = command(
        "bench", "decode", "--model", str(tmp_path / "model"), "--method", "griffin", "--ffn-bits", "4", "--steps", "2",
        "--rounds", "1", "--prompt", "8", "--format", "json", "--output", str(tmp_path / "out"),
    )  # fmt: skip
    griffin, dense = json.loads(out.out)
    assert griffin["method"] == "griffin" and dense["bits"] == "4" and dense["read"] == pytest.approx(4.5 / 16)
    assert dense["speedup"] > 0 and dense["ceiling"] > 1 and dense["speedup_n"] == 2
    speeds = {s.method: s for s in kept.read(tmp_path / "out")}
    inputs = {
        "model": dict(speeds["dense"].model),
        "dtype": "bfloat16",
        "params": speeds["dense"].params,
        "sparsity": 0.0,
    }
    assert speeds["dense"].is_of({**inputs, "ffn_bits": "4"}) and not speeds["dense"].is_of(inputs)
    assert not speeds["griffin"].is_of({**inputs, "params": speeds["griffin"].params, "sparsity": 0.7, "ffn_bits": "4"})
