"""Causal scoring: dense equals HFLM, pruned equals token-by-token decoding, and nothing looks ahead."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, HyperCLOVAXConfig

from dart_eval.evaluation.forwards import output_head
from dart_eval.evaluation.lm import PrunedLM
from dart_eval.evaluation.requests import Request
from dart_eval.evaluation.scoring import scorer
from dart_eval.layers.families import cache_argument
from dart_eval.pruning.session import Session
from dart_eval.util.errors import UserError
from tests.helpers.distances import assert_apart, dense_logits
from tests.helpers.matrices import on_families
from tests.helpers.models import FAMILIES, SMALL, random_tokens, tiny
from tests.helpers.requests import output_head_of, questions, words
from tests.helpers.sessions import RESTLESS, VARIED, cache_of, open_session

METHODS = [("random", {}), *VARIED]


def _score(model, session, requests, batch_size=4, **more):
    return scorer(model, output_head_of(model, session), session, batch_size, **more).score(requests)


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


def _step_by_step(model, session, request):
    """Feed one token at a time under the session's own phases: decoding cannot see what was not yet fed."""
    name = cache_argument(model)
    out, logits = model(torch.tensor([request.context[:-1]]), use_cache=True), []
    for token in (request.context[-1], *request.continuation[:-1]):
        out = model(torch.tensor([[token]]), use_cache=True, **{name: cache_of(out)})
        logits.append(out.logits[0, -1])
    return torch.stack(logits)


@torch.no_grad()
@on_families(["method", "params"], FAMILIES, METHODS, every=4)
def test_scores_equal_decoding_token_by_token(model, method, params):
    """The no-look-ahead test: blocks, shared contexts and re-masks give what one token at a time gives, as far from
    the model without a session."""
    requests = [r for r in questions() if len(r.context) > 1]
    with open_session(model, method, **params) as session:
        blocks = _score(model, session, requests, distances=True)
    remasks = 0
    for request, score in list(zip(requests, blocks, strict=True))[::2]:  # short answers and long, of every context
        # By masks where a kernel rounds inputs to 15 bits.
        how = "masked" if method == "grinqh" else "auto"
        with open_session(model, method, execution=how, **params) as session:
            logits = _step_by_step(model, session, request)
            logprobs = logits.log_softmax(-1)[range(len(logits)), request.continuation]
            assert score.logprob == pytest.approx(float(logprobs.sum()), abs=2e-5)
            assert score.cost.remasks == sum(session.remasks)
        if not session.prompts_on_codes:  # contexts of whole numbers are none of dense's: no distance is told
            assert_apart(score.cost.distance, dense_logits(model, request), logits)
        assert bool(score.cost.distance.positions) != session.prompts_on_codes
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
    lm = PrunedLM(llama, tokenizer, batch_size=2, chunk=33)
    chunks = [(1, *tokens[:32]), (1, *tokens[32:64]), (1, *tokens[64:])]
    halves = [Request(c[: (len(c) + 1) // 2], c[(len(c) + 1) // 2 :]) for c in chunks]

    def run(session):
        lm.begin(session, {})
        request = SimpleNamespace(args=(words(tokens),), task_name="t", doc_id=0)
        (answer,) = lm.loglikelihood_rolling([request])
        return answer, _score(llama, session, halves)

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
