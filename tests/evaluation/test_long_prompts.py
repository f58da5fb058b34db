"""What a long prompt needs in memory: one layer's activations at a time, no logits but the last, keys and values."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dart_eval.evaluation.lm import PrunedLM
from dart_eval.pruning.session import Session
from tests.helpers.models import SMALL, VOCAB, random_tokens, tiny
from tests.helpers.requests import TextRequest, words
from tests.helpers.sessions import open_session

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
def test_no_tensor_has_all_layers_or_all_logits_of_a_prompt(tokenizer, method):
    model = tiny("llama")
    lm = PrunedLM(model, tokenizer, batch_size=1)
    request = TextRequest(words(random_tokens(LENGTH, seed=1)), 0, tokens=3)
    with open_session(model, method, 0.5) if method else nullcontext(Session()) as session, Largest() as seen:
        lm.begin(session, {})
        lm.generate_until([request])
    wide = LENGTH * max(SMALL["intermediate_size"], SMALL["hidden_size"])
    assert wide <= seen.most < LENGTH * VOCAB  # [T, F] of a layer is the largest, and [T, V] never is there
