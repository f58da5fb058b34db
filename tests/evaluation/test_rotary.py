"""Rotary angles that depend on the length of the whole input: `longrope` (Phi-3) and `dynamic`."""

import contextlib

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import LlamaConfig, Phi3Config

from dart_eval.evaluation.lm import PrunedLM
from dart_eval.evaluation.requests import Request
from dart_eval.evaluation.rotary import Angles
from dart_eval.evaluation.scoring import scorer
from dart_eval.pruning.session import Session
from dart_eval.util.errors import UserError
from tests.helpers.matrices import in_turn, product
from tests.helpers.models import SMALL, hooked, made, random_tokens, tiny
from tests.helpers.requests import TextRequest, output_head_of, words
from tests.helpers.sessions import RESTLESS, open_session

ORIGINAL = 48  # tokens up to which the angles are the first ones
CONFIGS = {
    "longrope": lambda: Phi3Config(**SMALL, original_max_position_embeddings=ORIGINAL, rope_parameters={
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": ORIGINAL,
        "short_factor": [1.0] * 4, "long_factor": [8.0, 4.0, 2.0, 6.0],
    }),
    "dynamic": lambda: LlamaConfig(**SMALL | {"max_position_embeddings": ORIGINAL}, rope_parameters={
        "rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0,
    }),
}  # fmt: skip
KINDS = pytest.mark.parametrize("kind", CONFIGS)
METHODS = [None, ("griffin", {}), ("dart", RESTLESS), ("cats", {})]


def _model(kind, dtype=torch.float64):
    return made(CONFIGS[kind], dtype=dtype)


def _requests():
    """Rows on both sides of the original maximum, at it, and across it; several answers to one context."""
    lengths = [(10, 3), (40, 12), (46, 3), (47, 2), (48, 1), (48, 2), (44, 8), (60, 4), (20, 40), (70, 70)]
    found = [Request(random_tokens(c, seed=c), random_tokens(n, seed=100 + n)) for c, n in lengths]
    found += [Request(random_tokens(45, seed=45), random_tokens(n, seed=200 + n)) for n in (1, 2, 4, 5, 12)]
    start = random_tokens(40, seed=9)  # shared, and longer with some contexts than the angles stay the same
    return found + [
        Request((*start, *random_tokens(n, seed=300 + n)), random_tokens(3, seed=n)) for n in (2, 4, 6, 8, 20, 21, 22)
    ]


def _scores(model, method, batch_size, requests, scope="scored", share=True):
    head = output_head_of(model)
    with open_session(model, method[0], 0.5, **method[1]) if method else contextlib.nullcontext(Session()) as session:
        return [s.logprob for s in scorer(model, head, session, batch_size, scope, share).score(requests)]


def _stock(kind, tokenizer, requests):
    """Stock HFLM on a model just loaded. lm-eval's public call takes texts; these are tokens."""
    lm = HFLM(pretrained=_model(kind, torch.float32), tokenizer=tokenizer, batch_size=1, max_length=256)
    asked = [(("", ""), list(r.context), list(r.continuation)) for r in requests]
    return [logprob for logprob, _ in lm._loglikelihood_tokens(asked, disable_tqdm=True)]


@torch.no_grad()
def _plain(kind, request):
    """A forward of the whole row by a model just loaded, and nothing else."""
    ids = torch.tensor([[*request.context, *request.continuation]])
    rows = _model(kind, torch.float32)(input_ids=ids[:, :-1]).logits[0].log_softmax(-1)[len(request.context) - 1 :]
    return float(rows.gather(1, torch.tensor(request.continuation)[:, None]).sum())


