"""Scopes of other papers, and the oracle: batches, what counts, what looks ahead, what is refused.

What they mean: tests/derivations/test_scored.py.
"""

import itertools
from pathlib import Path

import pytest
import torch

from dart_eval.evaluation.cache import new_cache
from dart_eval.evaluation.forwards import Forwards
from dart_eval.evaluation.requests import Request
from dart_eval.evaluation.scoring import scorer
from dart_eval.pruning.session import Session, prune
from dart_eval.sweep.events import silent
from dart_eval.sweep.options import SCOPES, config_from
from dart_eval.util.errors import UserError
from dart_eval.weights.rounding import rounded_ffns
from tests.helpers.commands import run_local
from tests.helpers.distances import assert_apart, dense_logits
from tests.helpers.matrices import in_turn, on_families
from tests.helpers.models import FAMILIES, random_tokens, tiny
from tests.helpers.requests import output_head_of, questions
from tests.helpers.sessions import RESTLESS, open_session

METHODS = ["random", "griffin", "dart", "cats", "teal"]
OTHERS = [scope for scope in SCOPES if scope != "scored"]


def scored(model, session, requests, scope, batch_size=4, **more):
    return scorer(model, output_head_of(model, session), session, batch_size, scope, **more).score(requests)


def numbers(scores):
    costs = ("tokens", "pruned_tokens", "not_read_sum", "outside_sum")
    return [(s.logprob, s.greedy, *(getattr(s.cost, name) for name in costs)) for s in scores]


@on_families(["scope"], FAMILIES, OTHERS)
def test_dense_is_dense_in_every_scope(model, scope):
    requests = questions()
    stock = [s.logprob for s in scored(model, Session(), requests, "scored")]
    assert [s.logprob for s in scored(model, Session(), requests, scope)] == pytest.approx(stock, abs=1e-5)
    with open_session(model, "griffin", 0.0) as session:
        assert [s.logprob for s in scored(model, session, requests, scope)] == pytest.approx(stock, abs=1e-5)


@on_families(["method", "scope"], FAMILIES, [(m, s) for m in METHODS for s in OTHERS], every=4)
def test_batch_size_and_order_do_not_matter(model, method, scope):
    requests = questions()
    found = []
    for batch_size, order in ((1, 1), (3, 1), (16, -1)):
        with open_session(model, method) as session:
            found.append(numbers(scored(model, session, requests[::order], scope, batch_size)[::order]))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert a == pytest.approx(b, rel=1e-6, abs=1e-6)  # compensation adds in fp32


@pytest.mark.parametrize(("changes", "word"), [
    ({"method": "oracle", "scope": "last"}, "--scope last"), ({"scope": "last-50"}, "last-50"),
    ({"method": "oracle", "tasks": "smoke_summary"}, "generates"),
    ({"scope": "all", "tasks": "smoke_summary"}, "generates"),
    ({"method": "dart:allocation=table:none.json"}, "none.json"),
    ({"method": "dart:allocation=table:table.json", "sparsity": "0.5,0.7"}, "table keeps"),
])  # fmt: skip
def test_what_only_scored_answers_can_have_is_refused_beforehand(tmp_path, monkeypatch, saved_llama, changes, word):
    monkeypatch.chdir(tmp_path)
    Path("table.json").write_text('{"keep": [0.5, 0.5, 0.5]}')
    given = {"model": saved_llama, "tasks": "smoke_questions", "method": "dart", "limit": 1, "output": "out"}
    with pytest.raises(UserError, match=word):
        run_local(config_from(None, given | changes), silent)
    assert not Path("out").exists()


def test_the_oracle_is_no_method_to_generate_with(llama):
    ids = torch.tensor([random_tokens(9)])
    with prune(llama, "oracle", 0.5), pytest.raises(UserError, match="looks ahead at the text to be scored"):
        llama.generate(ids, max_new_tokens=2, pad_token_id=0)


@pytest.mark.parametrize("scope", ["all", "last"])
def test_no_mask_is_made_anew_while_a_whole_input_runs_under_it(llama, scope):
    with open_session(llama, "dart", **RESTLESS) as session:
        scored(llama, session, [Request(random_tokens(30), random_tokens(14, seed=1))], scope)
        assert session.remasks == [0]
        assert session.events == session.log.alarms == session.log.signals == []


# Scope, tokens of context and answer, answer tokens that ran pruned, by hand: the inputs are n, both less one.
COUNTED = [
    ("scored", 6, 3, 3), ("scored", 6, 1, 1), ("scored", 2, 9, 9),
    ("continuation", 6, 3, 2), ("continuation", 6, 1, 0), ("continuation", 1, 4, 3),
    ("all", 6, 3, 3), ("all", 1, 1, 1), ("last", 6, 3, 1), ("last", 6, 1, 1), ("last", 1, 9, 1),
    ("decode", 6, 3, 0), ("decode", 1, 1, 0),
]  # fmt: skip


