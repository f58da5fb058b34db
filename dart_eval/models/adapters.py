"""PEFT adapters, such as LoRA: named beside a model or in its folder, and merged into its weights."""

from __future__ import annotations

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub

from dart_eval.models.digest import readable
from dart_eval.util.errors import UserError
from dart_eval.util.files import feed
from dart_eval.weights.checkpoint import model_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def refuse_alone(source: str, revision: str | None = None) -> None:
    """Refuse an adapter in place of a model.

    Raises:
        UserError: names the adapter's base model.
    """
    if (config := model_file(source, CONFIG, revision)) is not None:
        try:
            base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path") or "BASE"
        except (ValueError, AttributeError, OSError):  # a copy that was interrupted
            base = "BASE"
        raise UserError(
            f"{source} is an adapter (it has {CONFIG}), not a model", f"give --model {base} --peft {source}"
        )


def digest_of(adapter: str, revision: str | None) -> str:
    """Return the sha256 of an adapter's files.

    Raises:
        UserError: it has no files, or the package peft is missing.
    """
    config = model_file(adapter, CONFIG, revision)
    weights = next((file for name in WEIGHTS if (file := model_file(adapter, name, revision)) is not None), None)
    if config is None or weights is None:
        lacking = CONFIG if config is None else WEIGHTS[0]
        if huggingface_hub.constants.HF_HUB_OFFLINE and not Path(adapter).is_dir():
            problem = f"adapter {adapter} is not a local folder, and the hub cannot be reached"
            raise UserError(problem, "check its name and the network")
        raise UserError(f"adapter {adapter} has no {lacking}", "give a folder or a hub id that PEFT wrote")
    if find_spec("peft") is None:
        raise UserError(
            f"{adapter} has an adapter ({CONFIG}), which needs the package peft",
            f"run pip install peft, or remove {CONFIG} to run the weights without it",
        )
    digest = hashlib.sha256()
    with readable(f"adapter {adapter}"):
        for file in (config, weights):
            feed(digest, file)
    return digest.hexdigest()


def merged(model: PreTrainedModel, adapter: str, revision: str | None) -> PreTrainedModel:
    """Return the model with an adapter merged into its weights.

    Raises:
        UserError: the adapter changes no weights, or was made for another model.
    """
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(adapter, revision=revision)
    if config.is_prompt_learning:
        raise UserError(f"adapter {adapter} is a prompt adapter and changes no weights", "give another (LoRA)")
    if getattr(config, "layer_replication", None):
        raise UserError(
            f"adapter {adapter} repeats layers (layer_replication), which share the weights it would change",
            "merge it with PEFT and give the merged model",
        )
    tuned = PeftModel(model, config)
    keys = tuned.load_adapter(adapter, "default", torch_device="cpu", revision=revision)
    if strange := [*keys.missing_keys, *keys.unexpected_keys]:
        raise UserError(
            f"adapter {adapter} does not fit the model: {len(strange)} weights have no counterpart ({min(strange)})",
            f"give the adapter's own model (base_model_name_or_path in its {CONFIG})",
        )
    return tuned.merge_and_unload(safe_merge=True)
