"""Masks that are released: exactly so many decoded tokens run pruned, and all later ones dense."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dart_eval.bench.decode import check_timeable
from dart_eval.evaluation.requests import Request
from dart_eval.evaluation.scoring import scorer
from dart_eval.layers.families import cache_argument
from dart_eval.pruning.registry import make
from dart_eval.results.inputs import without_legacy_defaults
from dart_eval.util.errors import UserError
from tests.helpers.models import random_tokens, tiny
from tests.helpers.requests import output_head_of
from tests.helpers.sessions import RESTLESS, cache_of, generate, open_session, prompts_of

N = 4  # a window of the detector ends one token before
CALM = {"remask": "never", "allocation": "uniform"}
RELEASED = [
    ("dart", CALM),
    ("dart", RESTLESS), ("dart-code", {**RESTLESS, "remask.dense_tokens": 3}),  # the alarm's tokens are cut short
]  # fmt: skip


@torch.no_grad()
def fed(model, ids, tokens, before=lambda n: None):
    """Logits of the prompt and of tokens that are fed one by one. before: called with the tokens fed so far."""
    out, logits = model(ids, use_cache=True), []
    for n, token in enumerate(tokens):
        before(n)
        past = {cache_argument(model): cache_of(out)}
        out = model(torch.full((len(ids), 1), token), use_cache=True, **past)
        logits.append(out.logits[:, -1])
    return torch.stack(logits, 1)


@pytest.mark.parametrize("execution", ["masked", "auto"])
@pytest.mark.parametrize(("method", "params"), RELEASED)
def test_logits_are_those_of_masked_tokens_and_then_of_dense_ones_on_their_cache(llama, method, params, execution):
    ids, tokens = prompts_of(1, 20), random_tokens(12, seed=3)
    with open_session(llama, method, 0.5, execution=execution, **params) as session:
        # By hand: the hooks go after N tokens, and the cache stays.
        wanted = fed(llama, ids, tokens, lambda n: session._remove() if n == N else None)
        by_hand = [[e["token"] for e in found] for found in (session.events, session.log.alarms)]
    with open_session(llama, method, 0.5, execution=execution, **params, **{"remask.release": N}) as session:
        found = fed(llama, ids, tokens)
        reads = [float(step.read[0]) for step in session.steps]
        logged = [[e["token"] for e in found] for found in (session.events, session.log.alarms)]
        windows = len(session.log.signals)
        skipped = session.effective_sparsity * 13  # the prompt makes the first token
        assert session.step().mask.tolist() == [1]
        assert (session.mask_sparsity, session.room()) == (0, None)
    assert torch.equal(found, wanted)
    assert logged == [[n for n in found if n < N] for found in by_hand]
    assert windows == bool(by_hand[1])
    assert reads[N:] == [1] * 8
    pruned = [1 - read for read in reads[:N] if read < 1]
    assert len(pruned) == (3 if method == "dart-code" else N)  # an alarm after three
    assert skipped == pytest.approx(sum(pruned))


@pytest.mark.slow
@torch.no_grad()
@settings(max_examples=10)
@given(st.integers(1, 9), st.lists(st.integers(1, 7), min_size=1, max_size=9), st.integers(0, 2), st.booleans())
def test_blocks_of_any_size_release_after_exactly_so_many_tokens(release, sizes, number, shared):
    """A block ends where masks are released; rows that end before do not move that place."""
    method, params = [RELEASED[0], RELEASED[1], ("dart", {**RESTLESS, "allocation": "uniform"})][number]
    model, ids, total = tiny("llama"), prompts_of(2, 20), sum(sizes)
    tokens = torch.tensor([random_tokens(total, seed=8), random_tokens(total, seed=9)])
    valid = torch.ones(2, total, dtype=torch.bool)
    valid[1, total // 2 :] = False
    params = {**params, "remask.release": release}

    def run(cuts):
        with open_session(model, method, 0.5, shared_mask=shared, **params) as session:
            with session.context(torch.ones_like(ids, dtype=torch.bool)):
                out = model(ids, use_cache=True)
            start, logits, reads = 0, [], []
            for size in cuts:
                end = start + size
                while start < end:
                    stop = min(end, start + (session.room() or size))
                    with session.decode(valid[:, start:stop]):
                        past = {cache_argument(model): cache_of(out)}
                        out = model(tokens[:, start:stop], use_cache=True, **past)
                    logits.append(out.logits)
                    reads += [session.steps[-1].read] * (stop - start)
                    start = stop
            return torch.cat(logits, 1), torch.stack(reads, 1), session.remasks

    found, reads, remasks = run(sizes)
    assert ((reads < 1).sum(1) == min(release, total)).all()
    assert (reads[:, release:] == 1).all()
    one_by_one, _, others = run([1] * total)
    assert remasks == others
    assert torch.allclose(found[valid], one_by_one[valid], atol=1e-9)


def test_scored_and_generated_tokens_beyond_are_dense_and_count_as_dense(llama):
    """Scoring: the context's last token is the first decoded one. A new prompt and a new turn start anew."""
    request = Request(random_tokens(15, seed=1), random_tokens(9, seed=2))
    with open_session(llama, "dart", 0.5, **CALM, **{"remask.release": N}) as session:
        score = scorer(llama, output_head_of(llama, session), session, 2)
        (found,) = [answer for unit in score.units([request]) for _, answer in score.run(unit)]
        ids = torch.tensor([request.context[:-1]])
        logits = fed(llama, ids, [request.context[-1], *request.continuation[:-1]])[0].log_softmax(-1)
        assert found.cost.pruned_tokens == N
        assert found.cost.not_read_sum == pytest.approx(N / 2)
        assert found.logprob == pytest.approx(float(logits[range(9), list(request.continuation)].sum()), abs=1e-6)
        for _ in range(2):
            generate(llama, prompts_of(2, 20), tokens=12)
            assert [step.read.tolist() for step in session.steps] == [[0.5, 0.5]] * N + [[1, 1]] * 7
        with session.prompt():
            out = llama(prompts_of(1, 20), use_cache=True)
        for _ in range(2):
            for _ in range(N + 1):
                past = {cache_argument(llama): cache_of(out)}
                out = llama(torch.tensor([[5]]), use_cache=True, **past)
            with session.prompt():
                out = llama(torch.tensor([[6, 7]]), use_cache=True, **{cache_argument(llama): cache_of(out)})
        assert [float(step.read[0]) for step in session.steps] == ([0.5] * N + [1]) * 2


def test_scopes_without_decoded_tokens_and_timing_are_refused(llama):
    head = output_head_of(llama)
    with open_session(llama, "dart", 0.5, **CALM, **{"remask.release": N}) as session:
        assert scorer(llama, head, session, 2, "last").scope == "last"  # one token runs pruned, the first
        with pytest.raises(UserError, match="--scope"):
            scorer(llama, head, session, 2, "all")
    with pytest.raises(UserError, match="time it without"):
        check_timeable(make("dart", {"remask.release": 5}))


def test_cells_of_versions_without_it_ask_the_same():
    params = {"remask": "never", "remask.release": 0}
    assert without_legacy_defaults(params) == {"remask": "never"}
    assert without_legacy_defaults({**params, "remask.release": 5}) == {**params, "remask.release": 5}
