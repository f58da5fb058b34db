"""A model in memory, as `dart_eval.evaluate` takes it. Its weights give its identity."""

from __future__ import annotations

import copy
import hashlib
import inspect
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dart_eval.layers.guard import refuse_second
from dart_eval.layers.projection import adapter_state
from dart_eval.models.loading import Identity, ModelSpec, Resolved
from dart_eval.util.errors import UserError
from dart_eval.util.source import source_hash
from dart_eval.weights.checkpoint import check_tokenizer

PASSING = ("_name_or_path", "transformers_version")  # origin of a configuration
LIBRARIES = ("transformers", "torch")  # whose versions are part of the key
OF_FORWARDS = ("training", "gradient_checkpointing", "max_seq_len_cached")  # settings of parts that come and go
PLAIN = (bool, int, float, str)
MOVING = ("dynamic", "longrope")  # kinds of rotary angles that a long text changes
OF_A_CALL = ("padding", "truncation")  # settings that a tokenizer's last call leaves behind


@dataclass(frozen=True)
class Loaded(Resolved):
    """A model in memory and its tokenizer, in place of one that must be loaded."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def device(self) -> str:
        """Type of the model's device."""
        return str(self.model.device.type)

    def load(self, note: Callable[[str], None] = lambda text: None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Return the model itself in eval mode, and a copy of its tokenizer, which lm-eval changes."""
        return self.model.eval(), copy.deepcopy(self.tokenizer)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return a copy of the tokenizer."""
        return copy.deepcopy(self.tokenizer)

    def outline(self) -> PreTrainedModel:
        """Return the model."""
        return self.model


def loaded(model: object, tokenizer: object) -> Loaded:
    """Wrap a model in memory with its identity: a hash of its weights, its configuration and its tokenizer.

    Args:
        model: a causal language model of transformers.
        tokenizer: of this model.

    Raises:
        UserError: another kind of model, one under `prune()` or without weights, or a missing or unfit tokenizer.
    """
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"the model is of type {type(model).__name__}, not a model of transformers",
            "give its name as text, or a PreTrainedModel (of a PEFT model what merge_and_unload() returns)",
        )
    refuse_second(model)
    name = _name(model)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError(f"model {name} comes without a tokenizer", "give evaluate(model, tokenizer, ...)")
    if any(p.is_meta for p in model.parameters()):
        raise UserError(f"weights of model {name} are not in memory", "load it onto one device, or onto several GPUs")
    check_tokenizer(name, model, tokenizer)
    dtype = str(model.dtype).removeprefix("torch.")
    identity = Identity(name, None, _hash(model, tokenizer), loaded=True)
    return Loaded(ModelSpec(name), name, identity, dtype, model, tokenizer, config=model.config)


def _name(model: PreTrainedModel) -> str:
    """Return the name that the model was loaded from, a folder by its last part; its class if unknown."""
    name = str(getattr(model.config, "_name_or_path", "") or "")
    return (Path(name).resolve().name if Path(name).exists() else name) if name else type(model).__name__


