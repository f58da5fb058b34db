"""Plain weights that bitsandbytes quantises while they are loaded: `load_in`."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from dart_eval.layers.find import describe, find_ffns
from dart_eval.models.loading import ModelSpec, resolve
from dart_eval.sweep.options import config_from
from dart_eval.util.errors import UserError
from dart_eval.weights.rounding import served_bits
from tests.helpers.commands import Watch, run_local
from tests.helpers.models import VOCAB, random_tokens

pytest.importorskip("bitsandbytes", reason="bitsandbytes, which quantises, is not installed")
IDS = torch.tensor([random_tokens(9)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A model whose rows are 64 weights wide: the library's kernel for CPUs takes no fewer."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model, path = AutoModelForCausalLM.from_config(config), tmp_path_factory.mktemp("models") / "wide"
    model.to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_is_what_transformers_makes_of_it_with_the_bits_that_it_stores(folder, bits):
    resolved = resolve(ModelSpec(folder, load_in=f"{bits}bit"))
    model, _ = resolved.load()
    how = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=model.dtype)
    assert torch.equal(model(input_ids=IDS).logits, theirs(input_ids=IDS).logits)
    ffns = find_ffns(model)
    assert served_bits(ffns) == (4.5 if bits == 4 else 8)  # 64 weights of 4 bits have a scale
    assert len(describe(resolved.outline())) == len(ffns)
    plain, (name, digest) = (
        resolve(ModelSpec(folder)).identity,
        (resolved.identity.name, resolved.identity.weights),
    )
    assert name == f"{plain.name}+{bits}bit" and digest != plain.weights


def test_a_run_takes_it_and_reads_the_stored_bytes(folder, tmp_path):
    given = {"model_args": f"pretrained={folder},load_in=4bit", "limit": 1}
    given |= {"method": "dense,griffin", "tasks": "smoke_questions", "output": str(tmp_path / "out"), "device": "cpu"}
    dense, griffin = run_local(config_from(None, given), Watch()).records
    assert dense.inputs["model"]["name"] == "wide+4bit" and "--load-in 4bit" in dense.settings["command"]
    assert dense.weights_read == pytest.approx(4.5 / 16)
    assert griffin.weights_read == pytest.approx(4.5 / 16 / 2, rel=0.05)


def test_what_cannot_be_quantised_is_refused(folder, tmp_path):
    few = shutil.copytree(folder, tmp_path / "few")
    AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    ).save_pretrained(few)
    with pytest.raises(UserError, match="model few has quantised weights and --load-in 4bit; leave one of them out"):
        resolve(ModelSpec(str(few), load_in="4bit"))
