"""Causal scoring: dense equals HFLM, pruned equals token-by-token decoding, nothing looks ahead; scopes of papers.

What scopes mean: tests/derivations/test_scored.py.
"""

import itertools
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, HyperCLOVAXConfig

from dart_eval.evaluation.cache import new_cache
from dart_eval.evaluation.costs import Distance
from dart_eval.evaluation.forwards import Forwards, output_head
from dart_eval.evaluation.lm import PrunedLM
from dart_eval.evaluation.requests import Request
from dart_eval.evaluation.scoring import scorer
from dart_eval.pruning.session import Session, prune
from dart_eval.sweep.events import silent
from dart_eval.sweep.options import SCOPES, config_from
from dart_eval.util.errors import UserError
from dart_eval.weights.rounding import rounded_ffns
from tests.helpers.commands import run_local
from tests.helpers.distances import assert_apart, dense_logits, states_of
from tests.helpers.matrices import in_turn, on_families
from tests.helpers.models import FAMILIES, SMALL, random_tokens, tiny
from tests.helpers.requests import output_head_of, questions, words
from tests.helpers.sessions import RESTLESS, VARIED, fed, open_session

METHODS = [("random", {}), *VARIED]


def _score(model, session, requests, scope="scored", batch_size=4, **more):
    return scorer(model, output_head_of(model, session), session, batch_size, scope, **more).score(requests)


def test_dense_equals_stock_hflm(model, tokenizer):
    """Log-likelihoods within 1e-4 in fp32, and the same greedy flags."""
    model = model.float()
    requests = questions()
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)
    # lm-eval's public call takes texts; these are tokens.
    theirs = stock._loglikelihood_tokens(
        [(("", str(i)), list(r.context), list(r.continuation)) for i, r in enumerate(requests)], disable_tqdm=True
    )
    ours = _score(model, Session(), requests)
    for (logprob, greedy), score in zip(theirs, ours, strict=True):
        assert score.logprob == pytest.approx(logprob, abs=1e-4)
        assert score.greedy == greedy
        assert score.cost.not_read_sum == 0


@torch.no_grad()
@on_families(["method", "params"], FAMILIES, METHODS, every=6)
def test_scores_equal_decoding_token_by_token(model, method, params):
    """The no-look-ahead test: blocks, shared contexts and re-masks give what one token at a time gives, as far from
    the model without a session."""
    requests = [r for r in questions() if len(r.context) > 1]
    states = states_of(model, requests)
    with open_session(model, method, **params) as session:
        blocks = _score(model, session, requests, states=states)
    remasks = 0
    for request, score in list(zip(requests, blocks, strict=True))[::2]:  # short answers and long, of every context
        # By masks where a kernel rounds inputs to 15 bits.
        how = "masked" if method == "grinqh" else "auto"
        with open_session(model, method, execution=how, **params) as session:
            context = model(torch.tensor([request.context[:-1]]), use_cache=True)
            logits = fed(model, context, (request.context[-1], *request.continuation[:-1]))[0][0]
            logprobs = logits.log_softmax(-1)[range(len(logits)), request.continuation]
            assert score.logprob == pytest.approx(float(logprobs.sum()), abs=2e-5)
            assert score.cost.remasks == sum(session.remasks)
        assert_apart(score.cost.distance, dense_logits(model, request), logits, request.continuation)
        remasks += score.cost.remasks
    assert bool(remasks) == any(path.startswith("remask") for path in params)


def test_the_context_is_computed_once_for_all_candidates(llama):
    output_head_of(llama)  # checks itself with a forward of its own
    lengths = []
    handle = llama.model.register_forward_pre_hook(
        lambda _m, _a, kw: lengths.append(tuple(kw["input_ids"].shape)), with_kwargs=True
    )
    context = random_tokens(30, seed=4)
    one_token = [Request(context, (t,)) for t in (5, 6, 7, 8)]
    _score(llama, Session(), one_token)
    assert lengths == [(1, 30)]  # dense: the context's forward has the four answers
    lengths.clear()
    _score(llama, Session(), [Request(context, random_tokens(4, seed=s)) for s in range(4)])
    assert lengths == [(1, 30), (4, 3)]
    lengths.clear()
    with open_session(llama, "griffin") as session:
        lengths.clear()
        _score(llama, session, one_token)
        assert lengths == [(1, 29), (1, 1)]  # the four answers share the pruned forward
        lengths.clear()
        _score(llama, session, [Request(context, random_tokens(4, seed=s)) for s in range(4)])
        assert lengths == [(1, 29), (4, 4)]
    handle.remove()


