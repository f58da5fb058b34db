"""Answers of NaN or infinity: counted, kept out of the journal, and the end of their cell.

A log-likelihood of -inf counts too: log_softmax in fp32 gives it for a logit of -inf alone, which is an overflow or a
word that the model rules out; neither ranks an answer, and a perplexity over it is no number.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from transformers import LogitsProcessor

from dart_eval.evaluation.requests import Score, Text
from dart_eval.layers.finite import REMEDY
from dart_eval.util.errors import UserError

HOPELESS = 64  # answers, none of them usable, after which the rest is not asked


class Unusable:
    """Counts the answers of a call of the model.

    Args:
        asked: distinct answers that the call wants.
    """

    def __init__(self, asked: int = 0) -> None:
        self.asked, self.seen, self.wrong = asked, 0, 0

    def sift(self, answers: Mapping[str, Score | Text]) -> dict[str, Score | Text]:
        """The answers that may be kept. Raises as `check` does."""
        usable = {name: answer for name, answer in answers.items() if answer.usable}
        self.seen += len(answers)
        self.wrong += len(answers) - len(usable)
        self.check_usable(over=False)
        return usable

    def check_usable(self, over: bool) -> None:
        """Let the cell fail if it must: at the call's end, or before it where nothing has been usable for long.

        Raises:
            UserError: with the count, and what to do.
        """
        if not self.wrong or (not over and (self.wrong < self.seen or self.seen < HOPELESS)):
            return
        answered = f"{self.asked}" if over else f"the first {self.seen} of {self.asked}"
        raise UserError(f"{self.wrong} of {answered} answers are NaN or infinite", REMEDY)


class LogitsWatch(LogitsProcessor):
    """Notes while text is generated which rows had a logit of NaN or infinity, or no word left at all.

    Args:
        rows: sequences of the batch.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._usable: list[Tensor] = []  # per token: [rows] bool

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._usable.append(scores.amax(-1).isfinite().view(self.rows, -1).all(1))  # several beams to a row
        return scores

    def usable(self, row: int, tokens: int) -> bool:
        """Whether the first `tokens` of a row came from numbers."""
        return all(bool(step[row]) for step in self._usable[:tokens])
