"""`prune()` on every family and method: what is masked, what is restored, what is reported."""

import pytest
import torch

import dart_eval
from dart_eval.layers.families import cache_argument
from dart_eval.layers.find import find_ffns
from dart_eval.pruning.methods.griffin import NeuronMask
from dart_eval.pruning.methods.teal import Teal
from dart_eval.pruning.registry import methods
from dart_eval.pruning.session import prune
from dart_eval.util.errors import UserError
from tests.helpers.matrices import on_families
from tests.helpers.models import FAMILIES, random_tokens, tiny
from tests.helpers.sessions import (
    RESTLESS,
    VARIED,
    bits,
    cache_of,
    fitting,
    generate,
    hooked,
    makes_new_masks,
    open_session,
    prompts_of,
    same,
)

PRUNERS = [name for name, cls in methods().items() if cls.prunes and not cls.looks_ahead]
SIZED = [name for name in PRUNERS if methods()[name].sized]  # what they read follows from the sparsity


@on_families(["method"], FAMILIES, SIZED, every=2)
def test_sparsity_zero_is_dense(model, method):
    ids = prompts_of(2, 20)
    dense = generate(model, ids, tokens=6)
    with open_session(model, method, 0.0) as session:
        pruned = generate(model, ids, tokens=6)
    assert torch.equal(dense.sequences, pruned.sequences)
    assert torch.allclose(torch.stack(dense.logits), torch.stack(pruned.logits))
    assert session.effective_sparsity == 0 and (session.prompts_on_codes or session.weights_read == 1)


@on_families(["method", "sparsity"], FAMILIES, [(m, (0.3, 0.5, 0.7)[i % 3]) for i, m in enumerate(SIZED)], every=2)
def test_the_label_is_met_exactly_and_reported(model, method, sparsity):
    sparsity = fitting(method, model.config.model_type, sparsity)
    with open_session(model, method, sparsity) as session:
        generate(model, prompts_of(2, 20), tokens=5)
        neurons = sum(f.size for f in find_ffns(model))
        exact = 1 - round((1 - sparsity) * neurons) / neurons
        if isinstance(session.method, NeuronMask):
            for row in range(2):
                assert sum(int(m.sum()) for m in session.masks(row)) == round((1 - sparsity) * neurons)
            assert session.mask_sparsity == pytest.approx(exact)
        if session.method.granularity:  # to a column where it counts them; thresholds meet it on their text
            varies = isinstance(session.method, Teal)
            assert abs(session.weights_read - (1 - exact)) < (0.2 if varies else 0.02)
            exact = 1 - session.weights_read
        assert session.weights_read == pytest.approx(1 - exact)
        assert session.effective_sparsity == pytest.approx(exact * 4 / 5)  # the first token comes from the prefill


@on_families(["method"], FAMILIES, PRUNERS, every=2)
def test_leaving_restores_the_model_bit_for_bit(model, method):
    ids = prompts_of(1, 10)
    state = bits(model)
    sparsity = fitting(method, model.config.model_type, 0.7)
    before = model(ids).logits
    with open_session(model, method, sparsity):
        generate(model, ids, tokens=5)
    with pytest.raises(RuntimeError, match="stop here"):  # noqa: PT012, SIM117
        with open_session(model, method, sparsity):
            generate(model, ids, tokens=5)
            raise RuntimeError("stop here")
    assert same(model, state)
    assert torch.equal(model(ids).logits, before)
    assert not hooked(model)


@on_families(["method", "params"], FAMILIES, VARIED, every=3)
def test_a_batch_with_padding_equals_each_sequence_alone(model, method, params):
    lengths = (20, 9, 14)
    prompts = [random_tokens(n, seed=n) for n in lengths]
    width = max(lengths)
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
    attention = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    with open_session(model, method, 0.5, **params) as session:
        together = generate(model, ids, tokens=9, attention_mask=attention)
        events = {(e["sequence"], e["step"]) for e in session.events}
    alone_events = set()
    how = "masked" if method == "grinqh" else "auto"  # kernels round inputs to 15 bits
    for row, prompt in enumerate(prompts):
        with open_session(model, method, 0.5, execution=how, **params) as session:
            alone = generate(model, torch.tensor([prompt]), tokens=9)
            alone_events |= {(row, e["step"]) for e in session.events}
        assert alone.sequences[0, len(prompt) :].tolist() == together.sequences[row, width:].tolist()
        for a, b in zip(alone.logits, together.logits, strict=True):
            assert torch.allclose(a[0], b[row], atol=1e-6)
    assert events == alone_events
    assert bool(events) == makes_new_masks(params)


def test_a_new_prompt_starts_afresh(llama):
    first, second = prompts_of(1, 15, seed=1), prompts_of(1, 18, seed=2)
    with open_session(llama, "dart", 0.6, **RESTLESS):
        alone = generate(llama, second)
    with open_session(llama, "dart", 0.6, **RESTLESS):
        generate(llama, first)
        after = generate(llama, second)
    assert torch.equal(torch.stack(alone.logits), torch.stack(after.logits))


def test_another_cache_serves_where_one_mask_is_for_all(llama):
    name = cache_argument(llama)
    with open_session(llama, "random", 0.5):
        first = llama(prompts_of(1, 20), use_cache=True)
        llama(prompts_of(1, 12, seed=3), use_cache=True)
        llama(prompts_of(1, 1), use_cache=True, **{name: cache_of(first)})


@pytest.mark.parametrize(("method", "masks"), [("wanda-sp", 1), ("random", 1), ("cats", 0), ("dense", 0)])
def test_masks_for_all_sequences_are_all_that_is_kept_of_them(llama, method, masks):
    """A byte a neuron; no factors, which are in the masks, and nothing of a mask of everything."""
    with open_session(llama, method, 0.5) as session:
        generate(llama, prompts_of(2, 20), tokens=3)
        assert session.method.nbytes() == masks * 120
        assert session.state_bytes <= 100  # counts and sums of tokens


def test_the_python_surface():
    assert set(PRUNERS) <= set(dart_eval.methods())
    with pytest.raises(UserError, match="did you mean griffin"), prune(tiny("llama"), "grifin", 0.5):
        pass
    with pytest.raises(UserError, match="outside"), prune(tiny("llama"), "griffin", 1.0):
        pass
    with pytest.raises(UserError, match="tokenizer"), prune(tiny("llama"), "wanda-sp", 0.5):
        pass
