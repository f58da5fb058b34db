"""A module's forward, replaced for a while."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Forward:
    """A module's forward that can be replaced and restored.

    Args:
        module: may have a forward of its own already, which comes back.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.before = module.__dict__.get("forward")

    def replace(self, forward: Callable[..., Tensor]) -> None:
        """Let the module run this one."""
        # Not by attribute: a module's __setattr__ would take longer than all the rest.
        self.module.__dict__["forward"] = forward

    def put_back(self) -> None:
        """Let the module run its own."""
        if self.before is None:
            self.module.__dict__.pop("forward", None)
        else:
            self.module.__dict__["forward"] = self.before
