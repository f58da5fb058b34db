"""Models whose files are not what they should be: one line and status 2, before anything is written."""

import builtins
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import dart_eval
from dart_eval.evaluation.lm import PrunedLM
from dart_eval.layers.find import describe
from dart_eval.models.loading import ModelSpec, resolve
from dart_eval.pruning.session import Session
from dart_eval.sweep.options import config_from
from dart_eval.util.errors import UserError
from tests.helpers.commands import Watch, command, run_local
from tests.helpers.models import FAMILIES, tiny
from tests.helpers.requests import TextRequest


@pytest.fixture
def folder(saved_llama, tmp_path, monkeypatch):
    """A copy of a model that loads, to be spoilt; the working directory is empty."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return Path(shutil.copytree(saved_llama, tmp_path / "model"))


@pytest.fixture
def refused():
    """Runs a model that must be refused, and returns the line that says why."""

    def run(folder, *more):
        line = ["run", "--tasks", "smoke_questions", "--limit", "1", "--device", "cpu", "--model"]
        shown = command(*line, folder, *more)
        assert (shown.code, shown.out) == (2, "")
        (said,) = [line for line in shown.err.splitlines() if "; results in " not in line]
        assert not list(Path().iterdir())
        return said.removeprefix("error: ")

    return run


def _rewrite(folder, change):
    """Change the weights of a folder; `change` takes and returns a dict."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


def _configure(folder, file="config.json", **changes):
    values = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


# -- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "words"), [
    (lambda w: {k: v for k, v in w.items() if "down_proj" not in k},
     "lacks 3 weights (model.layers.0.mlp.down_proj.weight, model.layers.1.mlp.down_proj.weight, "
     "model.layers.2.mlp.down_proj.weight);"),
    (lambda w: {f"_orig_mod.{k}": v for k, v in w.items()},
     "lacks 30 weights (lm_head.weight, model.embed_tokens.weight, model.layers.0.input_layernorm.weight, ...), and "
     "has 30 that the model does not know (_orig_mod.lm_head.weight, "),
    (lambda w: {f"transformer.h.{k}": v for k, v in w.items()}, "lacks 30 weights (lm_head.weight, "),
    (lambda w: {k: v for k, v in w.items() if "layers.2" not in k},
     "lacks 9 weights (model.layers.2.input_layernorm.weight, "),
])  # fmt: skip
def test_a_checkpoint_that_lacks_weights_is_refused_with_their_names(folder, refused, change, words):
    _rewrite(folder, change)
    message = refused(folder)
    assert message.startswith(f"model model {words}")
    assert message.endswith(
        "save the whole model itself, not a wrapper of it, with save_pretrained; config.json must fit it"
    )


def test_weights_of_another_shape_are_refused_in_one_line(folder, refused):
    _configure(folder, intermediate_size=48)
    assert refused(folder).startswith(
        "9 weights of model model have another shape than its config.json says: model.layers.0.mlp.down_proj.weight is "
        "[32, 40], not [32, 48];"
    )


def test_weights_that_are_not_used_are_told_and_recorded(folder, tmp_path):
    _configure(folder, num_hidden_layers=2)
    view = Watch()
    config = config_from(None, {
        "model": str(folder), "tasks": "smoke_questions", "limit": 2, "method": "dense", "device": "cpu",
        "output": str(tmp_path / "out"),
    })  # fmt: skip
    (record,) = run_local(config, view).records
    assert view.notes == record.settings["notes"]
    assert view.notes[0].startswith(
        "model model: 9 weights of the checkpoint are not used (model.layers.2.input_layernorm."
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_whole_checkpoint_rightly_lacks_is_not_asked_of_it(family, tmp_path, tokenizer):
    """Tied embeddings, and buffers that the model makes itself."""
    model = tiny(family).float()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    told = []
    loaded, _ = resolve(ModelSpec(str(tmp_path), device="cpu")).load(told.append)
    assert not told
    assert torch.equal(loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight)


# -- configurations ------------------------------------------------------------------------------------------------


def test_a_quantisation_that_transformers_does_not_know_is_refused(folder, refused):
    _configure(folder, quantization_config={"quant_method": "nosuch"})
    assert refused(folder, "--method", "dense") == (
        "config.json of model model says quant_method 'nosuch', which transformers does not know; correct "
        "quantization_config, or remove it if the weights are not quantised"
    )


@pytest.mark.parametrize("changes", [{"hidden_act": "nosuch"}, {"rope_parameters": {"rope_type": "nosuch"}}])
def test_a_word_that_transformers_does_not_know_is_named(folder, refused, changes):
    _configure(folder, **changes)
    assert re.match(r"model 'model' cannot be loaded \(.*nosuch.*\); it must be", refused(folder, "--method", "dense"))


class _Calls:
    def __reduce__(self):
        return os.system, ("true",)


def test_a_pickle_that_calls_code_is_refused_without_advice_to_run_it(folder, refused):
    """What torch says of it explains how to switch its own check off."""
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.ones(2), "other": _Calls()}, folder / "pytorch_model.bin")
    assert refused(folder) == (
        f"the weights of model model are no plain tensors: their file calls {os.system.__module__}.system; such a file "
        "may run any code when it is loaded: take the weights as safetensors"
    )


