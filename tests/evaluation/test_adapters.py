"""Adapters of PEFT, merged, told and part of what the model is, or refused; and which commit a model of the hub is."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dart_eval.layers.find import find_ffns
from dart_eval.layers.shape import shape_of
from dart_eval.models import adapters
from dart_eval.models.loading import ModelSpec, resolve, work_offline_if_unreachable
from dart_eval.pruning.session import prune
from dart_eval.sweep.options import config_from
from dart_eval.util.errors import UserError
from tests.helpers.commands import Watch, run_local
from tests.helpers.models import random_tokens, tiny, word_tokenizer

peft = pytest.importorskip("peft")
IDS = torch.tensor([random_tokens(9)])


def _save(base, folder, seed=0, **config):
    """Write an adapter of a model into a folder; by default one of attention and FFN."""
    torch.manual_seed(seed)
    config = config or {"r": 4, "target_modules": ["q_proj", "gate_proj", "down_proj"], "init_lora_weights": False}
    kind = peft.PromptTuningConfig if "num_virtual_tokens" in config else peft.LoraConfig
    made = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), kind(**config))
    made.save_pretrained(folder)
    return made


@pytest.fixture(scope="module")
def saved_lora(saved_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "lora"
    _save(saved_llama, folder)
    return folder


@pytest.fixture
def lora(saved_lora, tmp_path):
    """A copy of an adapter, to be changed."""
    return shutil.copytree(saved_lora, tmp_path / "lora")


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
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base).eval(), adapter)


def _change(file, change):
    save_file(change(load_file(file)), file, {"format": "pt"})


def test_an_adapter_is_merged_told_and_another_model(folder, lora, monkeypatch):
    """By its own name, and beside the weights; the files decide what model it is."""
    monkeypatch.setenv("HOME", str(lora.parent))
    monkeypatch.chdir(lora)
    alone = resolve(_spec(folder)).identity
    named = resolve(_spec(folder, peft="~/lora", tokenizer="~/model"))
    assert resolve(_spec(folder, peft=".")).identity.name == "model+lora"
    base = shutil.copytree(folder, folder.with_name("base"))
    for file in lora.glob("adapter*"):
        shutil.copy(file, folder)
    beside = resolve(_spec(folder))
    assert (named.identity.name, beside.identity.name) == ("model+lora", "model")
    plain = _logits(AutoModelForCausalLM.from_pretrained(base))
    for found, where in ((named, lora), (beside, folder)):
        told = []
        model, _ = found.load(told.append)
        assert len(told) == 1 and str(where) in told[0]
        assert torch.allclose(_logits(model), _logits(_theirs(base, lora)), atol=1e-5)
        assert not torch.allclose(_logits(model), plain, atol=1e-2)
        assert all(type(m) is torch.nn.Linear for f in find_ffns(model) for m in f.projections)
    _change(lora / adapters.WEIGHTS[0], lambda weights: {k: v * 2 for k, v in weights.items()})
    other = resolve(_spec(base, peft=str(lora))).identity
    assert len({i.weights for i in (alone, named.identity, beside.identity, other)}) == 4


def test_a_run_names_the_adapter_as_lm_eval_does(saved_llama, saved_lora, tmp_path):
    given = {"model_args": f"pretrained={saved_llama},peft={saved_lora}", "tasks": "smoke_questions", "limit": 1}
    config = config_from(None, given | {"method": "griffin", "output": str(tmp_path / "out"), "device": "cpu"})
    (record,) = run_local(config, Watch()).records
    assert record.inputs["model"]["name"] == "tiny-llama+lora"
    assert len(record.settings["notes"]) == 1 and f"--peft {saved_lora}" in record.settings["command"]


def _misfit(folder, lora):
    _change(lora / adapters.WEIGHTS[0], lambda w: {k.replace("layers.2", "layers.9"): v for k, v in w.items()})


def _quantised(folder, lora):
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (folder / "config.json").write_text(json.dumps(config))


def _lacking(folder, lora):
    """transformers would tell of the weights of an adapter beside it alone."""
    _change(folder / "model.safetensors", lambda w: {k: v for k, v in w.items() if "up_proj" not in k})
    shutil.copytree(lora, folder, dirs_exist_ok=True)


def _empty(folder, lora):
    (lora / adapters.WEIGHTS[0]).unlink()


@pytest.mark.parametrize(("change", "word"), [
    (_misfit, "does not fit"), (_quantised, "leave one of them out"), (_lacking, "lacks 3 weights"), (_empty, "PEFT"),
    (lambda f, to: _save(f, to, r=2, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 3]]), "LoRA"),
    (lambda f, to: _save(f, to, num_virtual_tokens=4, task_type="CAUSAL_LM"), "LoRA"),
])  # fmt: skip
def test_an_adapter_that_cannot_be_merged_is_refused(folder, lora, change, word):
    change(folder, lora)
    with pytest.raises(UserError, match=word):
        resolve(_spec(folder, peft=str(lora))).load()


def test_without_peft_an_adapter_is_refused_wherever_it_lies(folder, saved_lora, monkeypatch):
    """transformers takes the weights without a word then."""
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="package peft"):
        resolve(_spec(folder, peft=str(saved_lora)))
    shutil.copytree(saved_lora, folder, dirs_exist_ok=True)
    with pytest.raises(UserError, match="package peft"):
        resolve(_spec(folder))


def test_an_adapter_that_is_injected_counts_or_is_refused(saved_lora, saved_llama):
    """PEFT's `weight` is that without the adapter: nothing may multiply it in the adapter's place."""
    found = []
    for merge in (False, True):
        model = _theirs(saved_llama, saved_lora)
        model = model.merge_and_unload() if merge else model.base_model.model
        for method in ("wina", "griffin", "cats"):
            with prune(model, method, 0.5, execution="masked") as run:
                made = model.generate(IDS, max_new_tokens=4, do_sample=False, output_logits=True,
                                      return_dict_in_generate=True, min_length=13)  # fmt: skip
                found.append((method, torch.cat(made.logits), run.weights_read))
        if not merge:
            for method in ("grinqh", "decdec"):
                with pytest.raises(UserError, match="merge adapters"), prune(model, method, 0.7):
                    pass
    plain, injected = AutoModelForCausalLM.from_pretrained(saved_llama), _theirs(saved_llama, saved_lora)
    shapes = [shape_of(m, find_ffns(m)) for m in (plain, injected.base_model.model)]
    added = sum(p.numel() for n, p in injected.named_parameters() if "lora_" in n)
    assert shapes[1].ffn_weights == shapes[0].ffn_weights
    assert 0 <= shapes[1].other_weights - shapes[0].other_weights <= added
    for (method, logits, read), (_, merged, expected) in zip(found[:3], found[3:], strict=True):
        assert torch.allclose(logits, merged, atol=1e-4), method
        assert read == pytest.approx(expected), method


# -- of the hub --------------------------------------------------------------------------------------------------------

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """The cache of `org/m`, made by hand: `main` names one commit, `v1` another with other weights."""
    monkeypatch.setattr(transformers.utils.hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    work_offline_if_unreachable.cache_clear()
    folder = tmp_path / "models--org--m"
    (folder / "refs").mkdir(parents=True)
    for seed, (commit, name) in enumerate(((OLD, "main"), (NEW, "v1"))):
        tiny("llama", dtype=torch.float32, seed=seed).save_pretrained(folder / "snapshots" / commit)
        word_tokenizer().save_pretrained(folder / "snapshots" / commit)
        (folder / "refs" / name).write_text(commit)
    yield folder
    work_offline_if_unreachable.cache_clear()


def test_a_models_identity_is_the_commit_that_its_branch_names_now(cached, saved_llama):
    """So is that of a tokenizer of the hub."""
    assert resolve(_spec("org/m")).identity.revision == OLD
    assert resolve(_spec("org/m", revision="v1")).identity.revision == NEW
    before = resolve(_spec(saved_llama, tokenizer="org/m")).identity
    (cached / "refs" / "main").write_text(NEW)
    assert resolve(_spec("org/m")).identity.revision == NEW
    assert resolve(_spec("org/m", revision=OLD)).identity.revision == OLD
    assert resolve(_spec(saved_llama, tokenizer="org/m")).identity.weights != before.weights


def test_an_adapter_beside_the_weights_is_that_of_their_revision(cached, tmp_path):
    def changed(model):
        return model.model.layers[0].self_attn.q_proj.weight

    theirs = {}
    for seed, commit in enumerate((OLD, NEW)):
        base = cached / "snapshots" / commit
        theirs[commit] = changed(_save(base, tmp_path / commit, seed).merge_and_unload())
        for file in (tmp_path / commit).glob("adapter*"):
            shutil.copy(file, base)
    for revision, commit in ((None, OLD), ("v1", NEW)):
        torch.testing.assert_close(changed(resolve(_spec("org/m", revision=revision)).load()[0]), theirs[commit])
    (cached / "snapshots" / OLD / "adapter_config.json").unlink()
    assert resolve(_spec("org/m")).adapter is None and resolve(_spec("org/m", revision="v1")).adapter == "org/m"


def test_an_adapter_of_an_unreachable_hub_says_so(cached, saved_llama):
    with pytest.raises(UserError, match="the hub cannot be reached"):
        resolve(_spec(saved_llama, peft="org/none"))
