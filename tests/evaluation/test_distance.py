"""How far from dense a pruned model is: the numbers themselves, what must not move them, and what they must not move.

That they are those of two plain models, position by position: test_scoring.py.
"""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from dart_eval.evaluation import costs as distance
from dart_eval.evaluation.costs import Apart, Cost, Distance
from dart_eval.evaluation.evaluate import _distances
from dart_eval.evaluation.logits import Answers
from dart_eval.evaluation.requests import Request, Score, stored_answer
from dart_eval.evaluation.scoring import scorer
from dart_eval.evaluation.states import States, begin_name, with_token
from dart_eval.results.record import Metric
from dart_eval.sweep.options import SCOPES
from tests.helpers.distances import apart, assert_apart, dense_logits, states_of
from tests.helpers.matrices import in_turn
from tests.helpers.models import random_tokens, tiny
from tests.helpers.requests import output_head_of, questions
from tests.helpers.sessions import RESTLESS, open_session

METHODS = [("random", {}), ("dart", RESTLESS), ("grinqh", {}), ("teal", {}), ("rounding", {})]


def _scores(model, session, batch_size=4, scope="scored", share=True, states=None, requests=None):
    made = scorer(model, output_head_of(model, session), session, batch_size, scope, share, states)
    return made.score(requests or questions())


def _far(*kls):
    return Distance.of([Apart(kl, 2 * kl, True, 0.5) for kl in kls])


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [1e-3, 0.1, 3.0])
def test_divergence_is_that_of_double_precision(spread):
    """Over a vocabulary in whose sums fp32 loses four digits, and with words that are ruled out."""
    torch.manual_seed(0)
    dense = 3 * torch.randn(5, 65_537)
    pruned = dense + spread * torch.randn_like(dense) + 7
    dense[:, -3:] = pruned[:, -3:] = -math.inf
    dense[1, 5] = -math.inf  # of no weight, whatever the other says
    found = distance.divergences(dense, pruned)
    for one, exact in zip(found, apart(dense[:, :-3].nan_to_num(neginf=-1e9), pruned[:, :-3]), strict=False):
        ruled_out = [False, one is found[1], False, False, False]  # the other gives a word that dense does not
        wanted = [math.inf if out else x for out, x in zip(ruled_out, exact.tolist(), strict=True)]
        assert one.tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    for one in distance.divergences(dense, dense + 2):
        assert one.tolist() == pytest.approx([0] * 5, abs=1e-6)
    pruned[2, 9] = -math.inf
    assert distance.divergences(dense, pruned)[0][2] == math.inf


@pytest.mark.parametrize("positions", [1, 7, 333, 20_001])
def test_percentiles_are_within_their_bound(positions):
    exact = np.random.default_rng(positions).lognormal(-3, 2.5, positions)
    bins = _far(*map(float, exact)).bins
    for share in (0.5, 0.95, 0.99, 1.0):
        true = np.percentile(exact, 100 * share, method="inverted_cdf")
        assert distance.percentile(bins, share) == pytest.approx(true, rel=0.0443)
    assert len(bins) < 8 * 45


def test_bins_by_hand():
    found = [(0.0, True), (2.0**-21, True), (2.0**-20, False), (2.0**-19, True), (1.0, True), (1.001, False)]
    made = Distance.of([Apart(kl, 0.25, same, -0.5) for kl, same in found])
    assert made.bins == {"-160": 3, "-152": 1, "0": 1, "1": 1}
    assert (made.agreed, made.positions, made.reverse, made.moved) == (4, 6, 1.5, 1.5)
    assert made.kl == math.fsum(kl for kl, _ in found)
    assert [distance.percentile(made.bins, s) for s in (0.5, 0.6, 1)] == [0.0, 2 ** (-152.5 / 8), 2 ** (0.5 / 8)]
    assert made + Distance() == made
    assert (made + made).bins == {"-160": 6, "-152": 2, "0": 2, "1": 2}
    assert Distance().pairs() == {}


def test_a_position_counts_for_every_answer_that_it_is_of(monkeypatch):
    """In parts of odd sizes."""
    monkeypatch.setattr("dart_eval.evaluation.logits.LOGIT_BYTES", 11 * 4 * 50)
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(8, 50), torch.randn(19, 8)
    dense = hidden + 0.1 * torch.randn_like(hidden)
    gathered, found = States(1 << 20), []
    with torch.no_grad():
        for given in (dense, hidden):
            states = gathered if given is dense else States(1 << 20, gathered.tensors())
            answers = Answers(head, 50, states)
            root = answers.root([3, 4])
            found = [(answers.ask(root, asked), asked) for asked in (range(19), [0, 1, 7])]
            answers.give(found[0][0], given)
            answers.run()
        for path, asked in found:
            n = len(path)
            assert_apart(answers.distance(path, asked), head(dense[:n]), head(hidden[:n]), list(asked))
    assert found[1][0] == found[0][0][:3]


def test_states_are_found_by_all_tokens_before_them_and_the_first_stays():
    names = [begin_name(context, angles).digest() for context, angles in (((1, 2), 0), ((1, 2, 3), 0), ((1, 2), 5))]
    assert with_token(begin_name((1, 2), 0), 3).digest() == names[1]
    assert len({*names}) == 3
    states = States(10_000)
    states.keep(names[:2], torch.arange(8.0).view(2, 4))
    states.keep([names[2], names[2], names[0]], torch.arange(12.0).view(3, 4) + 100)
    for known in (states, States(10_000, states.tensors())):
        assert known.find([names[2], names[0]])[:, 0].tolist() == [100, 0]
        with pytest.raises(KeyError):
            known.find([b"?" * 16])
    assert (states.full, states.gathering) == (False, True)


