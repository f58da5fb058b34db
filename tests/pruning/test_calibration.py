"""Calibration on a text: how long its segments are, and the mode that the model runs in."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from dart_eval.pruning.calibration import TextCalibration
from dart_eval.pruning.parts.scores import Activation, Wanda
from tests.helpers.models import CONFIGS, random_tokens, tiny
from tests.helpers.sessions import open_session

WORDS = random_tokens(1200, seed=3)


class _Tokenizer:
    """Any text has the same words. bos: begin with one."""

    def __init__(self, bos):
        self.bos_token_id = 1 if bos else None

    def __call__(self, text, **_):
        return {"input_ids": [*([1] if self.bos_token_id else []), *WORDS]}


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
@pytest.mark.parametrize(("positions", "bos", "longest"), [(512, True, 512), (512, False, 512), (256, True, 256)])
def test_segments_are_no_longer_than_the_model_has_positions(family, positions, bos, longest):
    config = CONFIGS[family]()
    config.max_position_embeddings = positions
    model = AutoModelForCausalLM.from_config(config).eval()
    lengths = []
    model.base_model.register_forward_pre_hook(
        lambda _m, _args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    calibration = TextCalibration(model, _Tokenizer(bos))
    assert len(calibration.ffns) == 3
    lengths.clear()  # the trial forward's
    calibration.sums(Wanda().observe)
    assert max(lengths) == longest
    assert sum(lengths) == len(WORDS) + bos * len(lengths)


def test_a_model_with_more_positions_has_512_tokens_of_text_after_bos():
    model = tiny("opt")
    model.config.max_position_embeddings = 4096
    model.model.decoder.embed_positions.weight = torch.nn.Parameter(torch.randn(600, 32).double())
    lengths = []
    model.base_model.register_forward_pre_hook(
        lambda _m, _args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    TextCalibration(model, _Tokenizer(bos=True)).sums(Wanda().observe)
    assert [n for n in lengths if n > 3] == [513, 513, 177]


def test_dropout_takes_no_part_in_a_calibration_and_every_mode_comes_back():
    config = CONFIGS["opt"]()
    config.dropout = 0.5
    model = AutoModelForCausalLM.from_config(config).eval()
    evaluated = TextCalibration(model, _Tokenizer(bos=True)).sums(Wanda().observe)
    model.train()
    model.model.decoder.layers[1].eval()
    before = [m.training for m in model.modules()]
    trained = TextCalibration(model, _Tokenizer(bos=True)).sums(Wanda().observe)
    assert all(torch.equal(a, b) for a, b in zip(evaluated, trained, strict=True))
    assert [m.training for m in model.modules()] == before
    with open_session(model, "wanda-sp", 0.5):
        pass
    assert [m.training for m in model.modules()] == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_sums_are_made_in_fp32_over_every_segments_own_tokens(dtype):
    """Not over the token that each begins with."""
    calibration = TextCalibration(tiny("llama", dtype), _Tokenizer(bos=True))
    seen = []
    handle = calibration.ffns[1].down.register_forward_pre_hook(lambda _m, args: seen.append(args[0][0, 1:].double()))
    sums = calibration.sums(Wanda().observe)[1]
    handle.remove()
    assert sum(map(len, seen)) == len(WORDS) and len(seen) > 2
    assert sums.dtype == torch.float32
    assert torch.allclose(sums.double(), torch.cat(seen).square().sum(0), rtol=1e-5)
    normalised = calibration.sums(Activation(norm="l2").observe)[1]  # of any score that looks at tokens
    votes = torch.cat(seen) / torch.cat(seen).norm(dim=1, keepdim=True)
    assert torch.allclose(normalised.double(), votes.square().sum(0), rtol=1e-4)
