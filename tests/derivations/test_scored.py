"""The log-likelihood of an answer, by decoding token by token; the masks are GRIFFIN's (test_griffin), or an oracle's.

Dense, it is the sum of log p(answer_i | context, answer_1 ... answer_i-1). Pruned, the scope says which tokens make the
mask and which run under it. The inputs are the context and the answer but its last token: the last input predicts the
answer's last token, and the context's last token predicts the first.

scored  All of the context but its last token runs dense and makes the mask. From the context's last token on, every
        input runs under it, one by one through the KV cache: each probability that counts was made by a pruned FFN, and
        no mask has seen what it is to predict. (A context of one token leaves nothing to make one from: dense.)
continuation  (COUNTDOWN, arXiv 2505.17701) All of the context runs dense and makes the mask; the answer's own inputs
        run under it. So the answer's first token is predicted dense.
all     (the public code of DART, arXiv 2601.22632) One forward of all inputs makes the mask, the answer's tokens too,
        and all inputs run under it. It looks ahead.
last    (GRIFFIN's for classification, arXiv 2404.01365) All inputs but the last one run dense and make the mask; the
        last one alone runs under it.
decode  (CoreInfer, arXiv 2410.18311) Only a forward of one token that comes after others runs pruned: none here does.
oracle  No method: as scored, but the mask is made from the very inputs that it is used on, seen dense beforehand.
"""

import pytest
import torch

from dart_eval.evaluation.forwards import output_head
from dart_eval.evaluation.requests import Request
from dart_eval.evaluation.scoring import scorer
from dart_eval.pruning.session import Session, prune
from dart_eval.sweep.options import SCOPES
from tests.derivations.plain import Plain, alike
from tests.helpers.matrices import in_turn
from tests.helpers.models import biased, random_tokens


def griffin(seen, sparsity, start=0):
    """Masks from the tokens of the last forward, from the start-th on."""
    votes = (layer.h[start:] / layer.h[start:].norm(dim=1, keepdim=True) for layer in seen)
    return alike([v.norm(dim=0) for v in votes], sparsity)


def likelihood(model, context, answer, sparsity, scope):
    """The answer's log-likelihood, and how many of its tokens an input under a mask has predicted."""
    inputs, first = [*context, *answer[:-1]], len(context) - 1
    plain, rehearsal, masks = Plain(model), Plain(model), None
    if scope in ("all", "oracle"):
        rehearsal.run(inputs)
        masks = griffin(rehearsal.seen, sparsity, start=first if scope == "oracle" else 0)
    if scope == "all":
        return total(plain.run(inputs, lambda i, h: h * masks[i])[first:], answer), len(answer)
    dense = {"continuation": len(context), "last": len(inputs) - 1, "decode": len(inputs)}.get(scope, first)
    rows = [*plain.run(inputs[:dense])] if dense else []
    if dense and scope != "oracle":
        masks = griffin(plain.seen, sparsity)
    for token in inputs[dense:]:
        rows += plain.run([token], None if masks is None else lambda i, h: h * masks[i])
    under = 0 if masks is None else len(inputs) - max(dense, first)
    return total(rows[first:], answer), under


def total(rows, answer):
    """Sum of the log-probabilities of the answer's tokens. rows: of all tokens, one row for each of them."""
    return sum(float(row[token]) for row, token in zip(rows, answer, strict=True))


QUESTIONS = [
    (random_tokens(length, seed), random_tokens(answer, 100 + seed))
    for seed, (length, answer) in enumerate(
        [(23, 6), (9, 1), (12, 3), (23, 2), (2, 4), (1, 3), (1, 1), (4, 9), (101, 3)]
    )
]
QUESTIONS += [(QUESTIONS[0][0], (5, 6)), (QUESTIONS[1][0], (7,))]  # further answers to the same contexts


@pytest.mark.parametrize(("family", "scope"), in_turn(["llama", "gemma3", "opt", "gpt2"], [*SCOPES, "oracle"]))
def test_scores_are_those_of_decoding_token_by_token(family, scope):
    model = biased(family)
    head = output_head(model)
    with prune(model, "oracle" if scope == "oracle" else "griffin", 0.6) as session:
        scoring = scorer(model, head, session, batch_size=3, scope="scored" if scope == "oracle" else scope)
        found = scoring.score([Request(*q) for q in QUESTIONS])
    for (context, answer), score in zip(QUESTIONS, found, strict=True):
        logprob, masked = likelihood(model, context, answer, 0.6, scope)
        assert score.logprob == pytest.approx(logprob, rel=1e-6)  # the package takes logits to float32
        assert (score.cost.tokens, score.cost.pruned_tokens) == (len(answer), masked)
        assert score.cost.not_read_sum == pytest.approx(0.6 * masked)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_dense_score_is_the_sum_of_the_logs_of_the_probabilities(family):
    model = biased(family)
    found = scorer(model, output_head(model), Session(), batch_size=3).score([Request(*q) for q in QUESTIONS])
    for (context, answer), score in zip(QUESTIONS, found, strict=True):
        with torch.no_grad():
            p = model(torch.tensor([[*context, *answer]])).logits[0].softmax(-1)
        places = range(len(context) - 1, len(context) + len(answer) - 1)
        assert score.logprob == pytest.approx(sum(float(p[i, t].log()) for i, t in zip(places, answer, strict=True)))
        assert (score.cost.pruned_tokens, score.cost.not_read_sum) == (0, 0)
