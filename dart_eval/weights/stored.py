"""How many bits an FFN weight has in the files of a quantised checkpoint.

Some libraries expand weights while they load them (fp8 on a CPU, mxfp4), others before the first forward
(compressed-tensors), so what lies in memory does not say what a kernel for few bits would read. The headers of the
files do.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils.quantization_config import Mxfp4Config

from dart_eval.layers import quantised
from dart_eval.layers.ffn import FFN
from dart_eval.layers.find import describe
from dart_eval.layers.projection import Step, features
from dart_eval.util.bits import OWN_BITS
from dart_eval.util.errors import UserError
from dart_eval.weights.checkpoint import weight_files

KEPT = ("torchao", "bitsandbytes")  # what stays as it is stored, and is counted there
# What stands beside weights in a file, and is no part of what a product reads of them. GPTQ's g_idx, one number for a
# whole column, is neglected.
NO_PART = (
    "bias", "weight_shape", "input_scale", "activation_scale", "input_global_scale", "input_zero_point", "g_idx",
)  # fmt: skip
EXPANDED = ("compressed-tensors", "mxfp4", "fp8")  # what is plain numbers once it is loaded; fp8 on a CPU
# Of a model of several parts, with names like those of its text part.
OTHER_PARTS = ("visual", "vision", "image", "audio", "mtp", "talker")


def told_of(config: Any) -> dict[str, Any]:
    """What a configuration says of how its checkpoint is quantised; empty: it is not."""
    found = getattr(config, "quantization_config", None)
    found = found or getattr(config.get_text_config(), "quantization_config", None) or {}
    return dict(found) if isinstance(found, Mapping) else found.to_dict()


def method_of(config: Any) -> str | None:
    """How a checkpoint is quantised, by its configuration; None: it is not."""
    name = told_of(config).get("quant_method")
    return None if name is None else str(getattr(name, "value", name))


def options(config: Any) -> dict[str, Any]:
    """What transformers is told of a quantised checkpoint beside what it says itself."""
    # The kernels for mxfp4 do not hand out h, which masks act on: the weights are expanded.
    return {"quantization_config": Mxfp4Config(dequantize=True)} if method_of(config) == "mxfp4" else {}


def expand(model: Any) -> None:
    """Expand now what compressed-tensors would expand in the first forward of the whole model: parts run before it."""
    if hasattr(model, "ct_decompress_hook"):
        model.hf_quantizer.compressor.decompress_model(model)


def note_bits(config: Any, files: Files, model: Any) -> list[str]:
    """Note how many bits the FFN weights of a model that was just loaded have in its files.

    Args:
        config: as it was before it was loaded: where weights are expanded, the loaded one does not say so.
        files: of the checkpoint.

    Returns:
        What is to be told: whether some were not found.
    """
    method = method_of(config)
    if method is None or method in KEPT:
        return []
    try:
        ffns = describe(model)
    except UserError:  # it is refused later, with the reason
        return []
    names = {id(module): name for name, module in model.named_modules()}
    unknown = 0
    for ffn in ffns:
        for module in ffn.projections:
            found = _bits(ffn, module, names, files)
            unknown += not found
            if found:
                quantised.note(module, found)
    if not unknown:
        return []
    total = sum(len(f.projections) for f in ffns)
    return [
        f"the files of this {method} checkpoint do not say how many bits {unknown} of {total} FFN projections have: "
        "their reads count what lies in memory"
    ]


def note_forms(config: Any, model: Any) -> None:
    """Note of a model without weights which of its FFN weights will stay quantised when it is loaded."""
    told, method = told_of(config), method_of(config)
    if method is None or method in EXPANDED:
        return
    skipped = told.get("llm_int8_skip_modules") or told.get("modules_to_not_convert") or ()
    ffns, names = describe(model), {id(module): name for name, module in model.named_modules()}
    for module in (m for f in ffns for m in f.projections if not isinstance(m, Step)):
        if not any(part in names[id(module)] for part in skipped):
            quantised.note_form(module, f"are quantised ({method})")
            if method in KEPT:
                quantised.note(module, 4 if told.get("load_in_4bit") else 8)  # without scales: enough to refuse by


def _bits(ffn: FFN, module: nn.Module, names: Mapping[int, str], files: Files) -> float:
    """Bits of a weight of one projection in the files; 0: they do not say."""
    if not isinstance(module, Step):
        weights = math.prod(features(module))
        return files.bits(files.tensors_of(names[id(module)]), weights) / weights if id(module) in names else 0.0
    # Experts may be one tensor, or a module each, under names that the library changes: all of a layer are counted.
    steps = [m for m in ffn.projections if isinstance(m, Step)]
    weights = sum(math.prod(s.held.shape) for s in steps if isinstance(s.held, Tensor))
    name = names.get(id(module.routed.experts), "")
    found = (files.tensors_of(name) if name else []) or files.experts(ffn.number)
    return files.bits(found, weights) / weights if weights else 0.0


class Files:
    """The weights of a checkpoint by the headers of its files; none where these are not safetensors.

    Args:
        source: a folder, or a name on the hub. revision: there.
    """

    def __init__(self, source: str, revision: str | None) -> None:
        self._place = source, revision

    @functools.cached_property
    def _held(self) -> dict[str, tuple[Path, int, str]]:
        """Name -> file, entries, dtype; read when it is first asked for."""
        found: dict[str, tuple[Path, int, str]] = {}
        source, revision = self._place
        for file in weight_files(source, "model.safetensors", revision):
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - no mapping
                    part = opened.get_slice(key)
                    found[key] = file, math.prod(part.get_shape()), part.get_dtype()
        return found

    def tensors_of(self, name: str) -> list[str]:
        """The tensors of a module: under its very name, else under what follows the number of its layer there.

        The text part of a model of several may have another root in its file than in memory. None are found where
        several roots fit: those of other parts are left out.
        """
        found = [key for key in self._held if key.startswith(f"{name}.")]
        if found or not (tail := re.search(r"\.\d+\..*", name)):
            return found
        by_root: dict[str, list[str]] = {}
        for key in self._held:
            root, end, _ = key.partition(f"{tail.group()}.")
            if end and not any(part in key for part in OTHER_PARTS):
                by_root.setdefault(root, []).append(key)
        return next(iter(by_root.values())) if len(by_root) == 1 else []

    def experts(self, layer: int) -> list[str]:
        """The tensors of a layer's routed experts, whatever they are called."""
        wanted = re.compile(rf"\.{layer}\..*\bexperts\b")
        return [
            key for key in self._held
            if wanted.search(key) and "shared" not in key and not any(part in key for part in OTHER_PARTS)
        ]  # fmt: skip

    def bits(self, names: Iterable[str], weights: int) -> float:
        """Bits of these tensors. weights: how many stand in them; of 32 bits they count as the 16 of a served one."""
        found = 0.0
        for name in names:
            _, entries, dtype = self._held[name]
            if not name.endswith(NO_PART):
                found += entries * min(_width(dtype), OWN_BITS if entries == weights else math.inf)
        return found

    def tensor(self, name: str, part: str) -> Tensor | None:
        """A tensor of a module by the last part of its name; None where there is none."""
        for key in self.tensors_of(name):
            if key.endswith(f".{part}"):
                with safe_open(self._held[key][0], framework="pt") as opened:
                    return opened.get_tensor(key)
        return None


def _width(dtype: str) -> int:
    """Bits of an entry by its name in a file: F8_E4M3, BF16, I32, BOOL."""
    digits = re.search(r"\d+", dtype)
    return int(digits.group()) if digits else 8
