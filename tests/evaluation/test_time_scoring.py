"""scripts/time_scoring.py: counts are those of the shapes, ours and stock agree, the input is checked."""

import pytest
import torch

from dart_eval.evaluation.requests import Request
from dart_eval.evaluation.tasks import Tasks
from dart_eval.util.errors import UserError
from scripts import time_scoring
from scripts.time_scoring import Computed, counted, measure, needed_for
from tests.helpers.models import random_tokens, tiny


def test_both_sides_answer_alike_and_ours_computes_less(tokenizer, monkeypatch):
    monkeypatch.setattr(time_scoring, "LOGIT_BYTES", 2**18)  # no test here asks how fast anything is
    model = tiny("llama").float()
    model.config.max_position_embeddings = 1024
    speed = measure(model, tokenizer, Tasks(), "smoke_questions", batch_size=3, rounds=2, limit=9)
    stock, ours, auto = speed.sides
    assert (stock.name, ours.name, auto.name) == ("HFLM", "dart-eval, 3", "dart-eval, auto")
    assert (speed.items, speed.requests) == (9, 36)
    for side in (ours, auto):
        assert side.same and side.difference < 1e-4
        assert side.accuracy == stock.accuracy and set(side.accuracy) == {"acc", "acc_norm"}
        assert len(side.seconds) == len(speed.limit_seconds) == 2
        assert speed.needed.tokens <= side.computed.tokens
        assert speed.needed.logits == side.computed.logits < stock.computed.logits
        assert side.ratio > 0 and side.limit_share > 0
    assert ours.computed.tokens < stock.computed.tokens  # auto may pad more, where that makes fewer forwards
    with pytest.raises(UserError, match="smoke_summary"):
        measure(model, tokenizer, Tasks(), "smoke_summary", limit=2)


def test_what_must_be_computed():
    prefix = random_tokens(40, seed=1)
    contexts = [(*prefix, *random_tokens(n, seed=n)) for n in (5, 9)] + [random_tokens(7, seed=3)]
    requests = [Request(c, (4, 5, 6)) for c in contexts] + [Request(contexts[0], (4, 5, 9)), Request(contexts[2], (8,))]
    # prefix and rests; two tokens of each distinct continuation, none of the last; predictions after it and two tokens
    assert needed_for(requests, 8) == Computed(40 + 5 + 9 + 7 + 3 * 2, 3 * 3)
    assert needed_for(requests, 100) == Computed(2 * 40 + 5 + 9 + 7 + 3 * 2, 3 * 3)  # not worth a forward


def test_tokens_are_counted_where_they_are_computed(llama):
    with counted(llama) as computed:
        llama(torch.tensor([random_tokens(7)] * 3))
        llama.base_model(torch.tensor([random_tokens(5)]))
    llama(torch.tensor([random_tokens(7)]))
    assert computed == Computed(3 * 7 + 5, 3 * 7)
