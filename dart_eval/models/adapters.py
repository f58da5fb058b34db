"""PEFT adapters, such as LoRA: named beside a model or in its folder, and merged into its weights."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from typing import TYPE_CHECKING

from dart_eval.util.errors import UserError
from dart_eval.util.files import feed
from dart_eval.weights.checkpoint import model_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def refuse_alone(source: str, revision: str | None = None) -> None:
    """Refuse an adapter in place of a model."""
    if model_file(source, CONFIG, revision) is not None:
        raise UserError(f"{source} is an adapter ({CONFIG}), not a model", f"give its base model, and --peft {source}")


def hash_files(adapter: str, revision: str | None) -> str:
    """Return the sha256 of an adapter's configuration and weights.

    Raises:
        UserError: one of them is not there, or the package peft is missing.
    """
    config = model_file(adapter, CONFIG, revision)
    weights = next((file for name in WEIGHTS if (file := model_file(adapter, name, revision)) is not None), None)
    if config is None or weights is None:
        raise UserError(
            f"adapter {adapter} has no {CONFIG} with weights, or the hub cannot be reached",
            "give a folder or a hub id that PEFT wrote",
        )
    if find_spec("peft") is None:
        raise UserError(f"adapter {adapter} needs the package peft", f"install it, or remove {CONFIG} to do without")
    digest = hashlib.sha256()
    for file in (config, weights):
        feed(digest, file)
    return digest.hexdigest()


def merge(model: PreTrainedModel, adapter: str, revision: str | None) -> PreTrainedModel:
    """Return the model with an adapter merged into its weights.

    Raises:
        UserError: the adapter cannot be merged into weights, or was made for another model.
    """
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(adapter, revision=revision)
    if config.is_prompt_learning or getattr(config, "layer_replication", None):  # repeated layers share their weights
        raise UserError(f"adapter {adapter} is a prompt or repeats layers: it cannot be merged", "give another (LoRA)")
    tuned = PeftModel(model, config)
    keys = tuned.load_adapter(adapter, "default", torch_device="cpu", revision=revision)
    if strange := [*keys.missing_keys, *keys.unexpected_keys]:
        raise UserError(
            f"adapter {adapter} does not fit the model: {len(strange)} weights have no counterpart ({min(strange)})",
            f"give the adapter's own model (base_model_name_or_path in its {CONFIG})",
        )
    return tuned.merge_and_unload(safe_merge=True)