@pytest.mark.parametrize(("method", "scope", "context", "answer", "pruned"), [
    *(("griffin", *row) for row in COUNTED), ("griffin", "last", 1, 1, 0), ("teal", "last", 1, 1, 1),  # no mask to make
])  # fmt: skip
def test_what_runs_pruned_is_counted_by_hand(llama, method, scope, context, answer, pruned):
    request = Request(random_tokens(context, seed=1), random_tokens(answer, seed=2))
    with open_session(llama, method, 0.6) as session:
        (score,) = scored(llama, session, [request], scope)
    assert (score.cost.tokens, score.cost.pruned_tokens) == (answer, pruned)
    if method == "griffin":
        assert score.cost.effective_sparsity == pytest.approx(0.6 * pruned / answer)
        assert score.cost.read == pytest.approx(0.4 if pruned else 1.0)


def by_hand(model, session, request, scope):
    """Logits of the answer's positions, and the sum of what its tokens did not read: each pruned token is a forward of
    its own."""
    forwards = Forwards(model, output_head_of(model, session))
    inputs, first = [*request.context, *request.continuation[:-1]], len(request.context) - 1
    dense = {
        "scored": first, "continuation": first + 1, "last": len(inputs) - 1, "all": 0,
        "decode": len(inputs),
    }[scope]  # fmt: skip
    cache, not_read, hidden = new_cache(model), 0.0, []

    def run(tokens, at):
        valid, places = torch.ones(1, at + len(tokens), dtype=torch.bool), torch.arange(at, at + len(tokens))[None]
        hidden.extend(forwards(torch.tensor([tokens]), valid, places, cache)[0])

    if dense:
        with session.context(torch.ones(1, dense, dtype=torch.bool)):
            run(inputs[:dense], 0)
    else:
        session.no_context(1, torch.device("cpu"))
    for at in range(dense, len(inputs)):
        with session.decode(torch.ones(1, 1, dtype=torch.bool), frozen=True):
            run([inputs[at]], at)
        not_read += float(1 - session.steps[-1].read) if at >= first else 0.0
    return forwards.head(torch.stack(hidden[first:])), not_read


# Choices, inputs that are left out, codes, constants, thresholds; the last two have masks from their prompts.
KINDS = [
    ("teal", {}), ("wina", {}), ("m-countdown", {}), ("grinqh", {}),
    ("cats", {"choice.threshold": "calibrated"}), ("flap", {}), ("griffin", {}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "params", "scope", "bits"), in_turn(KINDS, [*itertools.product(SCOPES, ["16", "8"])])
)
@torch.no_grad()
def test_every_kind_of_method_runs_where_the_scope_says(method, params, scope, bits):
    if scope == "all" and method == "griffin":
        pytest.skip("its mask is made from all inputs: test_scored.py")
    model = tiny("llama", dtype=torch.float32)
    requests = [
        Request(random_tokens(c, seed=c), random_tokens(a, seed=50 + a)) for c, a in ((23, 6), (9, 1), (3, 8), (30, 2))
    ]
    with rounded_ffns(model, "16" if method == "grinqh" else bits):  # it makes codes of 16-bit weights
        dense = [dense_logits(model, r) for r in requests]  # on the same weights, without a session
        with open_session(model, method, 0.5, **params) as session:
            found = scored(model, session, requests, scope, batch_size=3, distances=True)
            serves = session.prompts_on_codes
            hand = [by_hand(model, session, r, scope) for r in requests]
        for request, score, plain, (logits, not_read) in zip(requests, found, dense, hand, strict=True):
            if serves and scope == "decode":
                logits = plain  # where nothing runs pruned, weights are what they are
            logprobs = logits.float().log_softmax(-1)
            logprob = sum(float(row[t]) for row, t in zip(logprobs, request.continuation, strict=True))
            assert score.logprob == pytest.approx(logprob, abs=2e-5)
            if not serves:  # else contexts are none of dense's
                assert_apart(score.cost.distance, plain, logits)
            if scope != "all" or method not in ("teal", "cats"):  # which means over all inputs there
                assert score.cost.not_read_sum == pytest.approx(not_read, abs=1e-6)


def test_the_scope_of_decoding_leaves_the_model_to_itself_and_then_prunes_again(llama):
    with open_session(llama, "griffin", 0.6) as session:
        before = numbers(scored(llama, session, questions(), "scored"))
        idle = scored(llama, session, questions(), "decode")
        assert numbers(scored(llama, session, questions(), "scored")) == before
    assert all((s.cost.effective_sparsity, s.cost.read, s.cost.mask_sparsity) == (0, 1, 0) for s in idle)
    dense = [s.logprob for s in scored(llama, Session(), questions(), "scored")]
    assert [s.logprob for s in idle] == pytest.approx(dense, abs=1e-6)