@KINDS
def test_dense_equals_a_plain_forward_and_stock_hflm_at_batch_size_1(kind, tokenizer):
    """Stock on a model of its own for each request. One for all gives other numbers under `dynamic`, and wrong ones:
    transformers turns a row by the angles of a longer one that ran before, up to 1.08 nats off in 16 of these 22."""
    requests = _requests()
    plain = [_plain(kind, request) for request in requests]
    assert [_stock(kind, tokenizer, [request])[0] for request in requests] == pytest.approx(plain, abs=1e-5)
    model = _model(kind, torch.float32)
    for batch_size in (1, 8, "auto"):
        assert _scores(model, None, batch_size, requests) == pytest.approx(plain, abs=1e-4)
    apart = [abs(ours - theirs) for ours, theirs in zip(_stock(kind, tokenizer, requests), plain, strict=True)]
    assert sum(nats > 0.01 for nats in apart) == (16 if kind == "dynamic" else 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "method", "scope"),
    product(CONFIGS, [(m, "scored") for m in METHODS], "longrope", every=8)
    + product(CONFIGS, [(m, "last") for m in METHODS[::2]], "longrope", every=8),
)
def test_results_do_not_depend_on_the_batch_size_the_order_or_what_ran_before(kind, method, scope):
    model, requests = _model(kind), _requests()
    alone = [_scores(_model(kind), method, 1, [request], scope)[0] for request in requests[1:12:2]]
    for batch_size in (1, 8):
        found = _scores(model, method, batch_size, requests, scope)
        assert found[1:12:2] == pytest.approx(alone, abs=1e-6)
    assert _scores(model, method, 3, requests[::-1], scope)[::-1] == pytest.approx(found, abs=1e-6)


# The last seven share a prefix: no other batch comes between their two kinds.
@pytest.mark.parametrize(("kind", "method", "last"), in_turn([*CONFIGS], [(m,) for m in METHODS[:3]], [7, 0]))
def test_a_shared_prefix_has_the_angles_of_the_rows_that_share_it(kind, method, last):
    model, requests = _model(kind), _requests()[-last:]
    tokens, found = {True: [], False: []}, []
    for share in tokens:
        handle = model.base_model.register_forward_pre_hook(
            lambda _m, _args, kwargs, share=share: tokens[share].append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        found.append(_scores(model, method, 8, requests, share=share))
        handle.remove()
    assert found[1] == pytest.approx(found[0], abs=1e-6)
    assert sum(tokens[True]) < sum(tokens[False])


@KINDS
def test_held_angles_are_those_of_a_whole_input_of_that_length(kind):
    model = _model(kind)
    rotary, x = model.model.rotary_emb, torch.zeros(1, dtype=torch.float64)
    angles = Angles(model)
    for length in (20, ORIGINAL, ORIGINAL + 1, 80, 30):
        angles.reset()
        whole = rotary(x, torch.arange(length)[None])
        rotary(x, torch.arange(200)[None])  # what ran before
        with angles.held(angles.least_length(length)):
            first = rotary(x, torch.arange(5)[None])
            rest = rotary(x, position_ids=torch.arange(5, 11)[None])
        for part, a, b in zip(whole, first, rest, strict=True):
            assert torch.equal(part[:, :11], torch.cat([a, b], 1))
    assert not hooked(model)


def test_rows_are_told_apart_by_their_angles():
    longrope, dynamic, plain = Angles(_model("longrope")), Angles(_model("dynamic")), Angles(tiny("llama"))
    assert [longrope.least_length(n) for n in (1, 48, 49, 90)] == [0, 0, 49, 49]
    assert [dynamic.least_length(n) for n in (1, 48, 49, 90)] == [0, 0, 49, 90]
    assert [plain.least_length(n) for n in (1, 48, 49, 90)] == [0, 0, 0, 0]
    spans = [(90, 95), (50, 52), (47, 50), (45, 49), (40, 48), (10, 12)]
    assert longrope.together(spans) == [[0, 1], [2], [3], [4, 5]]
    assert dynamic.together(spans) == [[0], [1], [2], [3], [4, 5]]
    assert plain.together(spans) == [[0, 1, 2, 3, 4, 5]]
    model, kinds = tiny("llama"), [c().rope_parameters for c in CONFIGS.values()]
    model.config.rope_parameters = {"full_attention": kinds[0], "sliding_attention": {"rope_type": "default"}}
    assert Angles(model).least_length(90) == 49


def test_angles_that_cannot_be_told_a_length_are_refused():
    model = tiny("llama")
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    del model.model.rotary_emb.rope_type
    with pytest.raises(UserError, match="angles that depend on the length"):
        Angles(model)


# -- generation --------------------------------------------------------------------------------------------------------

PROMPTS, NEW = (10, 38, 45, 48, 49, 60), 12  # tokens; from 37 on, the angles change while text is written


def _request(tokens, new=NEW):
    return TextRequest(words(tokens), len(tokens), tokens=new)


def _generate(model, tokenizer, requests, batch_size, session=None):
    """Texts, and what each cost."""
    with session.paused() if session else contextlib.nullcontext():  # it checks itself with forwards of its own
        lm = PrunedLM(model, tokenizer, batch_size=batch_size, max_length=256)
    lm.begin(session or Session(), {})
    texts = lm.generate_until(requests)
    costs = [lm.costs["t", r.doc_id] for r in requests]
    return texts, [(c.tokens, c.pruned_tokens, round(c.not_read_sum, 6), c.remasks) for c in costs]


@pytest.mark.slow
@KINDS
def test_dense_generation_equals_stock_hflm_at_batch_size_1(kind, tokenizer):
    requests, stock = [_request(random_tokens(n, seed=n)) for n in PROMPTS], []
    for request in requests:
        lm = HFLM(pretrained=_model(kind), tokenizer=tokenizer, batch_size=1, max_length=256)
        stock += lm.generate_until([request], disable_tqdm=True)
    for batch_size in (1, 8):
        assert _generate(_model(kind), tokenizer, requests, batch_size)[0] == stock


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "method"), product(CONFIGS, [(m,) for m in METHODS[1:3]], "longrope", every=2))
def test_pruned_generation_does_not_depend_on_the_batch_size_or_what_ran_before(kind, method, tokenizer):
    requests, model = [_request(random_tokens(n, seed=n)) for n in PROMPTS], _model(kind)
    found = []
    for batch_size, order in ((1, 1), (8, 1), (8, -1)):
        with open_session(model, method[0], 0.5, **method[1]) as session:
            texts, costs = _generate(model, tokenizer, requests[::order], batch_size, session)
        found.append((texts[::order], costs[::order]))
    assert found[0] == found[1] == found[2]
    for request, text in zip(requests, found[0][0], strict=True):
        with open_session(_model(kind), method[0], 0.5, **method[1]) as session:
            assert _generate(session.model, tokenizer, [request], 1, session)[0] == [text]


