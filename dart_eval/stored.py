"""How many bits an FFN weight has in the files of a quantised checkpoint.

Some libraries expand weights while they load them (fp8 on a CPU, mxfp4), others before the first forward
(compressed-tensors), so what lies in memory does not say what a kernel for few bits would read. The headers of the
files do.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils.quantization_config import Mxfp4Config

from dart_eval import quantised
from dart_eval.checkpoint import model_file
from dart_eval.errors import UserError
from dart_eval.experts import Step
from dart_eval.ffn import FFN, describe, features

KEPT = ("torchao", "bitsandbytes")  # what stays as it is stored, and is counted there
# What stands beside weights in a file, and is no part of what a product reads of them. g_idx is GPTQ's group of an
# input: one number for a whole column, which is read only where columns were put in another order.
NO_PART = (
    "bias", "weight_shape", "input_scale", "activation_scale", "input_global_scale", "input_zero_point", "g_idx",
)  # fmt: skip
OTHER_PARTS = ("visual", "vision", "audio")  # of a model of images and text, with names like those of its text part


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


def note_bits(config: Any, source: str, revision: str | None, model: Any) -> list[str]:
    """Note how many bits the FFN weights of a model that was just loaded have in its files.

    Args:
        config: as it was before it was loaded: where weights are expanded, the loaded one does not say so.
        source: its folder, or its name on the hub. revision: there.

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
    sizes = _sizes(source, revision)
    names = {id(module): name for name, module in model.named_modules()}
    unknown = 0
    for ffn in ffns:
        for module in ffn.projections:
            found = _bits(ffn, module, names, sizes)
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


def _bits(ffn: FFN, module: nn.Module, names: Mapping[int, str], sizes: Mapping[str, float]) -> float:
    """Bits of a weight of one projection in the files; 0: they do not say."""
    if not isinstance(module, Step):
        if not (name := names.get(id(module), "")):
            return 0.0
        return sum(_of(name + ".", sizes)) / math.prod(features(module))
    # Experts may be one tensor, or a module each, under names that the library changes: all of a layer are counted.
    steps = [m for m in ffn.projections if isinstance(m, Step)]
    weights = sum(math.prod(s.held.shape) for s in steps if isinstance(s.held, Tensor))
    name = names.get(id(module.routed.experts), "")
    found = sum(_of(name + ".", sizes)) if name else 0.0
    layer = re.compile(rf"(?:^|\.){ffn.layer}\..*\bexperts\b")
    if not found:
        found = sum(b for key, b in sizes.items() if layer.search(key) and "shared" not in key and _counts(key))
    return found / weights if weights else 0.0


def _of(prefix: str, sizes: Mapping[str, float]) -> Iterator[float]:
    """Bits of the tensors of a module: of its very name, else of what follows the number of its layer."""
    found = [bits for key, bits in sizes.items() if key.startswith(prefix) and _counts(key)]
    if not found and (tail := re.search(r"\.(\d+\..*)", prefix)):
        end = "." + tail.group(1)
        found = [bits for key, bits in sizes.items() if end in key and _counts(key)]
    yield from found


def _counts(key: str) -> bool:
    last = key.rpartition(".")[2]
    return not last.endswith(NO_PART) and not any(part in key for part in OTHER_PARTS)


def shards_of(source: str, revision: str | None) -> list[str]:
    """The files of a checkpoint's weights; none where they are not safetensors."""
    whole, index = (model_file(source, f"model.safetensors{end}", revision) for end in ("", ".index.json"))
    if whole is not None:
        return ["model.safetensors"]
    return [] if index is None else sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))


def _sizes(source: str, revision: str | None) -> dict[str, float]:
    """Name -> bits of every tensor of a checkpoint, from the headers of its files; empty where it has none of these."""
    found: dict[str, float] = {}
    for shard in shards_of(source, revision):
        if (file := model_file(source, shard, revision)) is None:
            continue
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - no mapping
                part = opened.get_slice(key)
                found[key] = float(math.prod(part.get_shape()) * _width(part.get_dtype()))
    return found


def _width(dtype: str) -> int:
    """Bits of an entry by its name in a file: F8_E4M3, BF16, I32, BOOL."""
    digits = re.search(r"\d+", dtype)
    return int(digits.group()) if digits else 8
