"""NaN and infinity: a model that computes them is refused, so that they do not become results."""

from __future__ import annotations

import torch
from torch import Tensor

from dart_eval.util.errors import UserError

REMEDY = (
    "its weights may hold NaN, or its numbers do not fit the dtype: try --dtype bfloat16 or float32, or other weights"
)


def refuse_not_finite(values: Tensor, what: str, dtype: torch.dtype | None = None) -> None:
    """Refuse NaN and infinity.

    Args:
        what: name of the values, such as `inputs of the FFN of layer 3`.
        dtype: that they were computed in, if not their own.

    Raises:
        UserError: with the number of values that are not finite.
    """
    wrong = int((~values.isfinite()).sum())
    if wrong:
        name = str(dtype or values.dtype).removeprefix("torch.")
        raise UserError(f"the model computes NaN or infinity in {name}: {wrong} of {values.numel()} {what}", REMEDY)