# -- dtype ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_a_dtype_that_the_configuration_does_not_name_is_that_of_the_weights(folder, size):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size=size)
    _configure(folder, dtype=..., torch_dtype=...)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    resolved = resolve(ModelSpec(str(folder), device="cpu"))
    assert resolved.dtype == "bfloat16"
    assert resolved.load()[0].dtype == stock.dtype == torch.bfloat16


def test_the_outline_of_a_model_reads_no_file_again(folder):
    found = resolve(ModelSpec(str(folder), device="cpu"))
    shutil.rmtree(folder)
    model = found.outline()
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert [ffn.size for ffn in describe(model)] == [40, 40, 40]


def test_float32_of_a_bfloat16_checkpoint_is_a_cell_of_its_own(folder, tmp_path):
    """Its configuration names no dtype: `auto` was keyed as float32, and a run in float32 was done already."""
    _rewrite(folder, lambda w: {k: v.bfloat16() for k, v in w.items()})
    _configure(folder, dtype=..., torch_dtype=...)
    made = []
    for dtype in ("auto", "float32", "bfloat16"):
        view = Watch()
        config = config_from(None, {
            "model": str(folder), "tasks": "smoke_questions", "limit": 2, "method": "dense", "device": "cpu",
            "dtype": dtype, "output": str(tmp_path / "out"),
        })  # fmt: skip
        (record,) = run_local(config, view).records
        made.append((record.inputs["dtype"], len(view.done)))
    assert made == [("bfloat16", 1), ("float32", 1), ("bfloat16", 0)]


def test_a_model_that_is_loaded_in_another_dtype_than_was_planned_is_refused(folder, monkeypatch):
    stock = AutoModelForCausalLM.from_pretrained

    def insist(*args, dtype, **kwargs):
        return stock(*args, dtype=torch.float16, **kwargs)

    monkeypatch.setattr("dart_eval.models.loading.AutoModelForCausalLM.from_pretrained", insist)
    with pytest.raises(dart_eval.UserError, match="was loaded in float16, not in float32; give --dtype float16"):
        resolve(ModelSpec(str(folder), device="cpu")).load()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_say_no_dtype_are_refused_where_it_is_wanted(folder, refused, name):
    (folder / "model.safetensors").write_bytes(b"\x08")
    (folder / "model.safetensors").rename(folder / name)
    _configure(folder, dtype=..., torch_dtype=...)
    said = "model model names no dtype, and has no safetensors file that says one; give --dtype"
    assert refused(folder) == said


def test_files_that_are_cut_off_or_closed_are_named(folder, refused, monkeypatch):
    """Wherever the folder lies: its path is no word of an error."""
    place = folder.parent / "offline"
    folder.rename(place)
    whole = (place / "tokenizer_config.json").read_text()
    (place / "tokenizer_config.json").write_text(whole[:20])
    assert refused(place).startswith("model 'offline' cannot be loaded (")
    (place / "tokenizer_config.json").write_text(whole)

    def denied(*_):
        raise PermissionError(13, "Permission denied", "model.safetensors")

    monkeypatch.setattr("dart_eval.models.loading.feed", denied)
    assert refused(place).startswith(f"model {place} cannot be read (Permission denied); check the permissions")


# -- tokenizers ----------------------------------------------------------------------------------------------------


def test_a_tokenizer_larger_than_the_embedding_is_refused_with_both_sizes(folder, refused, tokenizer):
    larger = PreTrainedTokenizerFast.from_pretrained(folder)
    larger.add_tokens(["w96", "w97"])
    larger.save_pretrained(folder)
    assert refused(folder) == (
        "the tokenizer of model model has token ids up to 97, and the model 96 embeddings; give the model its own "
        "tokenizer, or save it after resize_token_embeddings"
    )


