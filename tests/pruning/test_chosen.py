"""Products with the kept neurons alone: of every number of them, none too; as sums of rows."""

import pytest
import torch
from transformers import LlamaConfig

from dart_eval.kernels import chosen
from dart_eval.layers.find import find_ffns
from tests.helpers.matrices import in_turn
from tests.helpers.models import biased, made, random_tokens
from tests.helpers.sessions import RESTLESS, VARIED, bits, decoded, open_session, same


@pytest.mark.parametrize(("family", "method", "params"), in_turn(
    ["llama", "gpt2", "phi3", "opt"],
    [("dart-choice", {**RESTLESS, "remask.every": 4}), *VARIED[:2], ("magnitude", {})],
))  # fmt: skip
def test_layers_that_keep_no_neuron(family, method, params):
    """Of 120 neurons one stays: at least two layers have none."""
    found = []
    for execution in ("masked", "copied"):
        model = biased(family)
        before = bits(model)
        with open_session(model, method, 0.99, execution=execution, **params) as session:
            found.append(decoded(model, session, [random_tokens(20, 3)], steps=9)[0])
            assert session.copies is None or 0 in [kept.count for kept in session.copies]
        assert same(model, before)
    assert torch.allclose(*found, rtol=1e-8, atol=1e-8)


def test_a_table_that_empties_a_layer(tmp_path):
    table = tmp_path / "table.json"
    table.write_text('{"keep": [0.7, 0.0, 0.5]}')
    found = []
    for execution in ("masked", "copied"):
        model = biased("llama")
        params = {"allocation": "table", "allocation.file": str(table), **RESTLESS}
        with open_session(model, "dart", 0.6, execution=execution, **params) as session:
            found.append(decoded(model, session, [random_tokens(20, 3)], steps=9)[0])
            assert session.copies is None or session.copies[1].count == 0
    assert torch.allclose(*found, rtol=1e-8, atol=1e-8)


def test_sums_of_rows_are_made_by_several_threads(monkeypatch):
    """`embedding_bag` gives a bag to one thread; how many bags there are says the number of neurons alone. Of few rows
    there is one: parts would cost more than they save."""
    bags, original = [], chosen.embedding_bag

    def spy(index, rows, offsets=None, **kwargs):
        bags.append(len(index if offsets is None else offsets))
        return original(index, rows, offsets, **kwargs)

    monkeypatch.setattr(chosen, "embedding_bag", spy)
    rows = torch.randn(6000, 8)
    for count in (10, 1024, 1025, 2048, 6000):
        weights = torch.randn(2, count)
        sums = chosen.weighted_rows(rows, torch.arange(count).expand(2, count), weights)
        assert torch.allclose(sums, weights @ rows[:count], atol=1e-4)
    assert bags == [2 * parts for parts in (1, 1, 5, 8, 16)]


def test_a_new_mask_copies_the_rows_of_down_that_changed(monkeypatch):
    """Of as many neurons: what stays is not copied again, and the rows stay where they are in memory."""
    ffn = find_ffns(biased("llama"))[0]
    kept = chosen.ChosenRows(ffn)
    masks = torch.arange(40) < 12, (torch.arange(40) >= 3) & (torch.arange(40) < 15)
    kept.select(masks[0])
    rows, read, select = kept.rows, [], torch.Tensor.index_select
    monkeypatch.setattr(torch.Tensor, "index_select", lambda x, dim, i: read.append(len(i)) or select(x, dim, i))
    assert kept.select(masks[1]) == 3 and max(read) == 3
    assert kept.rows is rows and torch.equal(rows, ffn.down.weight.t()[kept.neurons])
    assert sorted(kept.neurons.tolist()) == list(range(3, 15))


@pytest.mark.parametrize("seed", [0, 1])
def test_tokens_that_take_and_write_equal_neurons_settle_ties_as_masks_do(seed):
    """In bfloat16 many |h| are equal, and re-masks leave rows in no order of their neurons."""
    config = LlamaConfig(vocab_size=96, hidden_size=104, intermediate_size=301, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = made(lambda: config, scale=3, dtype=torch.bfloat16, seed=seed)
    found = []
    for execution in ("masked", "copied"):
        with open_session(model, "dart-choice", 0.5, execution=execution, **RESTLESS | {"remask.every": 2}) as session:
            found.append(decoded(model, session, [random_tokens(20, 3)], steps=30)[0].float())
            assert session.remasks[0] > 9
    apart = (found[0] - found[1]).norm(dim=-1) / found[0].norm(dim=-1)
    assert apart.max() < 1e-3
