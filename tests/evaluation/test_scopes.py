"""Scopes `all` and `last`, and the oracle: batches, what looks ahead, what is refused.

What they mean: tests/derivations/test_scored.py.
"""

import pytest
import torch

from dart_eval.allocation import write_table
from dart_eval.config import config_from
from dart_eval.errors import UserError
from dart_eval.evaluation.requests import Request
from dart_eval.evaluation.scoring import scorer
from dart_eval.executors.jobs import Silent
from dart_eval.pruning.dense import DenseSession
from dart_eval.pruning.prune import prune
from tests.helpers.commands import run_local
from tests.helpers.matrices import on_families
from tests.helpers.models import FAMILIES, random_tokens
from tests.helpers.requests import output_head_of, questions
from tests.helpers.sessions import RESTLESS, open_session

METHODS = ["random", "griffin", "dart", "dart-choice"]


def scored(model, session, requests, scope, batch_size=4):
    return scorer(model, output_head_of(model), session, batch_size, scope).score(requests)


def numbers(scores):
    return [
        (s.logprob, s.greedy, s.cost.tokens, s.cost.pruned_tokens, s.cost.not_read_sum, s.cost.outside_sum)
        for s in scores
    ]


@pytest.mark.parametrize("scope", ["all", "last"])
def test_dense_is_dense_in_every_scope(model, scope):
    requests = questions()
    stock = [s.logprob for s in scored(model, DenseSession(), requests, "scored")]
    assert [s.logprob for s in scored(model, DenseSession(), requests, scope)] == pytest.approx(stock, abs=1e-5)
    with open_session(model, "griffin", 0.0) as session:
        assert [s.logprob for s in scored(model, session, requests, scope)] == pytest.approx(stock, abs=1e-5)


@on_families(["method", "scope"], FAMILIES, [(m, s) for m in METHODS for s in ("all", "last")], every=2)
def test_batch_size_and_order_do_not_matter(model, method, scope):
    requests = questions()
    found = []
    for batch_size, order in ((1, 1), (3, 1), (16, -1)):
        with open_session(model, method) as session:
            found.append(numbers(scored(model, session, requests[::order], scope, batch_size)[::order]))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert a == pytest.approx(b, abs=1e-6)


@pytest.mark.parametrize(("scope", "ahead"), [("all", True), ("last", False)])
def test_only_all_lets_a_later_token_change_an_earlier_score(llama, scope, ahead):
    """One forward split in two ways: the difference is the score of the first answer token."""
    context, start = random_tokens(20, seed=3), random_tokens(3, seed=4)
    firsts = []
    for later in (8, 60):
        with open_session(llama, "griffin", 0.6) as session:
            whole = Request(context, (*start, later, 9))
            rest = Request((*context, start[0]), (*start[1:], later, 9))
            one, two = scored(llama, session, [whole, rest], scope)
        firsts.append(one.logprob - two.logprob)
    assert (firsts[0] != pytest.approx(firsts[1], abs=1e-6)) == ahead


def test_the_oracle_does_not_depend_on_the_batch(llama):
    output_head_of(llama)
    requests, found = questions(), []
    for batch_size in (1, 8):
        with open_session(llama, "oracle", 0.5) as session:
            found.append(numbers(scored(llama, session, requests, "scored", batch_size)))
    for a, b in zip(*found, strict=True):
        assert a == pytest.approx(b, abs=1e-6)


def test_what_only_scored_answers_can_have_is_refused_beforehand(tmp_path, saved_llama):
    folder = saved_llama
    for changes, words in (
        ({"method": "oracle", "scope": "last"}, "has no such"),
        ({"method": "oracle", "tasks": "smoke_summary"}, "generates"),
        ({"scope": "all", "tasks": "smoke_summary"}, "generates text"), ({"scope": "some"}, "unknown"),
        ({"allocation": "table:none.json"}, "not a file"),
    ):  # fmt: skip
        given = {"tasks": "smoke_questions", "method": "dart", "limit": 1, "output": str(tmp_path / "out"), **changes}
        with pytest.raises(UserError, match=words):
            run_local(config_from(None, {"model": folder, **given}), Silent())
    table = tmp_path / "table.json"
    write_table(table, [0.5, 0.5, 0.5])
    given = {"tasks": "smoke_questions", "method": "dart", "sparsity": "0.5,0.7", "allocation": f"table:{table}"}
    config = config_from(None, {"model": folder, **given, "output": str(tmp_path / "out")})
    with pytest.raises(UserError, match="the allocation table keeps"):
        run_local(config, Silent())
    assert not (tmp_path / "out").exists()


def test_the_oracle_is_no_method_to_generate_with(llama):
    ids = torch.tensor([random_tokens(9)])
    with prune(llama, "oracle", 0.5), pytest.raises(UserError, match="looks ahead at the text to be scored"):
        llama.generate(ids, max_new_tokens=2, pad_token_id=0)


@pytest.mark.parametrize("scope", ["all", "last"])
def test_no_mask_is_made_anew_while_a_whole_input_runs_under_it(llama, scope):
    with open_session(llama, "dart", **RESTLESS) as session:
        scored(llama, session, [Request(random_tokens(30), random_tokens(14, seed=1))], scope)
        assert session.state.remasks.tolist() == [0]
        assert session.events == session.log.alarms == session.log.signals == []
