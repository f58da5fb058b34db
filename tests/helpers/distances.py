"""How far two models lie apart, by a second program: plain logits, in double precision, position by position."""

import pytest
import torch

from dart_eval.evaluation.scoring import scorer
from dart_eval.evaluation.states import States
from dart_eval.pruning.session import Session
from tests.helpers.requests import output_head_of


def states_of(model, requests):
    """Dense's states at the answers of requests, as a dense cell leaves them."""
    gathered = States(1 << 30)
    scorer(model, output_head_of(model), Session(), 3, states=gathered).score(requests)
    return States(1 << 30, gathered.tensors())


@torch.no_grad()
def dense_logits(model, request):
    """[n, V]: what a model without a session has at the positions of an answer."""
    tokens = torch.tensor([[*request.context, *request.continuation[:-1]]])
    return model(tokens).logits[0, len(request.context) - 1 :]


def apart(dense, pruned):
    """KL(dense || pruned) of each position in nats, the reverse, and whether the likeliest words are the same."""
    p, q = (torch.distributions.Categorical(logits=x.double()) for x in (dense, pruned))
    kl = torch.distributions.kl_divergence
    return kl(p, q), kl(q, p), dense.argmax(-1) == pruned.argmax(-1)


def assert_apart(distance, dense, pruned, tokens, tolerance=2e-5):
    """A distance is that between these logits. tokens: that were scored."""
    kl, reverse, same = apart(dense, pruned)
    before, after = (x.double().softmax(-1)[range(len(tokens)), tokens] for x in (dense, pruned))
    wanted = [float(kl.sum()), float(reverse.sum())]
    assert [distance.kl, distance.reverse] == pytest.approx(wanted, rel=tolerance, abs=tolerance)
    assert distance.moved == pytest.approx(float((after - before).square().sum()), rel=5e-4, abs=1e-9)
    assert (distance.agreed, distance.positions) == (int(same.sum()), len(kl))
    assert sum(distance.bins.values()) == len(kl)
