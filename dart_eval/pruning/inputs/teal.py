"""Columns of inputs above a number, after TEAL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dart_eval.pruning.inputs.entries import Entries, Inputs

if TYPE_CHECKING:
    from torch import Tensor

    from dart_eval.layers.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Above(Entries):
    """A token reads the columns of the inputs with |x_i| > t, a threshold for each layer and kind of input, after TEAL
    (arXiv 2408.14690; TEAL at 5baaec8, `utils/utils.py`).

    t is the quantile of |x| over all inputs and tokens of a text: of x for gate and up, of h for down. How many columns
    a token reads varies and is measured. TEAL takes t off a histogram of x in 10 000 bins (1 % of outliers beyond it),
    of which it assumes a mean of 0 and equal sides, on Alpaca; and it finds the sparsity of each matrix by a greedy
    search, which is left out here: every matrix has the same. Attention, which TEAL thins too, is dense here.
    """

    name = "threshold"
    summary = "reads the columns of inputs above a threshold per layer, from a calibration text (its read varies)"
    granularity = "input channels"
    by_token = True
    calibrates = True

    def columns_read(self, x: Tensor, inputs: Inputs) -> Tensor:
        assert inputs.threshold is not None
        return x.abs() > inputs.threshold

    def flops_per_step(self, shape: ModelShape, mask: float) -> float:
        return shape.layers * shape.width + mask  # gate and up have one input
