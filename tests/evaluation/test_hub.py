"""Models and adapters of the hub, from a cache made by hand: which commit they are, and which files are read."""

import shutil

import huggingface_hub
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from dart_eval.models.loading import ModelSpec, resolve, work_offline_if_unreachable
from dart_eval.util.errors import UserError
from tests.helpers.models import tiny, word_tokenizer

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """The cache of `org/m`: `main` names one commit, `v1` another with other weights."""
    monkeypatch.setattr(transformers.utils.hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    work_offline_if_unreachable.cache_clear()
    folder = tmp_path / "models--org--m"
    for seed, (commit, name) in enumerate(((OLD, "main"), (NEW, "v1"))):
        tiny("llama", dtype=torch.float32, seed=seed).save_pretrained(folder / "snapshots" / commit)
        word_tokenizer().save_pretrained(folder / "snapshots" / commit)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / name).write_text(commit)
    yield folder
    work_offline_if_unreachable.cache_clear()


def _spec(**more):
    return ModelSpec("org/m", device="cpu", **more)


def test_a_models_identity_is_the_commit_that_its_branch_names_now(cached):
    assert resolve(_spec()).identity.revision == OLD
    assert resolve(_spec(revision="v1")).identity.revision == NEW
    (cached / "refs" / "main").write_text(NEW)
    assert resolve(_spec()).identity.revision == NEW
    assert resolve(_spec(revision=OLD)).identity.revision == OLD


def test_a_hub_tokenizers_commit_is_part_of_the_identity(cached, saved_llama):
    spec = ModelSpec(str(saved_llama), device="cpu", tokenizer="org/m")
    before = resolve(spec).identity
    (cached / "refs" / "main").write_text(NEW)
    assert resolve(spec).identity.weights != before.weights


def _adapter(folder, seed):
    """Write an adapter of the model in a folder beside its weights; return a weight that it changes, merged."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    shutil.rmtree(folder.parent.parent / "lora", ignore_errors=True)
    model.save_pretrained(folder.parent.parent / "lora")
    for file in (folder.parent.parent / "lora").glob("adapter*"):
        shutil.copy(file, folder)
    return model.merge_and_unload().model.layers[0].self_attn.q_proj.weight


def test_an_adapter_beside_the_weights_is_that_of_their_revision(cached):
    theirs = {name: _adapter(cached / "snapshots" / name, seed) for seed, name in enumerate((OLD, NEW))}
    for revision, commit in ((None, OLD), ("v1", NEW)):
        merged = resolve(_spec(revision=revision)).load()[0].model.layers[0].self_attn.q_proj.weight
        torch.testing.assert_close(merged, theirs[commit])
    (cached / "snapshots" / OLD / "adapter_config.json").unlink()
    assert resolve(_spec()).adapter is None and resolve(_spec(revision="v1")).adapter == "org/m"


def test_an_adapter_of_an_unreachable_hub_says_so(cached, saved_llama):
    with pytest.raises(UserError, match=r"org/none has no .* with weights, or the hub cannot be reached"):
        resolve(ModelSpec(str(saved_llama), device="cpu", peft="org/none"))
