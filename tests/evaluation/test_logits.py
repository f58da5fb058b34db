"""The output head: in which parts it runs, and in which precision probabilities are made."""

import pytest
import torch

from dart_eval.evaluation import logits
from dart_eval.evaluation.logits import Answers


def _answers(head, hidden, continuations):
    """Log-probabilities of the continuations, the hidden states of their positions in a row."""
    answers, paths, start = Answers(head, head.out_features), [], 0
    for continuation in continuations:
        paths.append(answers.ask(answers.root(), continuation))
        answers.give(paths[-1], hidden[start : start + len(continuation)])
        start += len(continuation)
    answers.run()
    return [answers.logprobs(path, c) for path, c in zip(paths, continuations, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 8, 100])
def test_neither_parts_nor_the_models_precision_change_a_probability(monkeypatch, dtype, rows):
    """So many rows of logits at a time, and a quarter of them in a softmax."""
    monkeypatch.setattr(logits, "LOGIT_BYTES", rows * 4 * 50)
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(8, 50).to(dtype), torch.randn(15, 8).to(dtype)
    continuations = [tuple(torch.randint(50, (n,)).tolist()) for n in (1, 5, 2, 7)]
    with torch.no_grad():
        found = _answers(head, hidden, continuations)
        wanted = head(hidden).float().log_softmax(-1)
    tokens = torch.tensor([t for c in continuations for t in c])
    assert [p for row in found for p in row] == pytest.approx(wanted[torch.arange(15), tokens].tolist(), abs=1e-5)


def test_answers_that_begin_alike_share_their_first_positions_alone():
    answers = Answers(torch.nn.Linear(8, 50), 50)
    root = answers.root()
    one, two, three = (answers.ask(root, c) for c in ((5, 6, 7), (5, 6, 8, 9), (5, 9, 7)))
    assert one == two[:3] and one[:2] == three[:2]
    assert one[2] != three[2]