def _hash(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the sha256 of everything that answers depend on."""
    digest = hashlib.sha256()
    config = {k: v for k, v in model.config.to_dict().items() if k not in PASSING}
    generation = model.generation_config.to_dict() if model.generation_config is not None else {}
    settings = {
        "config": config,
        "attention": model.config._attn_implementation,
        "generation": {k: v for k, v in generation.items() if k not in PASSING},
        "code": _code(type(model)),
        "modules": _modules(model),
        "tokenizer": _tokens(tokenizer),
    }
    if adapters := {name: adapter_state(m) for name, m in model.named_modules() if hasattr(m, "base_layer")}:
        settings["adapters"] = adapters
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, part in _weights(model):
        what = (part.dtype, tuple(part.shape)) if isinstance(part, torch.Tensor) else part
        digest.update(f"{name}\0{what!r}\0".encode())
        if isinstance(part, torch.Tensor):
            digest.update(_bytes(part))
    return digest.hexdigest()


def _weights(model: PreTrainedModel) -> Iterator[tuple[str, object]]:
    """Yield the state of a model and its other buffers, each plain tensor once."""
    seen = set()
    for name, weight in itertools.chain(_state(model), _buffers(model)):
        if isinstance(weight, torch.Tensor) and not weight.is_quantized and not hasattr(weight, "__tensor_flatten__"):
            if (place := (weight.data_ptr(), weight.shape, weight.stride())) in seen:  # tied
                continue
            seen.add(place)
        yield from _parts(name, weight)


def _state(model: PreTrainedModel) -> Iterator[tuple[str, object]]:
    quantised_modules = [(n, m) for n, m in model.named_modules() if hasattr(getattr(m, "weight", None), "quant_state")]
    if not quantised_modules:
        yield from model.state_dict().items()
        return
    yield from model.named_parameters()  # a state dict would change such weights: see `quantised`
    for name, module in quantised_modules:
        yield from ((f"{name}.{k}", part) for k, part in vars(module.weight.quant_state).items())


def _buffers(model: PreTrainedModel) -> Iterator[tuple[str, object]]:
    for name, part in model.named_modules():
        if not any(kind in str(getattr(part, "rope_type", "")) for kind in MOVING):
            yield from ((f"{name}.{own}", buffer) for own, buffer in part.named_buffers(recurse=False))


def _parts(name: str, value: object) -> Iterator[tuple[str, object]]:
    """Yield what an entry of a state consists of: plain tensors, and other values with their names."""
    parts: dict[str, object] = {}
    if isinstance(value, (tuple, list)):
        parts = {str(i): part for i, part in enumerate(value)}
    elif hasattr(value, "__tensor_flatten__"):  # torchao
        names, context = value.__tensor_flatten__()
        parts = {"context": f"{type(value).__qualname__} {context!r}"} | {n: getattr(value, n) for n in names}
    elif isinstance(value, torch.Tensor) and value.is_quantized:  # torch's own
        channels = "channel" in str(value.qscheme())
        scales = value.q_per_channel_scales() if channels else value.q_scale()
        points = value.q_per_channel_zero_points() if channels else value.q_zero_point()
        parts = {"codes": value.int_repr(), "scales": scales, "points": points}
    else:
        yield name, value
    for inner, part in parts.items():
        yield from _parts(f"{name}.{inner}", part)


@torch.no_grad()
def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _modules(model: PreTrainedModel) -> dict[str, str]:
    """Return the class of each part of a model, and its settings: those of an activation, the epsilon of a norm."""
    code = {kind: _code(kind) for kind in {type(part) for part in model.modules()}}
    found: dict[str, str] = {}
    for name, part in model.named_modules():
        own = {k: v for k, v in vars(part).items() if not k.startswith("_") and k not in OF_FORWARDS}
        found[name] = f"{code[type(part)]} {sorted((k, v) for k, v in own.items() if isinstance(v, PLAIN))}"
    return found


def _code(cls: type[object]) -> str:
    """Return the class of a model or of its part, with a hash of its module if it is from neither library."""
    module = inspect.getmodule(cls)
    where = f"{cls.__module__}.{cls.__qualname__}"
    if module is None or cls.__module__.split(".")[0] in LIBRARIES:
        return where
    try:
        return f"{where} {source_hash(inspect.getsource(module))}"
    except (OSError, TypeError):  # typed at a prompt
        return where


def _tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """Return everything that decides a tokenizer's output."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    inner = json.loads(fast.to_str()) if fast is not None else dict(tokenizer.get_vocab())
    return {
        "class": type(tokenizer).__qualname__,
        "inner": {k: v for k, v in inner.items() if k not in OF_A_CALL} if fast is not None else inner,
        "special": tokenizer.special_tokens_map,
        "template": getattr(tokenizer, "chat_template", None),
        "longest": tokenizer.model_max_length,
        "bos": getattr(tokenizer, "add_bos_token", None),
        "eos": getattr(tokenizer, "add_eos_token", None),
    }
