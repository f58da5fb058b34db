"""The bits of an FFN weight in the files of a quantised checkpoint.

Some libraries expand weights while they load them (fp8 on a CPU, mxfp4), others before the first forward
(compressed-tensors). The bytes in memory then differ from those of a low-bit kernel, which the files' headers give.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils.quantization_config import BitsAndBytesConfig, Mxfp4Config

from dart_eval.layers import quantised
from dart_eval.layers.ffn import FFN
from dart_eval.layers.find import describe
from dart_eval.layers.projection import Step, features
from dart_eval.util.bits import OWN_BITS
from dart_eval.util.errors import UserError
from dart_eval.util.text import Json
from dart_eval.weights.checkpoint import weight_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

IN_MEMORY = ("torchao", "bitsandbytes")  # libraries whose weights stay as stored, and are counted in memory
# Tensors beside weights in a file that a product does not read. GPTQ's g_idx, a number per column, is neglected.
NO_PART = (
    "bias", "weight_shape", "input_scale", "activation_scale", "input_global_scale", "input_zero_point", "g_idx",
)  # fmt: skip
EXPANDED = ("compressed-tensors", "mxfp4", "fp8")  # plain numbers once loaded; fp8 on a CPU
# Parts of a multimodal model, with names like those of its text part.
OTHER_PARTS = ("visual", "vision", "image", "audio", "mtp", "talker")


def quantisation_of(config: PretrainedConfig) -> Json:
    """Return the quantisation settings of a configuration; empty if its checkpoint is not quantised."""
    settings = getattr(config, "quantization_config", None)
    settings = settings or getattr(config.get_text_config(), "quantization_config", None) or {}
    return dict(settings) if isinstance(settings, Mapping) else settings.to_dict()


def method_of(config: PretrainedConfig) -> str | None:
    """Return the quantisation method of a checkpoint by its configuration, or None."""
    name = quantisation_of(config).get("quant_method")
    return None if name is None else str(getattr(name, "value", name))


def note_loading(config: PretrainedConfig, load_in: str) -> None:
    """Note in a configuration that bitsandbytes quantises the weights while they are loaded: 4bit or 8bit.

    Raises:
        UserError: bitsandbytes is missing.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"--load-in {load_in} needs the package bitsandbytes", "pip install bitsandbytes")
    config.quantization_config = BitsAndBytesConfig(**{f"load_in_{load_in}": True}).to_dict()


def options(config: PretrainedConfig, load_in: str | None = None) -> dict[str, object]:
    """Return further arguments of `from_pretrained` for weights that are quantised, or will be (`note_loading`)."""
    if load_in is not None:
        return {"quantization_config": BitsAndBytesConfig(**{f"load_in_{load_in}": True})}
    # The kernels for mxfp4 do not expose h, which masks act on, so the weights are expanded.
    return {"quantization_config": Mxfp4Config(dequantize=True)} if method_of(config) == "mxfp4" else {}


def expand(model: Any) -> None:
    """Expand compressed-tensors' weights now, not in the first forward of the whole model: parts run before it."""
    if hasattr(model, "ct_decompress_hook"):
        model.hf_quantizer.compressor.decompress_model(model)


def note_bits(config: PretrainedConfig, files: Files, model: PreTrainedModel) -> list[str]:
    """Note the bits of a loaded model's FFN weights in its files.

    Args:
        config: of the model before it was loaded, since that of expanded weights lacks the quantisation.
        files: of the checkpoint.

    Returns:
        Notes for the user on projections without bits.
    """
    method = method_of(config)
    if method is None or method in IN_MEMORY:
        return []
    try:
        ffns = describe(model)
    except UserError:  # the model is refused later, with the reason
        return []
    names = {id(module): name for name, module in model.named_modules()}
    unknown = 0
    for ffn in ffns:
        for module in ffn.projections:
            bits = _bits(ffn, module, names, files)
            unknown += not bits
            if bits:
                quantised.note(module, bits)
    if not unknown:
        return []
    total = sum(len(f.projections) for f in ffns)
    return [
        f"the files of this {method} checkpoint do not say how many bits {unknown} of {total} FFN projections have: "
        "their reads count what lies in memory"
    ]


