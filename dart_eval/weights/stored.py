"""Quantised checkpoints: how transformers loads them, and the bits of their FFN weights by their configuration."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from transformers.utils.quantization_config import BitsAndBytesConfig, Mxfp4Config

from dart_eval.layers.experts import ExpertProjection
from dart_eval.layers.find import describe
from dart_eval.layers.quantised import RECORDS, Record, method_of, quantisation_of, stated_bits
from dart_eval.util.bits import OWN_BITS

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

EXPANDED = ("compressed-tensors", "mxfp4", "fp8")  # plain numbers once loaded; fp8 on a CPU
SKIPPED = ("llm_int8_skip_modules", "modules_to_not_convert", "ignore")  # settings that name plain modules


def quantise_while_loading(config: PretrainedConfig, load_in: str) -> None:
    """Let bitsandbytes quantise the weights while they are loaded. load_in: 4bit or 8bit."""
    config.quantization_config = BitsAndBytesConfig(**{f"load_in_{load_in}": True}).to_dict()


def options(config: PretrainedConfig, load_in: str | None = None) -> dict[str, object]:
    """Return further arguments of `from_pretrained` for weights that are quantised, or will be."""
    if load_in is not None:
        return {"quantization_config": BitsAndBytesConfig(**{f"load_in_{load_in}": True})}
    # The kernels for mxfp4 do not expose h, which masks act on, so the weights are expanded.
    return {"quantization_config": Mxfp4Config(dequantize=True)} if method_of(config) == "mxfp4" else {}


def expand(model: Any) -> None:
    """Expand compressed-tensors' weights now, not in the first forward of the whole model: parts run before it."""
    if hasattr(model, "ct_decompress_hook"):
        model.hf_quantizer.compressor.decompress_model(model)


def record_bits(config: PretrainedConfig, model: PreTrainedModel) -> list[str]:
    """Record the bits of a checkpoint's FFN weights where the model itself does not show that they are quantised.

    Of a loaded model these are weights that were expanded, of one without weights all.

    Args:
        config: of the model before it was loaded, since that of expanded weights lacks the quantisation.

    Returns:
        A note for the user if the configuration does not say the bits.
    """
    method, bits = method_of(config), stated_bits(config)
    if method is None:
        return []
    expanded, settings = method in EXPANDED, quantisation_of(config)
    skipped = [str(part) for name in SKIPPED for part in settings.get(name) or ()]
    names = {id(module): name for name, module in model.named_modules()}
    hidden = [m for f in describe(model) for m in f.projections if expanded or not isinstance(m, ExpertProjection)]
    for module in hidden if expanded or model.device.type == "meta" else ():
        name = names.get(id(module), "")
        if not any(re.match(part[3:], name) if part.startswith("re:") else part in name for part in skipped):
            RECORDS[module] = Record(bits, None if expanded else f"are quantised ({method})")
    if bits.code < OWN_BITS:
        return []
    return [f"the configuration of this {method} checkpoint does not say how many bits a weight has: reads count 16"]