def test_states_without_room_are_none():
    small = States(100)
    for i in range(8):
        small.keep([bytes([i]) * 16], torch.zeros(1, 8))
    assert small.full and small.tensors() == [] and States(100, []).full


# -- what must not move them, and what they must not move --------------------------------------------------------------


@pytest.mark.parametrize(("method", "params", "scope"), in_turn(METHODS, SCOPES))
def test_nothing_else_moves(method, params, scope):
    """To the last bit, in single precision: scores, costs, re-masks, what the detector saw."""
    model = tiny("llama", dtype=torch.float32)
    runs = []
    for states in (None, states_of(model, questions())):
        with open_session(model, method, **params) as session:
            runs.append(_scores(model, session, scope=scope, states=states))
    assert all(s.cost.distance == Distance() for s in runs[0])
    for request, score in zip(questions(), runs[1], strict=True):
        assert score.cost.distance.positions == len(request.continuation)
    without = [dataclasses.replace(s, cost=dataclasses.replace(s.cost, distance=Distance())) for s in runs[1]]
    assert without == runs[0]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "scope"), in_turn(["llama", "gemma3"], SCOPES))
def test_neither_batches_nor_shared_prefixes_move_them(family, scope):
    model, found = tiny(family), []
    stem = random_tokens(70, seed=9)  # long enough to be shared
    requests = [*questions(), *(Request((*stem, *random_tokens(n, seed=n)), (5, 6, n)) for n in (1, 4, 30))]
    states = states_of(model, requests)
    for batch_size, share in ((1, False), (3, True)):
        with open_session(model, "dart", **RESTLESS) as session:
            scores = _scores(model, session, batch_size, scope, share, states, requests)
        found.append([(s.cost.distance.kl, s.cost.distance.agreed) for s in scores])
    assert any(kl > 0.01 for kl, _ in found[0]) == (scope != "decode")
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert a == pytest.approx(b, abs=2e-5)


@pytest.mark.parametrize("scope", SCOPES)
def test_nothing_pruned_is_at_no_distance(llama, scope):
    states = states_of(llama, questions())
    for method in ("griffin", "teal"):
        with open_session(llama, method, 0.0) as session:
            for score in _scores(llama, session, scope=scope, states=states):
                far = score.cost.distance
                assert (far.kl, far.reverse, far.moved) == pytest.approx((0, 0, 0), abs=1e-6)
                assert far.agreed == far.positions == score.cost.tokens


def test_an_oracle_is_held_against_dense_too(llama):
    output_head_of(llama)
    request = Request(random_tokens(20, seed=3), random_tokens(9, seed=4))
    states = states_of(llama, [request])
    with open_session(llama, "oracle", 0.5) as session:
        (score,) = _scores(llama, session, requests=[request], states=states)
        masks = session.rows.mask
    assert score.cost.distance.positions == 9

    def masked(layer):
        return lambda _module, args: (torch.where(masks[layer][:, None], args[0], 0.0),)

    # The context's tokens but the last ran dense: its keys and values are dense's.
    with torch.no_grad():
        out = llama(torch.tensor([request.context[:-1]]), use_cache=True)
        handles = [x.mlp.down_proj.register_forward_pre_hook(masked(i)) for i, x in enumerate(llama.model.layers)]
        rest = torch.tensor([[request.context[-1], *request.continuation[:-1]]])
        pruned = llama(rest, past_key_values=out.past_key_values).logits[0]
        for handle in handles:
            handle.remove()
    assert_apart(score.cost.distance, dense_logits(llama, request), pruned, request.continuation)


def test_what_is_no_number_is_no_answer_and_a_journal_gives_back_what_it_took():
    far = _far(0.25, 3.0)
    score = Score(-1.5, True, Cost(tokens=2, distance=far))
    assert score.usable
    assert stored_answer(json.loads(json.dumps(dataclasses.asdict(score))), Score) == score
    for kl in (math.nan, math.inf):
        assert not Score(-1.5, True, Cost(distance=_far(kl))).usable


# -- a cell ------------------------------------------------------------------------------------------------------------


def test_a_group_is_all_positions_of_its_members():
    far = [_far(*[kl] * n) for kl, n in ((1.0, 3), (2.0, 5), (4.0, 1))]
    costs = {("a", 0): Cost(distance=far[0]), ("a", 1): Cost(distance=far[1]), ("b", 0): Cost(distance=far[2]),
             ("c", 0): Cost(tokens=3)}  # fmt: skip
    found = [Metric("all", "acc", 0.5, 0.1, 4, True), Metric("some", "acc", 0.5, 0.1, 2, True, "all", "x"),
             Metric("a", "acc", 0.5, 0.1, 2, True, "some"), Metric("c", "acc", 0.5, 0.1, 1, True, "all")]  # fmt: skip
    made = _distances(found, {"all": ["some", "b", "c"], "some": ["a"], "a": [], "b": []}, costs)
    kls = {m.task: m for m in made if m.metric.startswith("kl") and "_" not in m.metric}
    assert {t: (m.label, m.value, m.n, m.part_of) for t, m in kls.items()} == {
        "all": ("kl", 17 / 9, 3, None), "some": ("kl,x", 13 / 8, 2, "all"), "a": ("kl", 13 / 8, 2, "some"),
    }  # fmt: skip
