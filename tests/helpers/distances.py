"""How far two models lie apart, by a second program: plain logits, in double precision, position by position."""

import pytest
import torch


@torch.no_grad()
def dense_logits(model, request):
    """[n, V]: what a model without a session has at the positions of an answer."""
    tokens = torch.tensor([[*request.context, *request.continuation[:-1]]])
    return model(tokens).logits[0, len(request.context) - 1 :]


def apart(dense, pruned):
    """KL(dense || pruned) of each position in nats, and whether the likeliest words are the same."""
    p, q = (torch.distributions.Categorical(logits=x.double()) for x in (dense, pruned))
    return torch.distributions.kl_divergence(p, q), dense.argmax(-1) == pruned.argmax(-1)


def assert_apart(distance, dense, pruned, tolerance=2e-5):
    """A distance is that between these logits."""
    kl, same = apart(dense, pruned)
    assert distance.kl == pytest.approx(float(kl.sum()), rel=tolerance, abs=tolerance)
    assert (distance.agreed, distance.positions) == (int(same.sum()), len(kl))
    assert sum(distance.bins.values()) == len(kl)
