"""Adapters of PEFT: refused where they cannot be applied, else merged, told and part of what the model is."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dart_eval.layers.find import find_ffns
from dart_eval.layers.shape import shape_of
from dart_eval.models import adapters
from dart_eval.models.loading import ModelSpec, resolve
from dart_eval.pruning.session import prune
from dart_eval.sweep.options import config_from
from dart_eval.util.errors import UserError
from tests.helpers.commands import Watch, command, run_local
from tests.helpers.models import random_tokens

IDS = torch.tensor([random_tokens(9)])


@pytest.fixture
def lora(saved_llama, tmp_path):
    """A folder with an adapter of attention and FFN alone."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "gate_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(saved_llama), config)
    model.save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


@pytest.fixture
def folder(saved_llama, tmp_path):
    return Path(shutil.copytree(saved_llama, tmp_path / "model"))


def _spec(model, **more):
    return ModelSpec(str(model), device="cpu", **more)


def _logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def _theirs(base, adapter):
    """What PEFT itself makes of the two, unmerged, as lm-eval does."""
    from peft import PeftModel

    return _logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base).eval(), adapter))


def test_a_home_folder_is_found_under_its_short_name(saved_llama, lora, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(saved_llama, tmp_path / "tokens")
    model, _ = resolve(_spec(saved_llama, peft="~/lora", tokenizer="~/tokens")).load()
    torch.testing.assert_close(_logits(model), _theirs(saved_llama, lora))


def test_an_adapter_that_repeats_layers_is_refused(saved_llama, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 3]])
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(saved_llama), config).save_pretrained(tmp_path / "lora")
    with pytest.raises(UserError, match="is a prompt or repeats layers: it cannot be merged"):
        resolve(_spec(saved_llama, peft=str(tmp_path / "lora"))).load()


def test_an_adapter_alone_is_no_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / adapters.CONFIG).write_text('{"peft_type": "LO')  # a copy that was interrupted
    done = command("run", "--tasks", "smoke_questions", "--model", "lora")
    assert (done.code, done.out) == (2, "")
    words = "error: lora is an adapter (adapter_config.json), not a model; give its base model, and --peft lora\n"
    assert done.err == words
    gone = command("run", "--tasks", "smoke_questions", "--peft", "./gone")
    assert "error: --peft ./gone is not a folder" in gone.err


def test_without_peft_an_adapter_is_refused_wherever_it_lies(folder, monkeypatch):
    """transformers takes the weights without a word then."""
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    (folder / adapters.CONFIG).write_text(json.dumps({"peft_type": "LORA"}))
    save_file({"w": torch.ones(1)}, folder / adapters.WEIGHTS[0])
    for spec in (_spec(folder), _spec(folder, peft=str(folder))):
        with pytest.raises(UserError, match=r"model needs the package peft"):
            resolve(spec)
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty has no adapter_config\.json with weights, or the hub"):
        resolve(_spec(folder, peft=str(folder / "empty")))


def test_an_adapter_is_merged_told_and_another_model(folder, lora):
    """By its own name, and beside the weights; the files decide what model it is."""
    alone = resolve(_spec(folder)).identity
    named = resolve(_spec(folder, peft=str(lora)))
    for file in lora.iterdir():
        if file.name.startswith("adapter"):
            shutil.copy(file, folder)
    beside = resolve(_spec(folder))
    assert (named.identity.name, beside.identity.name) == ("model+lora", "model")
    base = shutil.copytree(folder, folder.with_name("base"), ignore=shutil.ignore_patterns("adapter*"))
    for found in (named, beside):
        told = []
        model, _ = found.load(told.append)
        where = lora if found is named else folder
        assert told == [f"model {found.identity.name}: the adapter of {where} is merged into its weights"]
        assert torch.allclose(_logits(model), _theirs(base, lora), atol=1e-5)
        assert not torch.allclose(_logits(model), _logits(AutoModelForCausalLM.from_pretrained(base)), atol=1e-2)
        assert all(type(m) is torch.nn.Linear for f in find_ffns(model) for m in f.projections)
    weights = load_file(lora / adapters.WEIGHTS[0])
    save_file({k: v * 2 for k, v in weights.items()}, lora / adapters.WEIGHTS[0], {"format": "pt"})
    other = resolve(_spec(base, peft=str(lora))).identity
    assert len({i.weights for i in (alone, named.identity, beside.identity, other)}) == 4


