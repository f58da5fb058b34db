"""What methods may know of a model before any prompt: activations on a text, projections onto the vocabulary.

Computed once, when a method asks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dart_eval.errors import UserError
from dart_eval.ffn import FFN, find_ffns
from dart_eval.files import read_text
from dart_eval.pruning.vocabulary import Projection, project
from dart_eval.trial import evaluating

Observe = Callable[[Tensor, Tensor | None, Tensor], Tensor | None]
DEFAULT_TEXT = Path(__file__).parent.parent / "data" / "calibration.txt"
SEGMENT = 512  # tokens per forward, as far as the model has positions: enough for context, not too many for memory


@runtime_checkable
class Calibration(Protocol):
    """What a method may look at before any prompt is seen."""

    @property
    def ffns(self) -> list[FFN]:
        """The model's FFNs, layer by layer."""
        ...

    def sums(self, observe: Observe) -> list[Tensor]:
        """Per layer [F] fp32: the sum over the calibration text's tokens of what `observe` makes of them."""
        ...

    def projection(self) -> list[Projection]:
        """Per layer, what its neurons write to the vocabulary."""
        ...


class TextCalibration:
    """Calibration on a text file (by default the project's own, which no shipped task uses)."""

    def __init__(self, model: nn.Module, tokenizer: Any, path: str | Path | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.path = Path(path) if path is not None else DEFAULT_TEXT
        self._projection: list[Projection] | None = None

    @property
    def ffns(self) -> list[FFN]:
        return find_ffns(self.model)

    @torch.no_grad()
    def sums(self, observe: Observe) -> list[Tensor]:
        """Per layer [F] fp32: the sum over all tokens of what `observe` makes of them (`Part.observe`)."""
        return self._measure(observe)

    def projection(self) -> list[Projection]:
        """Per layer, what its neurons write to the vocabulary. A matrix product of the size of FFNs x vocabulary."""
        if self._projection is None:
            self._projection = project(self.model, self.ffns)
        return self._projection

    def _measure(self, observe: Observe) -> list[Tensor]:
        if self.tokenizer is None:
            raise UserError("this method calibrates on text and needs the tokenizer", "pass tokenizer= to prune()")
        text = read_text(self.path, "calibration text", "give a text file")
        ids = torch.tensor(self.tokenizer(text, verbose=False)["input_ids"])
        bos = getattr(self.tokenizer, "bos_token_id", None)
        skip = int(bos is not None and len(ids) > 0 and int(ids[0]) == bos)  # segments begin as prompts do, uncounted
        ids = ids[skip:]
        if len(ids) < 2:
            raise UserError(f"calibration text {self.path} is empty")
        totals: list[Tensor | None] = [None] * len(self.ffns)

        def watch(layer: int) -> Any:
            def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
                h = args[0].reshape(-1, args[0].shape[-1])[skip:]
                ones = torch.ones(1, len(h), device=h.device)
                sums = observe(h.float()[None], None, ones)
                assert sums is not None
                before = totals[layer]
                totals[layer] = sums[0] if before is None else before + sums[0]

            return hook

        handles = [f.down.register_forward_pre_hook(watch(f.layer)) for f in self.ffns]
        base = getattr(self.model, "base_model", self.model)
        device = self.model.get_input_embeddings().weight.device  # type: ignore[operator]
        config: Any = self.model.config
        positions = getattr(config.get_text_config(), "max_position_embeddings", None) or SEGMENT + skip
        try:
            with evaluating(self.model):
                for segment in ids.split(max(1, min(SEGMENT, positions - skip))):
                    start = torch.tensor([bos] * skip, dtype=segment.dtype)
                    base(input_ids=torch.cat([start, segment])[None].to(device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return [t for t in totals if t is not None]


def means(calibration: Calibration, observe: Observe) -> list[Tensor]:
    """Per layer [F] fp32: the mean over the calibration text's tokens of what `observe` makes of them."""

    def counting(h: Tensor, up: Tensor | None, weight: Tensor) -> Tensor:
        sums = observe(h, up, weight)
        assert sums is not None
        return torch.cat([sums, weight.sum(1, keepdim=True)], 1)

    return [sums[:-1] / sums[-1] for sums in calibration.sums(counting)]