@pytest.mark.parametrize("method", METHODS[1:3])
def test_where_phi3_computes_its_cache_anew_a_token_is_dense_and_masks_are_made_of_all_before_it(method, tokenizer):
    """A prompt of 40: token 10 follows 49 tokens, which run again, under the other angles, as a prompt would."""
    model, prompt = _model("longrope"), random_tokens(40, seed=40)

    def run(tokens, new):
        with open_session(model, method[0], 0.5, **method[1]) as session:
            texts, costs = _generate(model, tokenizer, [_request(tokens, new)], 8, session)
        return [int(word[1:]) for word in texts[0].split()], costs[0]

    whole, (tokens, masked, pruned, remasks) = run(prompt, NEW)
    first, (*_, first_remasks) = run(prompt, 9)
    rest, (*_, rest_remasks) = run((*prompt, *first), NEW - 9)
    assert whole == first + rest
    assert (tokens, masked) == (NEW, NEW - 2)
    assert pruned == pytest.approx(0.5 * (NEW - 2))
    assert remasks == first_remasks + rest_remasks
    assert (remasks > 0) == (method[0] == "dart")


def test_dynamic_angles_leave_the_cache_as_it_is(tokenizer):
    model = _model("dynamic")
    with open_session(model, "griffin", 0.5) as session:
        _, costs = _generate(model, tokenizer, [_request(random_tokens(40, seed=40))], 8, session)
    assert costs == [(NEW, NEW - 1, 0.5 * (NEW - 1), 0)]
