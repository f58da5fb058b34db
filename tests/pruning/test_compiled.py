"""Models under `torch.compile`: compiled once, pruned where they are to be, and dense again after."""

import pytest
import torch
from torch import _dynamo as dynamo
from torch._dynamo.testing import CompileCounter
from transformers import StaticCache

from dart_eval.kernels.cpu import build
from tests.helpers.models import biased, odd_llama, random_tokens, shallow
from tests.helpers.sessions import RESTLESS, open_session

pytestmark = pytest.mark.slow


@torch.no_grad()
@pytest.mark.parametrize(("method", "params"), [("magnitude", {}), ("griffin", {}), ("dart", RESTLESS)])
def test_a_compiled_model_stays_compiled(method, params):
    """Shapes and addresses do not change with the masks: what is compiled for the first tokens serves the others."""
    dynamo.reset()
    graphs = CompileCounter()
    model = shallow(biased("llama"), 2)
    compiled = torch.compile(model, backend=graphs)
    found, counts = [], []
    for forward in (model, compiled):
        with open_session(model, method, 0.5, execution="copied", **params) as session:
            cache = StaticCache(config=model.config, max_cache_len=64)
            logits = [model(torch.tensor([random_tokens(20)]), use_cache=True, past_key_values=cache).logits[:, -1]]
            for _ in range(16):
                token = logits[-1].argmax(-1, keepdim=True)
                logits.append(forward(token, use_cache=True, past_key_values=cache).logits[:, -1])
                counts.append(graphs.frame_count)
            assert params != RESTLESS or session.remasks[0] > 3
        found.append(torch.stack(logits))
    assert torch.allclose(*found, rtol=1e-10)
    assert 0 < counts[16] == counts[-1] < 4


@torch.no_grad()
@pytest.mark.skipif(build.why_no_kernel() is not None, reason=f"{build.why_no_kernel()}")
@pytest.mark.parametrize("method", ["grinqh", "griffin"])
def test_a_compiled_model_hands_kernels_tensors_that_live(method):
    """A kernel is handed a pointer; the compiler would free the tensor, and another takes its place."""
    dynamo.reset()
    model, found = odd_llama(), []
    ids = torch.tensor([random_tokens(20)])
    for forward in (model, torch.compile(model, backend="eager")):
        with open_session(model, method, 0.5, execution="auto") as session:
            cache = StaticCache(config=model.config, max_cache_len=64)
            logits = [model(ids, use_cache=True, past_key_values=cache).logits[:, -1]]
            for token in range(5, 11):
                logits.append(forward(torch.tensor([[token]]), use_cache=True, past_key_values=cache).logits[:, -1])
            assert session.execution == "copied"
        found.append(torch.stack(logits))
    assert torch.equal(*found)


@torch.no_grad()
@pytest.mark.parametrize("execution", ["masked", "copied"])
def test_a_model_compiled_before_is_pruned_and_dense_again_after(execution):
    """By default compiled code does not notice hooks: it would run on without them."""
    dynamo.reset()
    dynamo.config.skip_nnmodule_hook_guards = True  # the default, as in a new process
    model = shallow(biased("llama"))
    compiled = torch.compile(model, backend="eager")
    ids = torch.tensor([random_tokens(20)])

    def steps(forward):
        cache = StaticCache(config=model.config, max_cache_len=64)
        logits = [model(ids, use_cache=True, past_key_values=cache).logits[:, -1]]
        for token in range(5, 11):
            logits.append(forward(torch.tensor([[token]]), use_cache=True, past_key_values=cache).logits[:, -1])
        return torch.stack(logits)

    dense = steps(compiled)
    with open_session(model, "griffin", 0.5, execution=execution):
        pruned = steps(compiled)
    with open_session(model, "griffin", 0.5, execution=execution):
        assert torch.allclose(pruned, steps(model), rtol=1e-8)
    assert not torch.allclose(pruned, dense)
    assert torch.allclose(dense, steps(compiled), rtol=1e-8)
    dynamo.reset()
