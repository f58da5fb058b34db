"""Answers of NaN or infinity: they are counted, stay out of the journal, and end their cell.

A log-likelihood of -inf counts too. log_softmax in fp32 returns it only for a logit of -inf, which is an overflow or a
word that the model rules out. Neither ranks an answer, and a perplexity over it is not finite.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from transformers import LogitsProcessor

from dart_eval.evaluation.requests import Score, Text
from dart_eval.layers.finite import REMEDY
from dart_eval.util.errors import UserError

HOPELESS = 64  # answers without a usable one after which the cell ends


class Unusable:
    """Counts the answers of a call of the model.

    Args:
        asked: distinct answers of the call.
    """

    def __init__(self, asked: int = 0) -> None:
        self.asked, self.seen, self.wrong = asked, 0, 0

    def sift(self, answers: Mapping[str, Score | Text]) -> dict[str, Score | Text]:
        """Return the usable answers. Raises as `check_usable` does."""
        usable = {name: answer for name, answer in answers.items() if answer.usable}
        self.seen += len(answers)
        self.wrong += len(answers) - len(usable)
        self.check_usable(over=False)
        return usable

    def check_usable(self, over: bool) -> None:
        """Fail the cell for unusable answers: at the call's end, or earlier if none was usable for long.

        Raises:
            UserError: with the count.
        """
        if not self.wrong or (not over and (self.wrong < self.seen or self.seen < HOPELESS)):
            return
        answered = f"{self.asked}" if over else f"the first {self.seen} of {self.asked}"
        raise UserError(f"{self.wrong} of {answered} answers are NaN or infinite", REMEDY)


class LogitsWatch(LogitsProcessor):
    """Notes during generation which rows had a logit of NaN or infinity, or no possible word.

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
        """Whether the first `tokens` tokens of a row came from finite logits."""
        return all(bool(step[row]) for step in self._usable[:tokens])
