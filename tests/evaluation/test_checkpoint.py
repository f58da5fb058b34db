"""Models whose files are not what they should be, or bring code: refused, and nothing of them is written or run."""

import builtins
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dart_eval.evaluation.lm import PrunedLM
from dart_eval.layers.find import describe
from dart_eval.models import adapters
from dart_eval.models.loading import ModelSpec, resolve
from dart_eval.pruning.session import Session
from dart_eval.util.errors import UserError
from tests.helpers.models import FAMILIES, tiny
from tests.helpers.requests import TextRequest

MARK = "ran"  # a file in the working directory that code of a model leaves where it runs


@pytest.fixture
def folder(saved_llama, tmp_path, monkeypatch):
    """A copy of a model that loads, to be spoilt; the working directory is empty, and who is asked says yes.

    The folder's path is no word of an error, though it looks like one.
    """
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(builtins, "input", lambda *_: "yes")
    return Path(shutil.copytree(saved_llama, tmp_path / "offline"))


def _spec(folder, **more):
    return ModelSpec(str(folder), device="cpu", **more)


def _rewrite(folder, change):
    """Change the weights of a folder; `change` takes and returns a dict."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


def _configure(folder, file="config.json", **changes):
    values = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def _tokens(folder, *added, **more):
    larger = PreTrainedTokenizerFast.from_pretrained(folder)
    larger.add_tokens([*added])
    larger.add_special_tokens(more)
    larger.save_pretrained(folder)
    return larger


# -- spoilt ------------------------------------------------------------------------------------------------------------


class _Calls:
    def __reduce__(self):
        return os.system, (f"touch {MARK}",)


def _pickled(folder):
    """torch's own error explains how to switch its check off."""
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.ones(2), "other": _Calls()}, folder / "pytorch_model.bin")


def _without_dtype(folder, name="model.safetensors", index=None):
    """No word on the dtype, where it is looked for."""
    (folder / "model.safetensors").write_bytes(b"\x08")
    (folder / "model.safetensors").rename(folder / name)
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(index)
    _configure(folder, dtype=..., torch_dtype=...)


def _without_ends(folder):
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / file).exists():
            _configure(folder, file, bos_token=..., eos_token=...)


def _with_scales(folder):
    """As ModelOpt's, whose configuration is in hf_quant_config.json: codes would be taken for weights."""

    def quantised(weights):
        for key in [k for k in weights if "_proj" in k]:
            scale = weights[key].abs().max() / 448
            weights[key] = (weights[key] / scale).to(torch.float8_e4m3fn)
            weights[f"{key}_scale"] = scale.reshape(1)
        return weights

    _rewrite(folder, quantised)


def _quantised_and_cut(folder):
    weights = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    kind = {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"]}
    kind["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": weights}}
    _configure(folder, quantization_config=kind | {"quantization_status": "compressed"})
    os.truncate(folder / "model.safetensors", 20_000)


