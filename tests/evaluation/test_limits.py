"""Limits: of models that take no padding or one token at a time, of their heads, and of what memory may hold."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dart_eval.evaluation import forwards, logits
from dart_eval.evaluation.batching import batches
from dart_eval.evaluation.cache import can_pad, can_share_prefix, fork, new_cache
from dart_eval.evaluation.forwards import Forwards, output_head
from dart_eval.evaluation.lm import PrunedLM
from dart_eval.evaluation.logits import Answers
from dart_eval.evaluation.requests import Request
from dart_eval.evaluation.scoring import scorer
from dart_eval.pruning.session import Session
from dart_eval.util.errors import UserError
from tests.helpers.models import SMALL, VOCAB, random_tokens
from tests.helpers.requests import TextRequest, words
from tests.helpers.sessions import open_session
from tests.matrix.types import VOCABULARY, WORDS, tiny

# Contexts of several lengths, one of them twice, and answers of several tokens.
ASKED = [Request(random_tokens(n, seed), random_tokens(4, 9 + n)) for n, seed in ((9, 0), (9, 1), (14, 2), (11, 3))]


def test_rows_that_must_not_be_padded_run_with_their_equals():
    lengths = [9, 9, 7, 7, 7, 7, 4, 1]
    parts = batches(lengths, rows=3, forward=100, padded=False)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(8))
    assert all(len({lengths[i] for i in range(p.start, p.stop)}) == 1 for p in parts)
    assert [p.stop - p.start for p in parts] in ([2, 3, 1, 1, 1], [2, 1, 3, 1, 1], [2, 2, 2, 1, 1])
    assert batches(lengths, rows=8, forward=100) == [slice(0, 8)]  # and others may


@pytest.mark.parametrize("scope", ["last", pytest.param("scored", marks=pytest.mark.slow)])
def test_a_model_that_pools_columns_gives_the_same_numbers_in_batches(scope):
    model = tiny("deepseek_v4")
    assert not can_pad(model) and not can_share_prefix(model)
    head = output_head(model)
    with open_session(model, "griffin", 0.5, execution="masked") as session:
        together = [a.logprob for a in scorer(model, head, session, 4, scope).score(ASKED)]
    for request, found in zip(ASKED, together, strict=True):
        with open_session(model, "griffin", 0.5, execution="masked") as session:
            (alone,) = scorer(model, head, session, 1, scope).score([request])
        assert abs(alone.logprob - found) < 1e-3


def test_a_model_that_padding_moves_is_refused(monkeypatch):
    monkeypatch.setattr(forwards, "can_pad", lambda _model: True)
    with pytest.raises(UserError, match="different logits to a row with padding"):
        output_head(tiny("deepseek_v4"))


@pytest.mark.parametrize("method", ["griffin", "oracle-token"])
def test_a_state_space_that_begins_anew_takes_one_token_at_a_time(method):
    model = tiny("jamba")
    head = output_head(model)
    assert Forwards(model, head).blocks(3) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    dense = [a.logprob for a in scorer(model, head, Session(), 4).score(ASKED)]
    with open_session(model, method, 0.0, execution="masked") as session:
        found = [a.logprob for a in scorer(model, head, session, 4).score(ASKED)]
    assert torch.allclose(torch.tensor(found), torch.tensor(dense), atol=1e-3)


def test_others_take_several(llama):
    assert Forwards(llama, output_head(llama)).blocks(3) == [slice(0, 3)]


def test_copies_of_a_cache_of_its_own_class_are_independent():
    model = tiny("minimax")
    cache = new_cache(model)
    assert type(cache).__name__ == "MiniMaxCache" and not can_share_prefix(model)
    ids = torch.tensor([random_tokens(8, 1), random_tokens(8, 2)])
    with torch.no_grad():
        model(input_ids=ids, cache=cache, use_cache=True)
        swapped = fork(cache, torch.tensor([1, 0]))
        token, words = torch.tensor([[5], [6]]), []
        for copied, order in ((swapped, [1, 0]), (cache, [0, 1])):
            words.append(model(input_ids=token[order], cache=copied, use_cache=True).logits[order])
    assert torch.allclose(*words, atol=1e-5)


@pytest.mark.parametrize("name", ["inkling_text", "inkling2_text"])  # whose head has a row of each; or has none
def test_words_that_a_head_leaves_out_have_no_probability(name):
    model = tiny(name)
    head, ids = output_head(model), torch.tensor([random_tokens(5)])
    with torch.no_grad():
        ours, theirs = head(model.model(input_ids=ids)[0]), model(input_ids=ids).logits
    assert ours.shape[-1] == VOCABULARY and theirs.shape[-1] == WORDS < VOCABULARY
    assert ours[..., WORDS:].isinf().all() and torch.allclose(ours[..., :WORDS], theirs, atol=1e-5)


# -- memory ------------------------------------------------------------------------------------------------------------


def _answers(head, hidden, continuations):
    """Log-probabilities of the continuations, the hidden states of their positions in a row."""
    answers, paths, start = Answers(head, head.out_features), [], 0
    for continuation in continuations:
        paths.append(answers.ask(answers.root(), continuation))
        answers.give(paths[-1], hidden[start : start + len(continuation)])
        start += len(continuation)
    answers.run()
    return [answers.logprobs(path, c) for path, c in zip(paths, continuations, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 8, 100])
def test_neither_parts_nor_the_models_precision_change_a_probability(monkeypatch, dtype, rows):
    """So many rows of logits at a time, and a quarter of them in a softmax."""
    monkeypatch.setattr(logits, "LOGIT_BYTES", rows * 4 * 50)
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(8, 50).to(dtype), torch.randn(15, 8).to(dtype)
    continuations = [tuple(torch.randint(50, (n,)).tolist()) for n in (1, 5, 2, 7)]
    with torch.no_grad():
        found = _answers(head, hidden, continuations)
        wanted = head(hidden).float().log_softmax(-1)
    tokens = torch.tensor([t for c in continuations for t in c])
    assert [p for row in found for p in row] == pytest.approx(wanted[torch.arange(15), tokens].tolist(), abs=1e-5)


def test_answers_that_begin_alike_share_their_first_positions_alone():
    answers = Answers(torch.nn.Linear(8, 50), 50)
    root = answers.root()
    one, two, three = (answers.ask(root, c) for c in ((5, 6, 7), (5, 6, 8, 9), (5, 9, 7)))
    assert one == two[:3] and one[:2] == three[:2]
    assert one[2] != three[2]


LENGTH = 200


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor of floats has that an operation makes."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(made, torch.Tensor) and made.is_floating_point():
                self.most = max(self.most, made.numel())
        return out


@pytest.mark.parametrize("method", [None, "griffin", "dart", "grinqh"])
def test_no_tensor_has_all_layers_or_all_logits_of_a_prompt(llama, tokenizer, method):
    lm = PrunedLM(llama, tokenizer, batch_size=1)
    request = TextRequest(words(random_tokens(LENGTH, seed=1)), 0, tokens=3)
    with open_session(llama, method, 0.5) if method else nullcontext(Session()) as session, Largest() as seen:
        lm.begin(session, {})
        lm.generate_until([request])
    wide = LENGTH * max(SMALL["intermediate_size"], SMALL["hidden_size"])
    assert wide <= seen.most < LENGTH * VOCAB  # [T, F] of a layer is the largest, and [T, V] never is there
