"""The model as it is: the control."""

from __future__ import annotations

from typing import ClassVar

from dart_eval.pruning.method import Method


class Dense(Method):
    """The model as it is: the control."""

    name = "dense"
    summary = "runs the model unpruned (control)"
    recorded: ClassVar = {"mask": "everything", "choice": "none", "allocation": "uniform"}
    prunes = False
    sized = False
