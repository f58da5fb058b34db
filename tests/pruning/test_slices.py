"""Products with the kept neurons alone: of every number of them, none too; as fast in every dtype as torch has them."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from dart_eval.layers.find import find_ffns
from dart_eval.pruning.session import slices
from tests.helpers.models import SMALL, biased, random_tokens
from tests.helpers.sessions import RESTLESS, VARIED, bits, decoded, open_session, same


@pytest.mark.parametrize(
    ("method", "params"), [*VARIED[:2], ("magnitude", {}), ("dart-choice", {**RESTLESS, "remask.every": 4})]
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt"])
def test_layers_that_keep_no_neuron(family, method, params):
    """Of 120 neurons one stays: at least two layers have none."""
    found = []
    for execution in ("masked", "permuted"):
        model = biased(family)
        before = bits(model)
        with open_session(model, method, 0.99, execution=execution, **params) as session:
            found.append(decoded(model, session, [random_tokens(20, 3)], steps=9)[0])
            assert session.permuted is None or 0 in session.permuted.kept
        assert same(model, before)
    assert torch.allclose(*found, rtol=1e-8, atol=1e-8)


def test_a_table_that_empties_a_layer(tmp_path):
    table = tmp_path / "table.json"
    table.write_text('{"keep": [0.7, 0.0, 0.5]}')
    found = []
    for execution in ("masked", "permuted"):
        model = biased("llama")
        params = {"allocation": "table", "allocation.file": str(table), **RESTLESS}
        with open_session(model, "dart", 0.6, execution=execution, **params) as session:
            found.append(decoded(model, session, [random_tokens(20, 3)], steps=9)[0])
            assert session.permuted is None or session.permuted.kept[1] == 0
    assert torch.allclose(*found, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_down_stored_by_neurons_is_down(dtype):
    """For every number of tokens and of neurons, whichever product is taken; digits as the dtype has them."""
    torch.manual_seed(0)
    ffn = find_ffns(AutoModelForCausalLM.from_config(LlamaConfig(**{**SMALL, "intermediate_size": 5000})).to(dtype))[0]
    weight = ffn.down.weight.detach().double()
    down = slices.Down(ffn)
    down.rows = ffn.down.weight.detach().t().contiguous()
    for tokens in (1, 2, 4, 5, 40):
        for count in (0, 1, 255, 257, 1024, 4097, 5000):
            h = torch.randn(1, tokens, count).to(dtype)
            exact = h.double() @ weight[:, :count].t()
            found = down.forward(h)
            assert found.dtype == dtype and found.shape == exact.shape
            bound = (64 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps * max(1.0, float(exact.abs().max()))
            assert (found.double() - exact).abs().max() < bound, (tokens, count)


def test_float16_has_no_product_on_a_turned_weight(monkeypatch):
    """On a CPU torch takes 50 to 100 times as long for it, whatever the number of tokens."""
    model = biased("llama").to(torch.float16)
    layouts = []
    product = torch.nn.functional.linear

    def spy(x, weight, *rest):
        layouts.append(weight.is_contiguous() or weight.shape[1] == 1)
        return product(x, weight, *rest)

    monkeypatch.setattr("dart_eval.pruning.session.slices.linear", spy)
    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    with open_session(model, "dart", 0.5, execution="permuted", **RESTLESS) as session:
        decoded(model, session, [random_tokens(20)], steps=5)
    assert layouts and all(layouts)


def test_sums_of_rows_are_made_by_several_threads(monkeypatch):
    """`embedding_bag` gives a bag to one thread; how many bags there are says the number of neurons alone. Of few rows
    there is one: parts would cost more than they save."""
    bags, original = [], slices.embedding_bag

    def spy(index, rows, offsets=None, **kwargs):
        bags.append(len(index if offsets is None else offsets))
        return original(index, rows, offsets, **kwargs)

    monkeypatch.setattr(slices, "embedding_bag", spy)
    rows = torch.randn(6000, 8)
    for count in (10, 1024, 1025, 2048, 6000):
        weights = torch.randn(2, count)
        sums = slices.weighted_rows(rows, torch.arange(count).expand(2, count), weights)
        assert torch.allclose(sums, weights @ rows[:count], atol=1e-4)
    assert bags == [2 * parts for parts in (1, 1, 5, 8, 16)]
