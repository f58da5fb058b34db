"""Batches and shared prefixes: the bookkeeping is right, the numbers stay, and nothing is computed twice."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dart_eval.evaluation import batching
from dart_eval.evaluation.batching import Budget, batches, budget, common_prefix, shared_prefixes
from dart_eval.evaluation.cache import can_share_prefix, fork, new_cache
from dart_eval.evaluation.requests import Request
from dart_eval.evaluation.scoring import scorer
from dart_eval.layers.find import decoder
from dart_eval.pruning.session import Session
from dart_eval.sweep.options import checked
from dart_eval.util.errors import UserError
from tests.helpers.matrices import product
from tests.helpers.models import CONFIGS, FAMILIES, random_tokens, tiny
from tests.helpers.requests import output_head_of
from tests.helpers.sessions import VARIED, open_session

METHODS = [("dense", {}), ("random", {}), ("oracle", {}), *VARIED]
TIGHT = Budget(rows=6, candidates=5, tokens=40, forward=8)  # a forward holds one context or a few
LENGTHS = st.lists(st.integers(1, 60), max_size=40).map(lambda x: sorted(x, reverse=True))


def _requests():
    """Two few-shot prefixes longer than a sliding window, with rests of many lengths; contexts alone; repeats."""
    found, answers = [], itertools.count(1000)
    for seed, length, rests in ((1, 50, (1, 30, 7)), (2, 41, (3, 3, 26))):
        prefix = random_tokens(length, seed=seed)
        for rest in rests:
            context = (*prefix, *random_tokens(rest, seed=next(answers)))
            for n in (1, 1, 4, 9):
                found.append(Request(context, random_tokens(n, seed=next(answers))))
        found.append(Request(prefix[:-3], random_tokens(5, seed=next(answers))))
    found += [Request(random_tokens(n, seed=n), random_tokens(6, seed=next(answers))) for n in (1, 2, 33)]
    return [*found, found[3]]


def _forwards(model, work):
    """Tokens of all the decoder's forwards in `work`, padding included; what it gives; the forwards' shapes."""
    shapes = []
    handle = decoder(model).register_forward_pre_hook(
        lambda _m, _a, kw: shapes.append(tuple(kw["input_ids"].shape)), with_kwargs=True
    )
    found = work()
    handle.remove()
    return sum(a * b for a, b in shapes), found, shapes


def _score(model, method, params, batch_size, share):
    """Tokens of all forwards, and scores in the order of the requests; `auto` is given them the other way round."""
    head, order = output_head_of(model), -1 if batch_size == "auto" else 1
    with open_session(model, method, **params) as session:
        pruned = session if session.prunes else Session()
        scoring = scorer(model, head, pruned, batch_size, "scored", share)
        return _forwards(model, lambda: scoring.score(_requests()[::order])[::order])


@pytest.mark.parametrize(("family", "method", "params"), product(FAMILIES, METHODS, every=12))
def test_batches_and_shared_prefixes_change_no_number(family, method, params):
    model = tiny(family)
    whole = family == "llama" and method in ("dense", "griffin")
    every, some = itertools.product((1, 4, "auto", TIGHT), (True, False)), [(1, False), (TIGHT, True), ("auto", False)]
    runs = {key: _score(model, method, params, *key) for key in (every if whole else some)}
    _, wanted, _ = runs[1, False]
    for key, (_, found, _) in runs.items():
        for a, b in zip(found, wanted, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=2e-6), key
            assert a.greedy == b.greedy, key
            a, b = a.cost, b.cost
            assert (a.tokens, a.pruned_tokens, a.remasks) == (b.tokens, b.pruned_tokens, b.remasks), key
            assert (a.context_tokens, a.contexts) == (b.context_tokens, b.contexts), key
            assert (a.not_read_sum, a.outside_sum) == pytest.approx((b.not_read_sum, b.outside_sum)), key
            assert (a.trace is None) == (b.trace is None)
            for name, found in (a.trace or {}).items():
                near = name in ("signal", "threshold", "mean", "deviation")
                assert found == (pytest.approx(b.trace[name], abs=1e-5) if near else b.trace[name]), (key, name)
    for batch_size in (1, 4, "auto") if whole else ():
        assert runs[batch_size, True][0] < runs[batch_size, False][0]  # shared they are


def test_a_prefix_is_computed_once():
    model = tiny("llama")
    head = output_head_of(model)
    prefix = random_tokens(60, seed=1)
    requests = [Request((*prefix, *random_tokens(8, seed=s)), (s,)) for s in range(10, 20)]
    shared, *_ = _forwards(model, lambda: scorer(model, head, Session(), 4).score(requests))
    alone, *_ = _forwards(model, lambda: scorer(model, head, Session(), 4, share_prefix=False).score(requests))
    assert (shared, alone) == (60 + 10 * 8, 10 * 68)


def test_candidates_of_an_oracle_have_nothing_in_common(model):
    """Each has a mask of its own, though they begin alike."""
    context, start = random_tokens(20, seed=1), random_tokens(3, seed=2)
    requests = [Request(context, (*start, *random_tokens(n, seed=n))) for n in (2, 5, 9)]
    head = output_head_of(model)
    with open_session(model, "oracle") as session:
        together = [s.logprob for s in scorer(model, head, session, 4).score(requests)]
        alone = [scorer(model, head, session, 4).score([r])[0].logprob for r in requests]
    assert together == pytest.approx(alone, abs=1e-6)


# -- bookkeeping -----------------------------------------------------------------------------------------------------


@given(LENGTHS, st.integers(1, 9), st.none() | st.integers(1, 200), st.integers(0, 50))
def test_batches_hold_every_row_once_within_their_limits(lengths, rows, tokens, forward):
    parts = batches(lengths, rows, tokens, forward)
    assert [i for p in parts for i in range(p.start, p.stop)] == list(range(len(lengths)))
    for p in parts:
        n = p.stop - p.start
        assert 1 <= n <= rows
        assert n == 1 or tokens is None or n * lengths[p.start] <= tokens


@settings(max_examples=50)
@given(LENGTHS.map(lambda x: x[:9]), st.integers(1, 9), st.none() | st.integers(1, 200), st.integers(0, 50))
def test_no_other_cut_is_cheaper(lengths, rows, tokens, forward):
    def cost(cuts):
        parts = list(itertools.pairwise((0, *cuts, len(lengths))))
        if any(b - a > rows or (b - a > 1 and tokens and (b - a) * lengths[a] > tokens) for a, b in parts):
            return float("inf")
        return sum((b - a) * lengths[a] + forward for a, b in parts)

    every = itertools.chain.from_iterable(
        itertools.combinations(range(1, len(lengths)), k) for k in range(len(lengths))
    )
    if lengths:
        found = [p.start for p in batches(lengths, rows, tokens, forward)][1:]
        assert cost(found) == min(map(cost, every))


WORDS = st.lists(st.sampled_from([(0,) * 20, (1,) * 20, (2,) * 7, (0,), (1,)]), max_size=6).map(
    lambda parts: tuple(itertools.chain(*parts))
)


@settings(deadline=None)
@given(st.lists(WORDS, unique=True, max_size=12), st.integers(0, 60), st.integers(1, 30))
def test_groups_hold_every_context_once_and_do_share_their_prefix(contexts, forward, least):
    groups = shared_prefixes(contexts, forward, least)
    assert sorted(i for g in groups for i in g.members) == list(range(len(contexts)))
    assert sum(g.prefix == 0 for g in groups) <= 1
    for g in groups:
        assert len({contexts[i][: g.prefix] for i in g.members}) == 1
        if g.prefix:
            assert len(g.members) > 1 and g.prefix >= batching.SHORTEST_PREFIX
            computed = g.prefix + sum(max(len(contexts[i]) - g.prefix, least) for i in g.members)
            assert computed + forward < sum(len(contexts[i]) for i in g.members)


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, unique=True, max_size=6), st.integers(0, 60))
def test_no_other_grouping_saves_more(contexts, forward):
    """Against all partitions of the sorted contexts into ranges."""
    ordered = sorted(contexts)
    best = 0
    for k in range(len(ordered)):
        for cuts in itertools.combinations(range(1, len(ordered)), k):
            total = 0
            for a, b in itertools.pairwise((0, *cuts, len(ordered))):
                prefix = common_prefix(ordered[a], ordered[b - 1]) if b - a > 1 else 0
                total += max(0, (b - a - 1) * prefix - forward) if prefix >= batching.SHORTEST_PREFIX else 0
            best = max(best, total)
    groups = shared_prefixes(contexts, forward, 0)
    assert sum((len(g.members) - 1) * g.prefix - forward for g in groups if g.prefix) == best


@pytest.mark.parametrize(("outer", "inner", "prefixes"), [(40, 40, [80, 80]), (80, 5, [80]), (0, 40, [40, 40])])
def test_of_nested_prefixes_those_are_shared_that_save_more(outer, inner, prefixes):
    """Two subjects of three questions each: their own examples, or what both begin with."""
    contexts = [
        (*random_tokens(outer, seed=1), *(subject,) * inner, question)
        for subject in (90, 91)
        for question in (92, 93, 94)
    ]
    groups = shared_prefixes(contexts, forward=20)
    assert [g.prefix for g in groups] == prefixes
    assert sorted(len(g.members) for g in groups) == [6 // len(prefixes)] * len(prefixes)


def test_prefixes_inside_prefixes_without_end():
    """Texts that each continue another: as deep a tree as there are contexts."""
    whole = random_tokens(3000, seed=1)
    contexts = [whole[:n] for n in range(1, 3000, 2)]
    groups = shared_prefixes(contexts, 16)
    assert sorted(i for g in groups for i in g.members) == list(range(len(contexts)))
    assert any(g.prefix for g in groups)


@given(WORDS, WORDS)
def test_common_prefix(a, b):
    n = common_prefix(a, b)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]


# -- budgets ---------------------------------------------------------------------------------------------------------


def test_a_batch_size_is_a_number_of_rows_or_auto():
    assert [checked("batch_size", size) for size in (3, "3", "auto")] == [3, 3, "auto"]
    for wrong in (0, -1, "0", "many", 2.5, True, ""):
        with pytest.raises(UserError, match="auto"):
            checked("batch_size", wrong)


def test_half_a_budget_holds_half_of_everything_and_at_least_one_of_each():
    assert Budget(9, 5, 40, 8, 7).halved() == Budget(4, 2, 20, 8, 3)
    assert Budget(1, 1, 1, 8).halved() == Budget(1, 1, 1, 8) and not Budget(1, 1, 40, 8).can_shrink


@given(st.integers(1, 1 << 40), st.integers(1, 1 << 24))
def test_gpu_budgets_are_powers_of_two_within_bounds(free, per_token):
    tokens = batching.gpu_tokens(free, per_token)
    assert batching.GPU_LEAST <= tokens <= batching.GPU_MOST
    assert tokens & (tokens - 1) == 0
    if tokens > batching.GPU_LEAST:
        assert tokens * per_token <= batching.GPU_SHARE * free


def test_auto_runs_short_contexts_many_at_a_time_and_long_ones_few(llama):
    asked = [Request(random_tokens(n, seed=s), (5, 6)) for s, n in enumerate([4] * 30 + [200] * 12)]
    scoring = scorer(llama, output_head_of(llama), Session(), "auto")
    *_, shapes = _forwards(llama, lambda: scoring.score(asked))
    first = [s for s in shapes if s[1] > 1]
    assert max(s[0] for s in first if s[1] == 200) == 5
    assert max(s[0] for s in first if s[1] == 4) == 30
    assert max(a * b for a, b in shapes) <= batching.CPU_TOKENS
    assert budget(7, llama).rows == 7


def test_auto_leaves_room_on_the_fullest_card(monkeypatch):
    one, two = torch.device("cuda:0"), torch.device("cuda:1")
    free = {one: 40 << 30, two: 3 << 30}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda card: (free[card], 80 << 30))
    monkeypatch.setattr(batching, "token_bytes", lambda model: 1 << 20)
    weights = [SimpleNamespace(device=d) for d in (one, two, one)]
    embeddings = SimpleNamespace(weight=weights[0])
    model = SimpleNamespace(get_input_embeddings=lambda: embeddings, parameters=lambda: iter(weights))
    assert (
        budget("auto", model).tokens == batching.gpu_tokens(3 << 30, 1 << 20) < batching.gpu_tokens(40 << 30, 1 << 20)
    )


# -- caches ----------------------------------------------------------------------------------------------------------


def test_a_forked_cache_leaves_the_other_as_it_was(model):
    cache, ids = new_cache(model), torch.tensor([random_tokens(20, seed=1), random_tokens(20, seed=2)])
    name = "cache" if "cache" in model.forward.__code__.co_varnames else "past_key_values"
    model(ids, use_cache=True, **{name: cache})
    before = [layer.keys.clone() for layer in cache.layers]
    forked = fork(cache, torch.tensor([1, 1, 0]))
    model(torch.tensor([[5, 6]] * 3), use_cache=True, **{name: forked})
    assert forked.get_seq_length() == 22 and cache.get_seq_length() == 20
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))


def test_prefixes_are_shared_only_where_keys_do_not_depend_on_what_follows():
    assert all(can_share_prefix(tiny(family)) for family in FAMILIES)
    chunked = tiny("llama")
    chunked.config.layer_types = ["chunked_attention", "full_attention", "full_attention"]
    chunked.config.attention_chunk_size = 16
    assert not can_share_prefix(chunked)
    assert set(CONFIGS) == set(FAMILIES)


def test_a_batch_may_have_all_the_tokens_that_are_allowed():
    assert batches([5, 5, 5], 8, tokens=10, forward=1) == [slice(0, 1), slice(1, 3)]
    assert batches([5, 5], 8, tokens=9, forward=1) == [slice(0, 1), slice(1, 2)]
