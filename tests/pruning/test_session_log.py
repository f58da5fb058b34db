"""What a session says of its sequences, one after the other: logs, traces, states taken up again, frozen masks."""

import pytest
import torch

from dart_eval.layers.families import cache_argument
from dart_eval.util.errors import UserError
from tests.helpers.sessions import RESTLESS, cache_of, decoded, generate, open_session, prompts_of


def test_a_new_prompt_begins_a_new_log(llama):
    with open_session(llama, "dart", 0.5, **RESTLESS) as session:
        for _ in range(2):
            generate(llama, prompts_of(1, 20), tokens=9)
            assert [e["token"] for e in session.events] == [a["token"] for a in session.log.alarms] == [3, 6]
            assert len(session.steps) == session.log.decoded == 8 and len(session.log.signals) == 2


def test_a_trace_is_of_one_sequence_up_to_a_token(llama):
    with open_session(llama, "dart", 0.5, **RESTLESS) as session:
        generate(llama, prompts_of(2, 20), tokens=9)
        whole, cut = session.trace(1), session.trace(1, tokens=5)
    assert whole["alarms"] == whole["remasks"] == [3, 6]
    assert cut["alarms"] == cut["remasks"] == [3]
    assert (len(whole["signal"]), cut["signal"]) == (2, whole["signal"][:1])


@torch.no_grad()
def test_a_state_that_is_taken_up_again_reads_what_it_read(llama):
    """Also right after another: one with a mask, one without a context, which runs dense."""
    name, ids, one = cache_argument(llama), prompts_of(1, 20), torch.ones(1, 1, dtype=torch.bool)
    with open_session(llama, "griffin", 0.5) as session:
        with session.context(torch.ones_like(ids, dtype=torch.bool)):
            out = llama(ids, use_cache=True)
        pruned = session.state
        session.no_context(1, ids.device)
        dense, reads = session.state, []
        for state in (pruned, dense, pruned):
            session.fork(state, torch.tensor([0]))
            with session.decode(one):
                out = llama(ids[:, :1], use_cache=True, **{name: cache_of(out)})
            reads += [float(step.read[0]) for step in session.steps]
        assert reads == [0.5, 1.0, 0.5]


@torch.no_grad()
def test_a_forward_under_frozen_masks_leaves_everything_as_it_was(llama):
    name, ids = cache_argument(llama), prompts_of(1, 20)
    with open_session(llama, "dart", 0.5, **RESTLESS) as session:
        with session.context(torch.ones_like(ids, dtype=torch.bool)):
            out = llama(ids, use_cache=True)
        kept = [*session.state.remasking.ring.slots, *session.state.masks, session.state.remasking.detector.window_sum]
        before = [t.clone() for t in kept]
        with session.decode(torch.ones(1, 7, dtype=torch.bool), frozen=True):
            llama(ids[:, :7], use_cache=True, **{name: cache_of(out)})
        now = [*session.state.remasking.ring.slots, *session.state.masks, session.state.remasking.detector.window_sum]
        assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
        assert session.events == session.log.alarms == []


@torch.no_grad()
@pytest.mark.parametrize("method", ["dart", "random"])
def test_a_turn_that_follows_a_prompt_runs_dense(llama, method):
    name, ids = cache_argument(llama), prompts_of(1, 30)
    dense = llama(ids).logits[:, 20:]
    with open_session(llama, method, 0.5) as session, session.prompt():
        out = llama(ids[:, :20], use_cache=True)
        turn = llama(ids[:, 20:], use_cache=True, **{name: cache_of(out)}).logits
    assert torch.allclose(turn, dense)


@torch.no_grad()
def test_a_prompt_of_generate_says_nothing_of_later_ones(llama):
    with open_session(llama, "griffin", 0.5) as session:
        generate(llama, prompts_of(1, 30), tokens=3)
        decoded(llama, session, prompts_of(1, 8), steps=4)
        assert session.state.tokens.tolist() == [8]
        assert session.log.decoded == 4


@torch.no_grad()
def test_another_cache_of_the_same_length_is_refused(llama):
    name = cache_argument(llama)
    with open_session(llama, "griffin", 0.5):
        first = cache_of(llama(prompts_of(1, 20), use_cache=True))
        second = cache_of(llama(prompts_of(1, 20, seed=7), use_cache=True))
        assert first is not second
        with pytest.raises(UserError, match="not the one that the masks"):
            llama(torch.tensor([[5]]), use_cache=True, **{name: first})