def test_special_tokens_that_no_text_has_may_lie_beyond_the_embedding(folder):
    """Gemma's tokenizer has one for images, which its text models do not."""
    larger = PreTrainedTokenizerFast.from_pretrained(folder)
    larger.add_special_tokens({"additional_special_tokens": ["<image>"]})
    larger.save_pretrained(folder)
    assert len(resolve(ModelSpec(str(folder), device="cpu")).load()[1]) == 97


def test_a_tokenizer_without_beginning_and_end_is_refused(folder, refused):
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / file).exists():
            _configure(folder, file, bos_token=..., eos_token=...)
    assert refused(folder).startswith(
        "the tokenizer of model model has neither a BOS nor an EOS token; name one in its"
    )


def test_a_tokenizer_without_an_end_writes_no_texts(tokenizer):
    endless = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<bos>", pad_token="<pad>"
    )
    lm = PrunedLM(tiny("llama"), endless)
    lm.begin(Session(), {})
    with pytest.raises(UserError, match="the tokenizer has no EOS token to end a text; add one to tokenizer_config"):
        lm.generate_until([TextRequest("w5 w6", 0)])


# -- code ----------------------------------------------------------------------------------------------------------

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = {kind!r}
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def coded(folder, tmp_path, monkeypatch):
    """Gives a model code of its own, which leaves a mark where it runs; who is asked says yes."""
    monkeypatch.setattr(builtins, "input", lambda *_: "yes")
    marker = tmp_path / "ran"

    def write(kind):
        (folder / "own.py").write_text(CODE.format(marker=str(marker), kind=kind))
        _configure(
            folder, model_type=kind, architectures=["OwnModel"],
            auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
        )  # fmt: skip
        return marker

    return write


def test_code_of_a_model_folder_does_not_run_unasked(folder, coded, refused):
    marker = coded("own")
    message = refused(folder)
    assert message == (
        "model 'model' has its own code (auto_map or custom_generate), which runs only with your consent; "
        "read the code; if you trust it, add --trust-remote-code"
    )
    assert not marker.exists()


def test_code_that_shadows_a_class_of_the_library_does_not_run_unasked(folder, coded):
    marker = coded("llama")
    resolved = resolve(ModelSpec(str(folder), device="cpu"))
    model, _ = resolved.load()
    assert not marker.exists()
    assert not resolved.identity.remote_code
    assert type(model).__module__ == "transformers.models.llama.modeling_llama"


def test_code_of_a_tokenizer_does_not_run_unasked(folder, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(builtins, "input", lambda *_: "yes")
    (folder / "own.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
        "from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast): pass\n"
    )
    _configure(folder, "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": [None, "own.Own"]})
    refused(folder)
    assert not (tmp_path / "ran").exists()


def test_code_of_the_hub_that_a_configuration_names_as_its_attention_does_not_run_unasked(folder, refused):
    _configure(folder, attn_implementation="someone/kernel")
    assert refused(folder).startswith("model 'model' has its own code (the attention someone/kernel of the hub)")


@pytest.mark.parametrize("kind", ["own", "llama"])
def test_trusted_code_runs_and_belongs_to_the_key(folder, coded, tmp_path, kind):
    marker = coded(kind)
    options = {
        "model": str(folder), "tasks": "smoke_questions", "limit": 2, "method": "dense", "device": "cpu",
        "output": str(tmp_path / "out"),
    }  # fmt: skip
    (trusted,) = run_local(config_from(None, options | {"trust_remote_code": True}), Watch()).records
    assert marker.exists()
    assert trusted.inputs["model"]["remote_code"]
    assert "--trust-remote-code" in trusted.settings["command"]
    if kind == "llama":
        (other,) = run_local(config_from(None, options), Watch()).records
        assert other.key != trusted.key
    before = resolve(ModelSpec(str(folder), device="cpu", trust_remote_code=True)).identity.weights
    (folder / "parts").mkdir()
    (folder / "parts" / "more.py").write_text("A = 1\n")
    assert resolve(ModelSpec(str(folder), device="cpu", trust_remote_code=True)).identity.weights != before


def test_trust_changes_no_key_where_there_is_no_code(folder):
    identities = [resolve(ModelSpec(str(folder), device="cpu", trust_remote_code=t)).identity for t in (False, True)]
    assert identities[0] == identities[1]


def test_every_model_and_tokenizer_is_loaded_with_a_word_on_its_code():
    """transformers asks on the terminal where it is told neither yes nor no."""
    for file in Path(dart_eval.__file__).parent.rglob("*.py"):
        text = file.read_text()
        for call in re.finditer(r"\b(?!PeftConfig)\w+\.from_pretrained\(", text):
            rest = text[call.end() : call.end() + 300]
            assert "trust_remote_code=" in rest or "**kwargs" in rest, f"{file}: {call[0]}"