def _adapter_alone(folder, name):
    """Axolotl leaves the base model's config.json beside it."""
    (folder / "model.safetensors").rename(folder / name)
    (folder / adapters.CONFIG).write_text(json.dumps({"peft_type": "LORA"}))


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
Path({!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = {!r}
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def _coded(folder, kind="own"):
    """Give a model code of its own."""
    (folder / "own.py").write_text(CODE.format(str(Path(MARK).resolve()), kind))
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    _configure(folder, model_type=kind, architectures=["OwnModel"], auto_map=classes)


def _coded_tokenizer(folder):
    (folder / "own.py").write_text(CODE.format(str(Path(MARK).resolve()), "own"))
    named = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    _configure(folder, "tokenizer_config.json", **named)


# How a model is spoilt, and a word of what is said.
SPOILT = {
    "matrices": (lambda f: _rewrite(f, lambda w: {k: w[k] for k in w if "down_proj" not in k}), "lacks 3 weights"),
    "a layer": (lambda f: _rewrite(f, lambda w: {k: w[k] for k in w if "layers.2" not in k}), "lacks 9 weights"),
    "a wrapper": (lambda f: _rewrite(f, lambda w: {f"_orig_mod.{k}": w[k] for k in w}), "save_pretrained"),
    "shapes": (lambda f: _configure(f, intermediate_size=48), "shape"),
    "a length": (lambda f: _configure(f, max_position_embeddings=0), "context length"),
    "a quantisation": (lambda f: _configure(f, quantization_config={"quant_method": "nosuch"}), "nosuch"),
    "an activation": (lambda f: _configure(f, hidden_act="nosuch"), "nosuch"),
    "angles": (lambda f: _configure(f, rope_parameters={"rope_type": "nosuch"}), "nosuch"),
    "scales": (_with_scales, "21 scales"),
    "a cut quantised file": (_quantised_and_cut, "cannot be loaded"),
    "a pickle": (_pickled, "safetensors"),
    "no dtype": (_without_dtype, "--dtype"),
    "no dtype of a pickle": (lambda f: _without_dtype(f, "pytorch_model.bin"), "--dtype"),
    "a cut index": (lambda f: _without_dtype(f, "model-1.safetensors", '{"metadata": {'), "--dtype"),
    "an empty index": (lambda f: _without_dtype(f, "model-1.safetensors", '{"metadata": {}}'), "--dtype"),
    "a cut tokenizer": (lambda f: os.truncate(f / "tokenizer_config.json", 20), "cannot be loaded"),
    "more tokens": (lambda f: _tokens(f, "w96", "w97"), "resize_token_embeddings"),
    "no ends": (_without_ends, "bos_token"),
    "an adapter": (lambda f: _adapter_alone(f, adapters.WEIGHTS[0]), "--peft"),
    "a pickled adapter": (lambda f: _adapter_alone(f, adapters.WEIGHTS[1]), "--peft"),
    "code": (_coded, "--trust-remote-code"),
    "code of a tokenizer": (_coded_tokenizer, "--trust-remote-code"),
    "attention of the hub": (lambda f: _configure(f, attn_implementation="someone/kernel"), "--trust-remote-code"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_model_is_refused_and_nothing_of_it_runs(folder, how):
    spoil, word = SPOILT[how]
    spoil(folder)
    with pytest.raises(UserError, match=word):
        resolve(_spec(folder)).load()
    assert not list(Path().iterdir())


@pytest.mark.parametrize(("option", "value"), [
    ("revision", "step1000"), ("tokenizer", "{}/tokenizer.json"), ("peft", "{}/tokenizer.json"),
])  # fmt: skip
def test_an_option_that_a_folder_does_not_have_is_refused(folder, option, value):
    assert resolve(_spec(folder, revision="main")).identity.revision is None  # lm-eval's default
    with pytest.raises(UserError, match=f"--{option} "):
        resolve(_spec(folder, **{option: value.format(folder)}))


def test_a_file_that_is_closed_to_the_user_is_refused(folder, monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied", "model.safetensors")

    monkeypatch.setattr("dart_eval.models.loading.feed", denied)
    with pytest.raises(UserError, match="check the permissions"):
        resolve(_spec(folder))


def test_a_model_that_is_loaded_in_another_dtype_than_was_planned_is_refused(folder, monkeypatch):
    stock = AutoModelForCausalLM.from_pretrained

    def insist(*args, dtype, **kwargs):
        return stock(*args, dtype=torch.float16, **kwargs)

    monkeypatch.setattr("dart_eval.models.loading.AutoModelForCausalLM.from_pretrained", insist)
    with pytest.raises(UserError, match="give --dtype float16"):
        resolve(_spec(folder)).load()


# -- understood --------------------------------------------------------------------------------------------------------


def test_weights_that_are_not_used_are_told(folder):
    _configure(folder, num_hidden_layers=2)
    told = []
    resolve(_spec(folder)).load(told.append)
    assert len(told) == 1 and "9 weights" in told[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_whole_checkpoint_rightly_lacks_is_not_asked_of_it(family, tmp_path, tokenizer):
    """Tied embeddings, and buffers that the model makes itself."""
    model = tiny(family).float()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    told = []
    loaded, _ = resolve(_spec(tmp_path)).load(told.append)
    assert not told
    assert torch.equal(loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight)


@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_a_dtype_that_the_configuration_does_not_name_is_that_of_the_weights(folder, size):
    """And what is asked for by name is a model of its own: a run in float32 was done already by one in `auto`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size=size)
    _configure(folder, dtype=..., torch_dtype=...)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    found = {dtype: resolve(_spec(folder, dtype=dtype)) for dtype in ("auto", "bfloat16", "float32")}
    assert {dtype: r.dtype for dtype, r in found.items()} == {**dict.fromkeys(found, "bfloat16"), "float32": "float32"}
    assert found["auto"].load()[0].dtype == stock.dtype == torch.bfloat16


def test_the_outline_of_a_model_reads_no_file_again(folder):
    found = resolve(_spec(folder))
    shutil.rmtree(folder)
    model = found.outline()
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert [ffn.size for ffn in describe(model)] == [40, 40, 40]


def test_the_words_of_a_tokenizer_in_a_file_of_tiktoken_belong_to_the_key(folder):
    found = []
    for text in ("IQ== 0\n", "Ig== 0\n"):
        (folder / "qwen.tiktoken").write_text(text)
        found.append(resolve(_spec(folder)).identity.weights)
    assert found[0] != found[1]


def test_special_tokens_beyond_the_embedding_are_refused_where_a_prompt_has_one(folder):
    """Gemma's tokenizer has one for images, which its text models do not; a chat's may have been added alone."""
    _tokens(folder, additional_special_tokens=["<image>"])
    model, tokenizer = resolve(_spec(folder)).load()
    assert len(tokenizer) == 97
    lm = PrunedLM(model, tokenizer)
    lm.begin(Session(), {})
    with pytest.raises(UserError, match="<image>"):
        lm.generate_until([TextRequest("<image> w4", 0)])


def test_a_tokenizer_without_an_end_writes_no_texts(tokenizer):
    raw = tokenizer.backend_tokenizer
    lm = PrunedLM(tiny("llama"), PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", pad_token="<pad>"))
    lm.begin(Session(), {})
    with pytest.raises(UserError, match="EOS"):
        lm.generate_until([TextRequest("w5 w6", 0)])


# -- code --------------------------------------------------------------------------------------------------------------


def test_code_that_shadows_a_class_of_the_library_does_not_run_unasked_and_without_code_trust_moves_no_key(folder):
    assert resolve(_spec(folder)).identity == resolve(_spec(folder, trust_remote_code=True)).identity
    _coded(folder, "llama")
    resolved = resolve(_spec(folder))
    model, _ = resolved.load()
    assert not Path(MARK).exists()
    assert not resolved.identity.remote_code
    assert type(model).__module__ == "transformers.models.llama.modeling_llama"


@pytest.mark.parametrize("kind", ["own", "llama"])
def test_trusted_code_runs_and_belongs_to_the_key(folder, kind):
    _coded(folder, kind)
    trusted = resolve(_spec(folder, trust_remote_code=True))
    trusted.load()
    assert Path(MARK).exists() and trusted.identity.remote_code
    if kind == "llama":
        assert resolve(_spec(folder)).identity != trusted.identity
    (folder / "parts").mkdir()
    (folder / "parts" / "more.py").write_text("A = 1\n")
    assert resolve(_spec(folder, trust_remote_code=True)).identity.weights != trusted.identity.weights
