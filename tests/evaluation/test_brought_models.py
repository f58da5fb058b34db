"""Models that somebody brings: what they are in a key, and what is said of files that do not fit."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from dart_eval.evaluation.lm import PrunedLM
from dart_eval.models import adapters
from dart_eval.models.loading import ModelSpec, resolve
from dart_eval.pruning.session import Session
from dart_eval.util.errors import UserError
from tests.helpers.models import tiny
from tests.helpers.requests import TextRequest


@pytest.fixture
def folder(saved_llama, tmp_path):
    """A copy of a model that loads, to be spoilt."""
    return Path(shutil.copytree(saved_llama, tmp_path / "model"))


def _spec(model, **more):
    return ModelSpec(str(model), device="cpu", **more)


def _configure(folder, **changes):
    file = folder / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def test_quantised_weights_without_a_word_in_the_configuration_are_refused(folder):
    """ModelOpt writes that into hf_quant_config.json: transformers would take the codes for weights."""
    weights = load_file(folder / "model.safetensors")
    for key in [k for k in weights if "_proj" in k]:
        scale = weights[key].abs().max() / 448
        weights[key] = (weights[key] / scale).to(torch.float8_e4m3fn)
        weights[f"{key}_scale"] = scale.reshape(1)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model model has quantised weights.*21 scales \(model\.layers\.0\.mlp\.down"):
        resolve(_spec(folder)).load()


@pytest.mark.parametrize("name", adapters.WEIGHTS)
def test_an_adapter_beside_a_configuration_without_weights_is_no_model(folder, name):
    """Axolotl leaves the base model's config.json there."""
    (folder / "model.safetensors").rename(folder / name)
    (folder / adapters.CONFIG).write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(UserError, match=r"is an adapter .*; give its base model, and --peft "):
        resolve(_spec(folder))


@pytest.mark.parametrize("index", ['{"metadata": {', '{"metadata": {}}'])
def test_a_damaged_index_is_one_line_where_the_dtype_is_wanted(folder, index):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    _configure(folder, dtype=...)
    with pytest.raises(UserError, match="names no dtype, and has no safetensors file that says one; give --dtype"):
        resolve(_spec(folder))


def test_a_quantised_checkpoint_that_is_cut_off_is_one_line(folder):
    weights = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    kind = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}
    _configure(folder, quantization_config=kind | {"ignore": ["lm_head"], "quantization_status": "compressed"})
    os.truncate(folder / "model.safetensors", 20_000)
    with pytest.raises(UserError, match="model 'model' cannot be loaded"):
        resolve(_spec(folder)).load()


def test_a_revision_of_a_folder_is_refused(folder):
    assert resolve(_spec(folder, revision="main")).identity.revision is None  # lm-eval's default
    with pytest.raises(UserError, match=r"--revision step1000 is of a model on the hub, and .* is on this machine"):
        resolve(_spec(folder, revision="step1000"))


@pytest.mark.parametrize("option", ["tokenizer", "peft"])
def test_a_file_in_place_of_a_folder_is_named(folder, option):
    with pytest.raises(UserError, match=rf"--{option} .*tokenizer\.json is not a folder; give a folder"):
        resolve(_spec(folder, **{option: str(folder / "tokenizer.json")}))


def test_the_words_of_a_tokenizer_in_a_file_of_tiktoken_belong_to_the_key(folder):
    found = []
    for text in ("IQ== 0\n", "Ig== 0\n"):
        (folder / "qwen.tiktoken").write_text(text)
        found.append(resolve(_spec(folder)).identity.weights)
    assert found[0] != found[1]


def test_an_adapter_in_the_working_directory_has_a_name(folder, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    peft.get_peft_model(tiny("llama", dtype=torch.float32), config).save_pretrained(tmp_path / "lora")
    monkeypatch.chdir(tmp_path / "lora")
    assert resolve(_spec(folder, peft=".")).identity.name == "model+lora"


def test_a_special_token_beyond_the_embeddings_is_named_where_a_prompt_has_it(folder):
    """A chat's tokens that were added without `resize_token_embeddings`."""
    larger = PreTrainedTokenizerFast.from_pretrained(folder)
    larger.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    lm = PrunedLM(tiny("llama"), larger)
    lm.begin(Session(), {})
    with pytest.raises(UserError, match=r"a prompt has the token '<\|im_start\|>' with id 96, and the model 96 embed"):
        lm.generate_until([TextRequest("<|im_start|> w4", 0)])