def test_logits_are_computed_only_where_they_are_scored(llama):
    seen = []
    handle = llama.lm_head.register_forward_pre_hook(lambda _m, a: seen.append(a[0].shape[:-1].numel()))
    head = output_head(llama)
    seen.clear()
    requests = [Request(random_tokens(30), random_tokens(n, seed=n)) for n in (2, 9)]
    scorer(llama, head, Session(), 4).score([*requests, Request(random_tokens(30), (*requests[1].continuation[:3], 5))])
    handle.remove()
    assert sum(seen) == 2 + 9 - 1  # the first position is one for all, and the third answer asks at no other


@pytest.mark.parametrize("method", [None, "griffin"])
def test_perplexity_scores_the_second_half_of_each_chunk(llama, tokenizer, method):
    llama = llama.float()
    tokens = random_tokens(70, seed=6)
    chunks = [(1, *tokens[:32]), (1, *tokens[32:64]), (1, *tokens[64:])]
    halves = [Request(c[: (len(c) + 1) // 2], c[(len(c) + 1) // 2 :]) for c in chunks]
    states = states_of(llama, halves) if method else None
    lm = PrunedLM(llama, tokenizer, batch_size=2, chunk=33, states=states)

    def run(session):
        lm.begin(session, {})
        request = SimpleNamespace(args=(words(tokens),), task_name="t", doc_id=0)
        (answer,) = lm.loglikelihood_rolling([request])
        return answer, _score(llama, session, halves, states=states)

    with open_session(llama, method) if method else nullcontext(Session()) as session:
        answer, scores = run(session)
    assert float(answer) == pytest.approx(sum(s.logprob for s in scores), abs=1e-3)
    scored = sum(len(h.continuation) for h in halves)
    assert answer.coverage == pytest.approx(scored / len(tokens), abs=0.05)
    assert lm.costs["t", 0].tokens == scored
    if method is None:  # stock: the second half given the first
        stock = HFLM(pretrained=llama, tokenizer=tokenizer)
        pairs = [(("", ""), list(h.context), list(h.continuation)) for h in halves]
        # lm-eval's public call takes texts and cuts them otherwise; these are our chunks.
        theirs = sum(v for v, _ in stock._loglikelihood_tokens(pairs, disable_tqdm=True))
        assert float(answer) == pytest.approx(theirs, abs=1e-3)
    else:
        found, wanted = lm.costs["t", 0].distance, sum((s.cost.distance for s in scores), Distance())
        assert (found.positions, found.agreed) == (scored, wanted.agreed)
        assert found.kl == pytest.approx(wanted.kl, rel=1e-5) and found.kl > 0.1


def test_softcapped_and_scaled_heads_are_understood():
    for config in (
        Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=3.0),
        CohereConfig(**SMALL, logit_scale=0.3),
        GraniteConfig(**SMALL, logits_scaling=4.0),
        HyperCLOVAXConfig(**SMALL, logits_scaling=0.25),  # multiplies
    ):
        model = AutoModelForCausalLM.from_config(config).eval()
        ids = torch.tensor([random_tokens(9)])
        hidden = model.base_model(ids)[0][0]
        assert torch.allclose(output_head(model)(hidden), model(ids).logits[0], atol=1e-5)


def test_a_head_that_does_more_is_refused():
    model = tiny("llama")
    forward = model.forward

    def changed(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out

    model.forward = changed
    with pytest.raises(UserError, match="output head"):
        output_head(model)


def test_what_is_not_read_and_what_is_outside_the_mask_are_counted_apart(llama):
    """A token of oracle-token leaves out half of the neurons, and none is outside a mask."""
    request = Request(random_tokens(20), random_tokens(6, seed=1))
    with open_session(llama, "oracle-token", 0.5) as session:
        (score,) = _score(llama, session, [request])
        assert (session.mask_sparsity, session.weights_read) == (0, pytest.approx(0.5))
    assert (score.cost.not_read_sum, score.cost.outside_sum) == (pytest.approx(0.5 * 6), 0)


def test_a_log_counts_every_token_of_a_block(llama):
    """Answers run in blocks of a window's three tokens; the last context token is the first of them."""
    with open_session(llama, "dart", 0.5, **RESTLESS) as session:
        _score(llama, session, [Request(random_tokens(20), random_tokens(8, seed=1))])
        assert [e["token"] for e in session.events] == [a["token"] for a in session.log.alarms] == [3, 6]


def test_a_dense_session_is_asked_nothing_that_one_which_prunes_does_not_know(llama):
    with open_session(llama, "griffin") as session:
        assert [name for name in dir(Session()) if not hasattr(session, name) and name[0] != "_"] == []


# -- scopes of other papers, and the oracle ----------------------------------------------------------------------------

IN_SCOPES = ["random", "griffin", "dart", "cats", "teal"]
OTHERS = [scope for scope in SCOPES if scope != "scored"]


def numbers(scores):
    costs = ("tokens", "pruned_tokens", "not_read_sum", "outside_sum")
    return [(s.logprob, s.greedy, *(getattr(s.cost, name) for name in costs)) for s in scores]


@on_families(["scope"], FAMILIES, OTHERS)
def test_dense_is_dense_in_every_scope(model, scope):
    requests = questions()
    stock = [s.logprob for s in _score(model, Session(), requests, "scored")]
    assert [s.logprob for s in _score(model, Session(), requests, scope)] == pytest.approx(stock, abs=1e-5)
    with open_session(model, "griffin", 0.0) as session:
        assert [s.logprob for s in _score(model, session, requests, scope)] == pytest.approx(stock, abs=1e-5)


@on_families(["method", "scope"], ["llama", "gemma3"], [(m, s) for m in IN_SCOPES for s in OTHERS], every=4)
def test_batch_size_and_order_do_not_matter(model, method, scope):
    requests = questions()
    found = []
    for batch_size, order in ((1, 1), (3, 1), (16, -1)):
        with open_session(model, method) as session:
            found.append(numbers(_score(model, session, requests[::order], scope, batch_size)[::order]))
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
        _score(llama, session, [Request(random_tokens(30), random_tokens(14, seed=1))], scope)
        assert session.remasks == [0]
        assert session.events == session.log.alarms == session.log.signals == []


def test_a_single_input_runs_pruned_unless_its_mask_needs_more(llama):
    for method, pruned in (("griffin", 0), ("teal", 1)):
        with open_session(llama, method, 0.5) as session:
            assert _score(llama, session, [Request((5,), (7,))], "last")[0].cost.pruned_tokens == pruned


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


@pytest.mark.slow
@pytest.mark.parametrize(("method", "params", "scope", "bits"), in_turn(KINDS, [
    *zip(SCOPES, itertools.cycle(["8", "16"])),
]))  # fmt: skip
@torch.no_grad()
def test_every_kind_of_method_runs_where_the_scope_says(method, params, scope, bits):
    if scope == "all" and method == "griffin":
        pytest.skip("its mask is made from all inputs: test_scored.py")
    model = tiny("llama", dtype=torch.float32)
    requests = [Request(random_tokens(c, seed=c), random_tokens(a, seed=50 + a)) for c, a in ((23, 6), (9, 1), (3, 8))]
    with rounded_ffns(model, "16" if method == "grinqh" else bits):  # it makes codes of 16-bit weights
        dense = [dense_logits(model, r) for r in requests]  # on the same weights, without a session
        states = states_of(model, requests)
        with open_session(model, method, 0.5, **params) as session:
            found = _score(model, session, requests, scope, batch_size=2, states=states)
            serves = session.prompts_replaced
            hand = [by_hand(model, session, r, scope) for r in requests]
        for request, score, plain, (logits, not_read) in zip(requests, found, dense, hand, strict=True):
            if serves and scope == "decode":
                logits = plain  # where nothing runs pruned, weights are what they are
            logprobs = logits.float().log_softmax(-1)
            logprob = sum(float(row[t]) for row, t in zip(logprobs, request.continuation, strict=True))
            assert score.logprob == pytest.approx(logprob, abs=2e-5)
            assert_apart(score.cost.distance, plain, logits, request.continuation)
            if scope != "all" or method not in ("teal", "cats"):  # which means over all inputs there
                assert score.cost.not_read_sum == pytest.approx(not_read, abs=1e-6)


def test_the_scope_of_decoding_leaves_the_model_to_itself_and_then_prunes_again(llama):
    with open_session(llama, "griffin", 0.6) as session:
        before = numbers(_score(llama, session, questions(), "scored"))
        idle = _score(llama, session, questions(), "decode")
        assert numbers(_score(llama, session, questions(), "scored")) == before
    assert all((s.cost.effective_sparsity, s.cost.read, s.cost.mask_sparsity) == (0, 1, 0) for s in idle)
    dense = [s.logprob for s in _score(llama, Session(), questions(), "scored")]
    assert [s.logprob for s in idle] == pytest.approx(dense, abs=1e-6)
