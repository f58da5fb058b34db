"""Models that somebody brings: what they are in a key, and what is said of files that do not fit."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, PreTrainedTokenizerFast

from dart_eval.evaluation.lm import PrunedLM
from dart_eval.models import adapters
from dart_eval.models.loaded import loaded
from dart_eval.models.loading import ModelSpec, resolve
from dart_eval.pruning.session import Session
from dart_eval.util.errors import UserError
from tests.helpers.models import SMALL, VOCAB, made, tiny
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


def test_another_activation_in_memory_is_another_model(tokenizer):
    """Old answers of the same weights under SiLU would be given back for ReLU."""
    found = []
    for act in (None, nn.ReLU(), nn.LeakyReLU(0.1), nn.LeakyReLU(0.2)):
        model = tiny("llama", dtype=torch.float32)
        for layer in model.model.layers if act is not None else ():
            layer.mlp.act_fn = act
        found.append(loaded(model, tokenizer).identity.weights)
        with torch.no_grad():
            model(input_ids=torch.tensor([[4, 5]]))
        assert loaded(model.train().eval(), tokenizer).identity.weights == found[-1]
    assert len(set(found)) == 4


def test_other_settings_or_angles_of_a_part_in_memory_are_another_model(tokenizer):
    """A norm's epsilon, a scaling of attention and rotary frequencies are no weights, and decide the answers, too."""

    def scale(model):
        model.model.layers[1].self_attn.scaling *= 2

    def norm(model):
        model.model.norm.variance_epsilon *= 2

    def turn(model):
        model.model.rotary_emb.inv_freq *= 2

    found = []
    for edit in (lambda _model: None, scale, norm, turn):
        model = tiny("llama", dtype=torch.float32)
        edit(model)
        found.append(loaded(model, tokenizer).identity.weights)
    assert len(set(found)) == 4


def test_a_long_text_does_not_make_another_model(tokenizer):
    """Its angles stay for the next text, until that is short."""
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = made(lambda: LlamaConfig(**{**SMALL, "max_position_embeddings": 16}, rope_parameters=dynamic))
    before, angles = loaded(model, tokenizer).identity.weights, model.model.rotary_emb.inv_freq.clone()
    with torch.no_grad():
        model(input_ids=torch.arange(40)[None] % VOCAB)
    assert not torch.equal(model.model.rotary_emb.inv_freq, angles)
    assert loaded(model, tokenizer).identity.weights == before


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
    (folder / adapters.CONFIG).write_text(json.dumps({"base_model_name_or_path": "org/base", "peft_type": "LORA"}))
    with pytest.raises(UserError, match=r"is an adapter .*; give --model org/base --peft "):
        resolve(_spec(folder))


@pytest.mark.parametrize("index", ['{"metadata": {', '{"metadata": {}}'])
def test_a_damaged_index_is_named_where_the_dtype_is_wanted(folder, index):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    _configure(folder, dtype=...)
    with pytest.raises(UserError, match=r"names no dtype, and has weights that cannot be read \(model\.safetensors\."):
        resolve(_spec(folder))


def test_a_quantised_checkpoint_that_is_cut_off_is_one_line_before_it_is_loaded(folder):
    weights = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    kind = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}
    _configure(folder, quantization_config=kind | {"ignore": ["lm_head"], "quantization_status": "compressed"})
    os.truncate(folder / "model.safetensors", 20_000)
    with pytest.raises(UserError, match="model 'model' cannot be loaded"):
        resolve(_spec(folder)).outline()


def test_a_revision_of_a_folder_is_refused(folder):
    assert resolve(_spec(folder, revision="main")).identity.revision is None  # lm-eval's default
    with pytest.raises(UserError, match=r"--revision step1000 is of a model on the hub, and .* is on this machine"):
        resolve(_spec(folder, revision="step1000"))


@pytest.mark.parametrize("option", ["tokenizer", "peft"])
def test_a_file_in_place_of_a_folder_is_named(folder, option):
    with pytest.raises(UserError, match=rf"--{option} .*tokenizer\.json is a file; give the folder that it lies in"):
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
