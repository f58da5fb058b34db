"""Copies of a mask's rows: the numbers of masks, the kept rows and no others, the model's own weights untouched."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dart_eval.kernels.mask_rows import RowCopies, Slot
from dart_eval.layers.find import find_ffns
from dart_eval.util.errors import UserError
from tests.helpers.matrices import product
from tests.helpers.models import FAMILIES, biased, random_tokens
from tests.helpers.sessions import REMASKED, RESTLESS, Interrupt, bits, decoded, fed, go_on, open_session, same

STATIC = [("magnitude", {}), ("wanda-sp", {})]
EXECUTIONS = (("masked", "masked"), ("auto", "copied"))
METHODS = [*REMASKED, *STATIC, ("dart", {"allocation": "uniform"})]


@pytest.mark.parametrize(("family", "method", "params"), product([*FAMILIES, "phi3"], METHODS, every=3))
def test_copied_equals_masked(family, method, params):
    """Logits, re-masks and what is counted, over two prompts in turn; the weights come back bit for bit."""
    model = biased(family)
    before = bits(model)
    found = {}
    for execution, runs in EXECUTIONS:
        with open_session(model, method, 0.5, execution=execution, **params) as session:
            found[runs] = [decoded(model, session, [random_tokens(20, seed)], steps=12) for seed in (3, 4)]
            assert session.execution == runs
        assert same(model, before)
    for (ours, events, share), (theirs, their_events, their_share) in zip(*found.values(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-8)
        assert [e["token"] for e in events] == [e["token"] for e in their_events]
        assert share == their_share
    if any(name.startswith("remask") for name in params):
        assert found["copied"][0][1]  # masks did change


@pytest.mark.parametrize(("method", "params"), [REMASKED[4], STATIC[0]])
@pytest.mark.slow
def test_one_mask_for_a_batch(method, params):
    """Explicitly shared (or static): the batch runs on copies, and as the same mask by factors does."""
    model = biased("llama")
    prompts = [random_tokens(20, seed) for seed in (3, 4, 5)]
    found = {}
    for execution, runs in EXECUTIONS:
        with open_session(model, method, 0.5, execution=execution, shared_mask=True, **params) as session:
            found[runs] = decoded(model, session, prompts)
            assert session.execution == runs and len(set(session.remasks)) == 1
            for mask, *others in zip(*map(session.masks, range(3)), strict=True):
                assert all(torch.equal(mask, other) for other in others)
    assert torch.allclose(found["masked"][0], found["copied"][0], rtol=1e-8, atol=1e-8)
    with open_session(model, method, 0.5, **params) as session:  # each its own: another result
        own = decoded(model, session, prompts)[0]
        if session.method.keeps_state:
            assert session.execution == "masked"
            assert not torch.allclose(own, found["masked"][0])


def test_auto_takes_what_fits():
    model = biased("llama")
    before = bits(model)
    with open_session(model, "griffin", 0.5) as session:
        decoded(model, session, [random_tokens(20)])
        assert session.execution == "copied"
        assert session.fast.copies is not None and same(model, before)  # between forwards nothing is replaced
        decoded(model, session, [random_tokens(20), random_tokens(20, 1)])  # masks of their own: the copies are gone
        assert session.execution == "masked" and session.fast.copies is None
    with pytest.raises(UserError, match="auto, masked"), open_session(model, "griffin", execution="copy"):
        pass


def test_a_further_turn_and_chunked_prefill():
    """More context on a filled cache: observed, and masked anew."""
    model = biased("qwen2")
    first, second = torch.tensor([random_tokens(18, 1)]), torch.tensor([random_tokens(9, 2)])
    found = {}
    for execution, _ in EXECUTIONS:
        with torch.no_grad(), open_session(model, "dart", 0.5, execution=execution, **RESTLESS) as session:
            _, out = fed(model, model(first, use_cache=True), (5, 6, 7, 8))
            with session.prompt():
                out = go_on(model, out, second)
            sums = [of_layer.clone() for of_layer in session.rows.sums]
            last = go_on(model, out, torch.tensor([[9]])).logits
            found[execution] = sums, last
    for ours, theirs in zip(*(f[0] for f in found.values()), strict=True):
        assert torch.allclose(ours, theirs)
    assert torch.allclose(*(f[1] for f in found.values()), rtol=1e-8, atol=1e-8)


# -- the kept rows, and the model's own -------------------------------------------------------------------------


@pytest.mark.slow
@settings(deadline=None, max_examples=10)
@given(st.sampled_from(["llama", "gpt2", "phi3", "opt"]), st.integers(0, 10**6), st.integers(1, 6))
def test_random_masks_multiply_their_neurons_and_no_others(family, seed, changes):
    model = biased(family)
    before, ffns = bits(model), find_ffns(model)
    x = torch.randn(2, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    plain = [f.intermediate(x) for f in ffns]
    kept = [RowCopies(f) for f in ffns]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(changes):
        for f, rows in zip(ffns, kept, strict=True):
            mask = torch.rand(f.size, generator=generator) < torch.rand(1, generator=generator)
            mask[seed % f.size] |= family == "gpt2"  # whose Conv1D takes no input of size 0
            old = None if rows.neurons is None else set(rows.neurons.tolist())
            copied, wanted = rows.select(mask), set(mask.nonzero().flatten().tolist())
            assert rows.count == len(wanted) and set(rows.neurons.tolist()) == wanted
            assert copied == len(wanted - old if old is not None and len(old) == len(wanted) else wanted)
            written = f.write(plain[f.layer] * mask)
            rows.begin()
            h = f.intermediate(x)
            assert torch.allclose(h, plain[f.layer][..., rows.neurons])
            assert torch.allclose(f.write(h), written, rtol=1e-5, atol=1e-5)
            rows.end()
    assert same(model, before)


@pytest.mark.filterwarnings("ignore:layers 0 and 2 have one FFN")
def test_layers_that_are_one_module_run_by_masks():
    model = biased("llama")
    model.model.layers[2].mlp = model.model.layers[0].mlp
    with open_session(model, "griffin", 0.5) as session:
        decoded(model, session, [random_tokens(20)], steps=2)
        assert session.execution == "masked"


@pytest.fixture
def gradients():
    """An interrupt may hit torch as it leaves `no_grad`: gradients are on again for the tests that follow."""
    yield
    torch.set_grad_enabled(True)


@pytest.mark.usefixtures("gradients")
@pytest.mark.slow
def test_a_keyboard_interrupt_in_generate():
    model = biased("llama")
    before = bits(model)
    for at in range(100, 3000, 311):
        with pytest.raises(KeyboardInterrupt), open_session(model, "dart", 0.5, **RESTLESS), Interrupt(at, False):
            model.generate(torch.tensor([random_tokens(20)]), max_new_tokens=30, do_sample=False)
        assert same(model, before)


# -- memory --------------------------------------------------------------------------------------------------


def test_the_kept_rows_are_all_that_is_copied():
    model = biased("llama")
    ffn = sum(p.nbytes for name, p in model.named_parameters() if ".mlp." in name and "down_proj.bias" not in name)
    with open_session(model, "griffin", 0.7, execution="auto") as session:
        decoded(model, session, [random_tokens(20)], steps=2)
        copies = session.fast.copies
        copied = sum(slot.part.nbytes for kept in copies for slot in kept.slots) + sum(c.neurons.nbytes for c in copies)
        assert copied == session.memory - session.state_bytes == pytest.approx(0.3 * ffn + 8 * 36)
        addresses = [slot.part.data_ptr() for kept in session.fast.copies for slot in kept.slots]
        decoded(model, session, [random_tokens(20, 1)], steps=2)  # as many neurons: in the same place
        assert [slot.part.data_ptr() for kept in session.fast.copies for slot in kept.slots] == addresses
    assert session.fast.copies is None


# -- where it cannot be done ---------------------------------------------------------------------------------


def test_weights_in_one_memory_keep_neurons_of_their_own():
    """A parameter of two modules, and a view of another's memory: the model's own weights are not written to."""
    model = biased("llama")
    first, last = model.model.layers[0].mlp, model.model.layers[2].mlp
    last.up_proj.weight = first.up_proj.weight
    first.gate_proj.weight = torch.nn.Parameter(first.up_proj.weight.detach()[:])
    found = []
    for execution, runs in EXECUTIONS:
        with open_session(model, "griffin", 0.5, execution=execution) as session:
            found.append(decoded(model, session, [random_tokens(20)])[0])
            assert session.execution == runs
    assert torch.allclose(*found, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("first", [True, False])
def test_rows_that_break_off_while_they_are_copied_are_copied_anew(monkeypatch, first):
    """Memory may run out between gate and up: the next mask must not be written into the model's own weights."""
    model = biased("llama")
    before, (ffn, *_) = bits(model), find_ffns(model)
    masks = [torch.randperm(ffn.size, generator=torch.Generator().manual_seed(i)) < 12 for i in range(3)]
    rows = RowCopies(ffn)
    if not first:
        rows.select(masks[0])
    done, taken = [], Slot.taken

    def broken(slot, neurons):
        done.append(slot)
        if len(done) == 2:  # down's columns are copied, and a row of gate or up is not
            raise torch.OutOfMemoryError
        return taken(slot, neurons)

    monkeypatch.setattr(Slot, "taken", broken)
    with pytest.raises(torch.OutOfMemoryError):
        rows.select(masks[1])
    monkeypatch.undo()
    rows.select(masks[2])
    up = next(s for s in rows.slots if s.module is ffn.up)
    assert torch.equal(up.part, ffn.up.weight[masks[2]]) and torch.equal(rows.neurons, masks[2].nonzero().flatten())
    assert same(model, before)
