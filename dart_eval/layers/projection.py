"""One projection of a model, however its weight is stored: its matrix and its sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dart_eval.layers import quantised
from dart_eval.layers.experts import ExpertProjection
from dart_eval.util.errors import UserError


def weight_matrix(linear: nn.Module) -> Tensor:
    """Return a projection's weight as [out, in], to be read. Quantised weights are computed (`quantised.values`)."""
    if encoded(linear) and not isinstance(linear, ExpertProjection):
        return quantised.values(linear, features(linear)[0])
    return plain_matrix(linear)


def plain_matrix(linear: nn.Module) -> Tensor:
    """Return a projection's weight as [out, in], to be changed or copied. GPT-2's Conv1D stores it transposed.

    Raises:
        UserError: the weight is not a matrix of plain numbers.
    """
    if reason := encoded(linear):
        raise UserError(
            f"the weights of {type(linear).__name__} {reason}: others cannot stand in their place",
            "load the model unquantised and merge adapters, or use a method that leaves weights as they are",
        )
    if isinstance(linear, ExpertProjection):
        return linear.matrix()
    refuse_offloaded(linear)
    weight: Any = linear.weight
    return weight.T if is_conv1d(linear) else weight


PLAIN = (Tensor, nn.Parameter)  # types of plain numbers


def encoded(linear: nn.Module) -> str | None:
    """Return why a projection's weight is not a matrix of plain numbers (`are ...`), or None."""
    if hasattr(linear, "base_layer"):  # of PEFT, whose `weight` is that without the adapter
        return "carry an adapter"
    if (record := quantised.RECORDS.get(linear)) is not None and record.form is not None:
        return record.form
    of_experts = isinstance(linear, ExpertProjection)
    weight = linear.parameter if isinstance(linear, ExpertProjection) else getattr(linear, "weight", None)
    if weight is None:
        return "are kept in a form of their own"
    if type(weight) not in PLAIN:  # a library's own tensor, whatever dtype it claims to have
        return f"are quantised or wrapped ({type(weight).__name__})"
    if not weight.is_floating_point() or weight.element_size() < 2 or weight.dim() != 2 + of_experts:
        return f"are quantised ({str(weight.dtype).removeprefix('torch.')})"
    return None


def is_conv1d(linear: object) -> bool:
    """Whether this is GPT-2's projection, whose weight is stored [in, out]."""
    return type(linear).__name__ == "Conv1D"


def features(linear: Any) -> tuple[int, int]:
    """Return the (in, out) features of a projection without touching its (perhaps quantised) weight."""
    if is_conv1d(linear):
        return int(linear.nx), int(linear.nf)
    return int(linear.in_features), int(linear.out_features)


def bias_of(linear: Any) -> Tensor | None:
    """Return the bias of a projection, however its weights are stored."""
    return getattr(linear, "bias", None)


def offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps the parameters of a module elsewhere between its forwards."""
    return "_hf_hook" in vars(module) and any(p.is_meta for p in module.parameters(recurse=False))


def refuse_offloaded(linear: nn.Module) -> None:
    """Refuse to read weights that are in memory only while their module runs.

    Raises:
        UserError: the module is offloaded.
    """
    if offloaded(linear):
        raise UserError(
            f"the weights of {type(linear).__name__} are offloaded: they are in memory only while it runs",
            "load the model without offload, or take a method that reads no weights, such as griffin",
        )


def input_device(model: Any) -> torch.device:
    """Return the device of a model's input tokens."""
    embeddings = model.get_input_embeddings()
    return embeddings._hf_hook.execution_device if offloaded(embeddings) else embeddings.weight.device
