"""What a session says of its sequences, one after the other: logs, traces, rows taken up again, tokens taken back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dart_eval.layers.families import cache_argument
from dart_eval.util.errors import UserError
from tests.helpers.models import random_tokens, tiny
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
def test_rows_that_are_taken_up_again_reads_what_it_read(llama):
    """Also right after another: one with a mask, one without a context, which runs dense."""
    name, ids, one = cache_argument(llama), prompts_of(1, 20), torch.ones(1, 1, dtype=torch.bool)
    with open_session(llama, "griffin", 0.5) as session:
        with session.context(torch.ones_like(ids, dtype=torch.bool)):
            out = llama(ids, use_cache=True)
        pruned = session.rows
        session.no_context(1, ids.device)
        dense, reads = session.rows, []
        for rows in (pruned, dense, pruned):
            session.fork(rows, torch.tensor([0]))
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
        watch = session.rows.watch
        before = [t.clone() for t in (*watch.ring.slots, *session.rows.mask, watch.drift.window_sum)]
        with session.decode(torch.ones(1, 7, dtype=torch.bool), frozen=True):
            llama(ids[:, :7], use_cache=True, **{name: cache_of(out)})
        now = [*watch.ring.slots, *session.rows.mask, watch.drift.window_sum]
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
        assert session.rows.seen.tolist() == [8]
        assert session.log.decoded == 4


# -- tokens taken back -----------------------------------------------------------------------------------------------


@torch.no_grad()
def fed(model, out, tokens):
    """Logits of tokens that are fed one by one, [B, T, V], and the last output."""
    logits = []
    for token in tokens:
        out = model(torch.full((len(out.logits), 1), token), use_cache=True, **{cache_argument(model): cache_of(out)})
        logits.append(out.logits[:, -1])
    return torch.stack(logits or [out.logits[:, -1]], 1), out


@settings(max_examples=12)
@given(
    st.sampled_from([("griffin", {}), ("grinqh", {}), ("dart", RESTLESS), ("dart", {"remask.release": 4})]),
    st.integers(1, 2), st.integers(0, 7), st.lists(st.integers(4, 90), min_size=1, max_size=9), st.data(),
)  # fmt: skip
def test_tokens_that_are_taken_back_were_never_decoded(method, batch, before, wrong, data):
    """Under griffin the cache alone is cut; of masks that change, the sequences before them are given."""
    name, params = method
    back, (model, ids) = data.draw(st.integers(0, len(wrong))), (tiny("llama"), prompts_of(batch, 20))
    ours, right = random_tokens(before, seed=1), random_tokens(8, seed=2)
    kept, wrong = wrong[: len(wrong) - back], wrong[len(wrong) - back :]
    with open_session(model, name, 0.5, **params) as session:
        _, out = fed(model, model(ids, use_cache=True), [*ours, *kept])
        wanted, _ = fed(model, out, right)
        remasks = session.remasks
    with open_session(model, name, 0.5, **params) as session:
        _, out = fed(model, model(ids, use_cache=True), [*ours, *kept])
        rows = session.rows.select(torch.arange(batch)) if name == "dart" else None
        if wrong:
            fed(model, out, wrong)
            session.rewind(len(wrong), rows)
        found, _ = fed(model, out, right)
        assert session.remasks == remasks
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(("family", "method", "tokens", "words"), [
    ("gemma3", "griffin", 1, "cannot be rewound; use a DynamicCache of full attention"),
    ("llama", "dart", 1, "dart follows the tokens that are taken back; give the rows before them"),
    ("llama", "griffin", 4, "4 tokens cannot be taken back; decoded since the prompt: 3"),
    ("llama", "griffin", -1, "-1 tokens cannot be taken back"),
])  # fmt: skip
def test_tokens_that_cannot_be_taken_back_stay(family, method, tokens, words):
    model, ids = tiny(family), prompts_of(1, 20)
    with open_session(model, method, 0.5) as session:
        _, out = fed(model, model(ids, use_cache=True), [5, 6, 7])
        with pytest.raises(UserError, match=words):
            session.rewind(tokens)
        assert cache_of(out).get_seq_length() == 23
        fed(model, out, [8])
