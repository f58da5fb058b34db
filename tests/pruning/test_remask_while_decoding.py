"""Re-masks while a sequence is decoded: dense tokens, blends, watching only; and what must not change.

The formulas: tests/derivations/test_dart_drift.py.
"""

import pytest
import torch

from dart_eval.layers.families import cache_argument
from tests.helpers.models import random_tokens, tiny
from tests.helpers.sessions import RESTLESS, cache_of, generate, open_session, prompts_of, rows_of


def test_watching_only_changes_nothing_but_sees_everything(llama):
    ids = prompts_of(1, 20)
    with open_session(llama, "dart", 0.5, remask="never"):
        static = generate(llama, ids, tokens=16)
    with open_session(llama, "dart", 0.5, **RESTLESS, **{"remask.act": False}) as session:
        watched = generate(llama, ids, tokens=16)
        trace = session.trace(0)
        assert session.rows.watch.ring is None  # no re-mask, so nothing is kept
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
        out = llama(prompts_of(1, 20), use_cache=True)
        before = session.state_bytes
        for token in random_tokens(4, seed=2):
            out = llama(torch.tensor([[token]]), use_cache=True, **{cache_argument(llama): cache_of(out)})
        assert bool(session.rows.watch.dense.all()) and session.state_bytes == before


def test_padding_in_the_ring_may_hold_anything(llama):
    """A padded slot of NaN, as an overflow in half precision would leave, changes nothing."""
    params = {"allocation": "uniform", "remask.ring": 4}
    masks = []
    for rubbish in (0.0, float("nan")):
        torch.manual_seed(0)
        method, rows = rows_of("dart", llama.float(), **params)
        rows.seen, valid = torch.tensor([2]), torch.tensor([[False, True, True]])
        for layer, ffn in enumerate(method.ffns):
            x = torch.randn(1, 3, 32)
            x[:, 0] = rubbish
            rows.watch.ring.write(layer, x, valid)
            rows.sums[layer] = method.add(None, ffn, ffn.intermediate(x), valid)
        method.finish(rows, valid)
        method.make_masks(rows, torch.tensor([True]))
        masks.append(rows.mask)
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))
