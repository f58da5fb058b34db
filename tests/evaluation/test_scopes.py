"""Scopes `all` and `last`, and the oracle: what each lets a mask see, by brute force."""

import pytest
import torch

from dart_eval.allocation import write_table
from dart_eval.errors import UserError
from dart_eval.evaluation.requests import Request
from dart_eval.evaluation.scoring import scorer
from dart_eval.executors.jobs import Silent
from dart_eval.ffn import cache_argument, find_ffns
from dart_eval.plan import config_from
from dart_eval.pruning.masks import top_k_mask
from dart_eval.pruning.session import prune
from tests.helpers.commands import run_local
from tests.helpers.matrices import on_families
from tests.helpers.models import FAMILIES, random_tokens, save_tiny
from tests.helpers.requests import output_head_of, questions
from tests.helpers.sessions import cache_of, open_session

METHODS = ["random", "griffin", "dart", "dart-plus"]


def scored(model, session, requests, scope, batch_size=4):
    return scorer(model, output_head_of(model), session, batch_size, scope).score(requests)


def numbers(scores):
    return [(s.logprob, s.greedy, s.tokens, s.masked, s.pruned, s.outside) for s in scores]


@pytest.mark.parametrize("scope", ["all", "last"])
def test_dense_is_dense_in_every_scope(model, scope):
    requests = questions()
    stock = [s.logprob for s in scored(model, None, requests, "scored")]
    assert [s.logprob for s in scored(model, None, requests, scope)] == pytest.approx(stock, abs=1e-5)
    with open_session(model, "griffin", 0.0) as session:
        assert [s.logprob for s in scored(model, session, requests, scope)] == pytest.approx(stock, abs=1e-5)


@on_families(["method", "scope"], FAMILIES, [(m, s) for m in METHODS for s in ("all", "last")])
def test_batch_size_and_order_do_not_matter(model, method, scope):
    requests = questions()
    found = []
    for batch_size, order in ((1, 1), (3, 1), (16, -1)):
        with open_session(model, method) as session:
            found.append(numbers(scored(model, session, requests[::order], scope, batch_size)[::order]))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert a == pytest.approx(b, abs=1e-6)


def _griffin_masks(model, tokens, sparsity=0.5):
    """Masks from these tokens' dense activations, by the formula."""
    hidden = {}
    ffns = find_ffns(model)
    handles = [f.down.register_forward_pre_hook(lambda _m, a, i=f.layer: hidden.__setitem__(i, a[0])) for f in ffns]
    model(torch.tensor([tokens]))
    for handle in handles:
        handle.remove()
    keep = torch.tensor([round((1 - sparsity) * ffns[0].size)])
    masks = []
    for f in ffns:
        h = hidden[f.layer].reshape(len(tokens), -1).double()
        masks.append(top_k_mask((h / h.norm(dim=1, keepdim=True)).square().sum(0)[None], keep)[0])
    return masks


def _masked(model, masks):
    return [
        f.down.register_forward_pre_hook(lambda _m, a, m=m: (a[0] * m,))
        for f, m in zip(find_ffns(model), masks, strict=True)
    ]


@torch.no_grad()
def test_all_makes_the_mask_from_the_whole_forward_and_prunes_the_whole_forward(model):
    request = Request(random_tokens(12, seed=1), random_tokens(5, seed=2))
    inputs = (*request.context, *request.continuation[:-1])
    handles = _masked(model, _griffin_masks(model, inputs))
    logits = model(torch.tensor([inputs])).logits[0, len(request.context) - 1 :].log_softmax(-1)
    for handle in handles:
        handle.remove()
    wanted = sum(float(row[t]) for row, t in zip(logits, request.continuation, strict=True))
    with open_session(model, "griffin", 0.5) as session:
        (score,) = scored(model, session, [request], "all")
    assert score.logprob == pytest.approx(wanted, abs=1e-5)
    assert (score.masked, score.pruned) == (5, pytest.approx(2.5))


@torch.no_grad()
def test_last_prunes_the_last_input_token_only(model):
    request = Request(random_tokens(12, seed=1), random_tokens(5, seed=2))
    inputs = (*request.context, *request.continuation[:-1])
    out = model(torch.tensor([inputs[:-1]]), use_cache=True)
    dense = out.logits[0, len(request.context) - 1 :].log_softmax(-1)
    handles = _masked(model, _griffin_masks(model, inputs[:-1]))
    last = model(torch.tensor([inputs[-1:]]), use_cache=True, **{cache_argument(model): cache_of(out)})
    for handle in handles:
        handle.remove()
    rows = torch.cat([dense, last.logits[0].log_softmax(-1)])
    wanted = sum(float(row[t]) for row, t in zip(rows, request.continuation, strict=True))
    with open_session(model, "griffin", 0.5) as session:
        (score,) = scored(model, session, [request], "last")
    assert score.logprob == pytest.approx(wanted, abs=1e-5)
    assert (score.tokens, score.masked, score.pruned) == (5, 1, pytest.approx(0.5))


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


@torch.no_grad()
def test_the_oracle_is_the_mask_of_the_scored_tokens(model):
    output_head_of(model)  # checks itself with forwards of its own, before the session
    request = Request(random_tokens(12, seed=1), random_tokens(6, seed=2))
    prefix, answer = request.context[:-1], (request.context[-1], *request.continuation[:-1])
    hidden, ffns = {}, find_ffns(model)
    handles = [f.down.register_forward_pre_hook(lambda _m, a, i=f.layer: hidden.__setitem__(i, a[0])) for f in ffns]
    model(torch.tensor([(*prefix, *answer)]))
    for handle in handles:
        handle.remove()
    masks = []
    for f in ffns:
        h = hidden[f.layer].reshape(len(prefix) + len(answer), -1)[len(prefix) :].double()
        score = (h / h.norm(dim=1, keepdim=True)).square().sum(0)
        masks.append(top_k_mask(score[None], torch.tensor([20]))[0])
    out = model(torch.tensor([prefix]), use_cache=True)
    handles = _masked(model, masks)
    out = model(torch.tensor([answer]), use_cache=True, **{cache_argument(model): cache_of(out)})
    for handle in handles:
        handle.remove()
    logits = out.logits[0].log_softmax(-1)
    wanted = sum(float(row[t]) for row, t in zip(logits, request.continuation, strict=True))
    with open_session(model, "oracle", 0.5) as session:
        (score,) = scored(model, session, [request], "scored")
    assert score.logprob == pytest.approx(wanted, abs=1e-5)
    assert score.pruned == pytest.approx(3.0)


def test_the_oracle_does_not_depend_on_the_batch(llama):
    output_head_of(llama)
    requests, found = questions(), []
    for batch_size in (1, 8):
        with open_session(llama, "oracle", 0.5) as session:
            found.append(numbers(scored(llama, session, requests, "scored", batch_size)))
    for a, b in zip(*found, strict=True):
        assert a == pytest.approx(b, abs=1e-6)


def test_what_only_scored_answers_can_have_is_refused_beforehand(tmp_path, tokenizer):
    folder = save_tiny(tmp_path / "tiny", tokenizer)
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