def note_forms(config: PretrainedConfig, model: PreTrainedModel) -> None:
    """Note which FFN weights of a model without weights will stay quantised when it is loaded."""
    settings, method = quantisation_of(config), method_of(config)
    if method is None or method in EXPANDED:
        return
    skipped = settings.get("llm_int8_skip_modules") or settings.get("modules_to_not_convert") or ()
    ffns, names = describe(model), {id(module): name for name, module in model.named_modules()}
    for module in (m for f in ffns for m in f.projections if not isinstance(m, Step)):
        if not any(part in names[id(module)] for part in skipped):
            quantised.note_form(module, f"are quantised ({method})")
            if method in IN_MEMORY:
                quantised.note(module, 4 if settings.get("load_in_4bit") else 8)  # without scales: enough to refuse by


def _bits(ffn: FFN, module: nn.Module, names: Mapping[int, str], files: Files) -> float:
    """Return the bits of a projection's weight in the files; 0 if unknown."""
    if not isinstance(module, Step):
        weights = math.prod(features(module))
        return files.bits(files.tensors_of(names[id(module)]), weights) / weights if id(module) in names else 0.0
    # Experts may be one tensor or a module each, under names that the library changes: count all of a layer.
    steps = [m for m in ffn.projections if isinstance(m, Step)]
    weights = sum(math.prod(s.held.shape) for s in steps if isinstance(s.held, Tensor))
    name = names.get(id(module.routed.experts), "")
    tensors = (files.tensors_of(name) if name else []) or files.experts(ffn.number)
    return files.bits(tensors, weights) / weights if weights else 0.0


class Files:
    """The weights of a checkpoint by the headers of its safetensors files.

    Args:
        source: a folder, or a name on the hub.
        revision: on the hub.
    """

    def __init__(self, source: str, revision: str | None) -> None:
        self._place = source, revision

    @functools.cached_property
    def _held(self) -> dict[str, tuple[Path, int, str]]:
        """Name -> file, entries, dtype."""
        tensors: dict[str, tuple[Path, int, str]] = {}
        source, revision = self._place
        for file in weight_files(source, "model.safetensors", revision):
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - no mapping
                    part = opened.get_slice(key)
                    tensors[key] = file, math.prod(part.get_shape()), part.get_dtype()
        return tensors

    def tensors_of(self, name: str) -> list[str]:
        """Return the tensors of a module: under its name, else under the part of it from the layer's number on.

        The text part of a multimodal model may have another root in its file than in memory. If several roots fit,
        those of other parts left out, the result is empty.
        """
        keys = [key for key in self._held if key.startswith(f"{name}.")]
        if keys or not (tail := re.search(r"\.\d+\..*", name)):
            return keys
        by_root: dict[str, list[str]] = {}
        for key in self._held:
            root, end, _ = key.partition(f"{tail.group()}.")
            if end and not any(part in key for part in OTHER_PARTS):
                by_root.setdefault(root, []).append(key)
        return next(iter(by_root.values())) if len(by_root) == 1 else []

    def experts(self, layer: int) -> list[str]:
        """Return the tensors of a layer's routed experts, whatever they are called."""
        wanted = re.compile(rf"\.{layer}\..*\bexperts\b")
        return [
            key for key in self._held
            if wanted.search(key) and "shared" not in key and not any(part in key for part in OTHER_PARTS)
        ]  # fmt: skip

    def bits(self, names: Iterable[str], weights: int) -> float:
        """Return the bits of these tensors. weights: their number; 32-bit weights count as served 16-bit ones."""
        total = 0.0
        for name in names:
            _, entries, dtype = self._held[name]
            if not name.endswith(NO_PART):
                total += entries * min(_width(dtype), OWN_BITS if entries == weights else math.inf)
        return total


def _width(dtype: str) -> int:
    """Return the bits of a file's dtype: F8_E4M3, BF16, I32, BOOL."""
    digits = re.search(r"\d+", dtype)
    return int(digits.group()) if digits else 8