def test_a_run_names_the_adapter_as_lm_eval_does(folder, lora, tmp_path):
    given = {"model_args": f"pretrained={folder},peft={lora}", "tasks": "smoke_questions", "limit": 1}
    config = config_from(None, given | {"method": "griffin", "output": str(tmp_path / "out"), "device": "cpu"})
    (record,) = run_local(config, Watch()).records
    assert record.inputs["model"]["name"] == "model+lora"
    assert record.settings["notes"] == [f"model model+lora: the adapter of {lora} is merged into its weights"]
    assert f"--peft {lora}" in record.settings["command"]


def test_weights_that_lack_are_seen_beside_an_adapter_too(folder, lora):
    """transformers would tell of the adapter's weights alone."""
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "up_proj" not in k}, folder / "model.safetensors", {"format": "pt"})
    shutil.copytree(lora, folder, dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"model model lacks 3 weights \(model\.layers\.0\.mlp\.up_proj\.weight"):
        resolve(_spec(folder)).load()


def test_adapters_that_do_not_fit_are_refused(folder, lora, tmp_path):
    from peft import PromptTuningConfig, get_peft_model

    file = lora / adapters.WEIGHTS[0]
    weights = load_file(file)
    save_file({k.replace("layers.2", "layers.9"): v for k, v in weights.items()}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"lora does not fit the model: 12 weights have no counterpart \(base_model\."):
        resolve(_spec(folder, peft=str(lora))).load()
    prompts = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), prompts).save_pretrained(tmp_path / "prompt")
    with pytest.raises(UserError, match=r"prompt is a prompt or repeats layers: it cannot be merged; give another"):
        resolve(_spec(folder, peft=str(tmp_path / "prompt"))).load()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="model model has an adapter and quantised weights; leave one of them out"):
        resolve(_spec(folder, peft=str(lora)))


def test_an_adapter_that_is_injected_counts_or_is_refused(lora, saved_llama):
    """PEFT's `weight` is that without the adapter: nothing may multiply it in the adapter's place."""
    peft = pytest.importorskip("peft")
    found = []
    for merge in (False, True):
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved_llama).eval(), lora)
        model = model.merge_and_unload() if merge else model.base_model.model
        for method in ("wina", "griffin", "cats"):
            with prune(model, method, 0.5, execution="masked") as run:
                made = model.generate(IDS, max_new_tokens=4, do_sample=False, output_logits=True,
                                      return_dict_in_generate=True, min_length=13)  # fmt: skip
                found.append((method, torch.cat(made.logits), run.weights_read))
        if not merge:
            for method in ("grinqh", "decdec"):
                with pytest.raises(UserError, match=r"carry an adapter.*merge adapters"), prune(model, method, 0.7):
                    pass
    plain = AutoModelForCausalLM.from_pretrained(saved_llama)
    injected = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved_llama).eval(), lora)
    shapes = [shape_of(m, find_ffns(m)) for m in (plain, injected.base_model.model)]
    added = sum(p.numel() for n, p in injected.named_parameters() if "lora_" in n)
    assert shapes[1].ffn_weights == shapes[0].ffn_weights
    assert 0 <= shapes[1].other_weights - shapes[0].other_weights <= added
    for (method, logits, read), (_, merged, expected) in zip(found[:3], found[3:], strict=True):
        assert torch.allclose(logits, merged, atol=1e-4), method
        assert read == pytest.approx(expected), method
