"""NaN and infinity never become a result: they are counted, named and refused."""

import pytest
import torch

from dart_eval.errors import UserError
from dart_eval.evaluation.forwards import output_head
from dart_eval.ffn import find_ffns
from tests.conftest import tiny


def test_a_model_whose_ffn_computes_nan_is_refused_with_the_cause(llama):
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"NaN or infinity in float64: 3 of 120 .* FFN of layer 1; .*--dtype bfloat16"):
        find_ffns(llama)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_model_whose_logits_are_nan_or_infinite_is_refused_with_the_cause(llama, value):
    with torch.no_grad():
        llama.lm_head.weight[7] = value
    with pytest.raises(UserError, match=r"NaN or infinity in float64: \d of 3 largest logits of a token; .*--dtype"):
        output_head(llama)


def test_logits_beyond_float16_are_refused_and_not_compared_with_an_infinite_tolerance():
    model = tiny("llama", torch.float16)
    with torch.no_grad():
        model.lm_head.weight.clamp_(-0.1, 0.1).mul_(6e5)
    with pytest.raises(UserError, match="NaN or infinity in float16"):
        output_head(model)


def test_a_model_that_rules_words_out_is_understood(llama):
    llama.lm_head.bias = torch.nn.Parameter(torch.zeros(llama.config.vocab_size, dtype=torch.float64))
    with torch.no_grad():
        llama.lm_head.bias[90:] = -torch.inf
    hidden = torch.ones(1, 32, dtype=torch.float64)
    assert output_head(llama)(hidden)[0].isinf().nonzero().flatten().tolist() == list(range(90, 96))
