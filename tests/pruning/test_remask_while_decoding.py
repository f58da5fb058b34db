"""Re-masks while a sequence is decoded: dense tokens, blends, watching only; and what must not change.

The formulas: tests/derivations/test_dart_drift.py.
"""

import pytest
import torch

from dart_eval.layers.families import cache_argument
from tests.helpers.models import random_tokens, tiny
from tests.helpers.sessions import RESTLESS, cache_of, generate, open_session, prompts_of, state_of


def _masks(session):
    return [m.clone() for m in session.state.masks]


def _equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _steps(model, session, ids, tokens):
    """Decode by hand; the masks after each forward."""
    name = cache_argument(model)
    out = model(ids, use_cache=True)
    found = [_masks(session)]
    for token in tokens:
        out = model(torch.tensor([[token]]), use_cache=True, **{name: cache_of(out)})
        found.append(_masks(session))
    return found


def test_watching_only_changes_nothing_but_sees_everything(llama):
    ids = prompts_of(1, 20)
    with open_session(llama, "dart", 0.5, remask="never"):
        static = generate(llama, ids, tokens=16)
    with open_session(llama, "dart", 0.5, **RESTLESS, **{"remask.act": False}) as session:
        watched = generate(llama, ids, tokens=16)
        trace = session.trace(0)
        assert session.state.remasking.ring is None  # no re-mask, so nothing is kept
    assert torch.equal(torch.stack(static.logits), torch.stack(watched.logits))
    assert session.events == []
    assert len(trace["signal"]) == 5
    assert {"mean", "deviation", "threshold"} <= trace.keys()


@pytest.mark.parametrize("method", ["dart", "dart-code", "griffin"])
def test_state_does_not_grow_with_the_prompt(method):
    model = tiny("llama", torch.float32)
    sizes = []
    for length in (80, 240):
        with open_session(model, method, 0.5, **({"remask.window": 1} if method != "griffin" else {})) as session:
            model(prompts_of(1, length), use_cache=True)
            sizes.append(session.state_bytes)
    assert sizes[0] == sizes[1]


def test_what_an_alarm_will_need_is_counted_before_it_comes(llama):
    with open_session(llama, "dart", 0.5, **RESTLESS, **{"remask.dense_tokens": 2}) as session:
        llama(prompts_of(1, 20), use_cache=True)
        before = session.state_bytes
        _steps(llama, session, prompts_of(1, 20), random_tokens(4, seed=2))
        assert session.state_bytes == before


def test_padding_in_the_ring_may_hold_anything(llama):
    """A padded slot of NaN, as an overflow in half precision would leave, changes nothing."""
    params = {"allocation": "uniform", "remask.ring": 4}
    masks = []
    for rubbish in (0.0, float("nan")):
        torch.manual_seed(0)
        state = state_of("dart", llama.float(), **params)
        valid = torch.tensor([[False, True, True]])
        for layer, ffn in enumerate(state.ffns):
            x = torch.randn(1, 3, 32)
            x[:, 0] = rubbish
            state.remasking.ring.write(layer, x, valid)
            a, u = ffn.parts(x)
            state.observe(layer, a * u, valid)
        state.finish_context(valid)
        state.remask(torch.tensor([True]))
        masks.append(state.masks)
    assert _equal(*masks)
