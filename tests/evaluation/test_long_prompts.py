"""What a long prompt needs in memory: one layer's activations at a time, no logits but the last, keys and values."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dart_eval.evaluation.forwards import Forwards, output_head
from dart_eval.evaluation.generation import Prompt, Prompts
from dart_eval.evaluation.lm import PrunedLM
from dart_eval.evaluation.requests import Request
from dart_eval.evaluation.scoring import scorer
from dart_eval.pruning.session.dense import DenseSession
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


@pytest.mark.parametrize("method", [None, "griffin", "dart", "dart-plus"])
def test_no_tensor_has_all_layers_or_all_logits_of_a_prompt(tokenizer, method):
    model = tiny("llama")
    lm = PrunedLM(model, tokenizer, batch_size=1)
    request = TextRequest(words(random_tokens(LENGTH, seed=1)), 0, tokens=3)
    with open_session(model, method, 0.5) if method else nullcontext(DenseSession()) as session, Largest() as seen:
        lm.begin(session, {})
        lm.generate_until([request])
    wide = LENGTH * max(SMALL["intermediate_size"], SMALL["hidden_size"])
    assert wide <= seen.most < LENGTH * VOCAB  # [T, F] of a layer is the largest, and [T, V] never is there


@pytest.mark.parametrize("family", ["llama", "gemma3"])  # sliding layers count in full
def test_bytes_of_keys_and_values_are_those_of_the_configuration(family):
    model = tiny(family).float()
    heads = 2 if family == "llama" else model.config.num_key_value_heads
    per_head = getattr(model.config, "head_dim", None) or SMALL["hidden_size"] // SMALL["num_attention_heads"]
    assert Forwards(model, output_head(model)).bytes_of_a_token() == 2 * 3 * heads * per_head * 4


def test_prompts_hold_every_row_up_to_its_last_new_token():
    prompts = [Prompt(i, "", "", tokens, False) for i, tokens in enumerate((30, 20, 5))]
    assert Prompts(prompts, 100, 8, [], {}, False).cached == 3 * 38


def test_candidates_hold_copies_of_their_contexts():
    """The most that caches of one unit hold together, watched while it runs."""
    model = tiny("llama")
    requests = [Request(random_tokens(n, seed=n), random_tokens(4, seed=s)) for n in (30, 20) for s in range(3)]
    held, stock = [], Forwards.__call__

    class Watched(Forwards):
        def __call__(self, tokens, attention, positions, cache):
            hidden = stock(self, tokens, attention, positions, cache)
            held.append(len(tokens) * cache.get_seq_length())
            return hidden

    head = output_head(model)
    with open_session(model, "griffin", 0.5) as session:
        scoring = scorer(model, head, session, 8, share_prefix=False)
        scoring.forwards.__class__ = Watched
        (unit,) = scoring.units(requests)
        scoring.run(unit)
    # Contexts without their last token; then six rows with it and the answer but its last token.
    assert held == [2 * 29, 6 * (29 + 4)]
    assert unit.cached == 2 * 30 + 6 * 34
    assert sum(held) <= unit.cached <= 1.1 * sum(held)
