"""Execution `permuted`: the same numbers as masks, every neuron once, every bit back, nothing allocated."""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from dart_eval.layers.find import find_ffns
from dart_eval.pruning.session.inplace import Work, involutions, transpose
from dart_eval.pruning.session.permuted import PermutedFFNs
from dart_eval.util.errors import UserError
from tests.helpers.matrices import product
from tests.helpers.models import FAMILIES, SMALL, biased, random_tokens
from tests.helpers.sessions import (
    CHOOSING,
    REMASKED,
    RESTLESS,
    Interrupt,
    bits,
    cache_of,
    decoded,
    interrupted_anywhere,
    makes_new_masks,
    open_session,
    same,
)

STATIC = [("magnitude", {}), ("wanda-sp", {})]
TWO_STAGES = ("dart-choice", {**RESTLESS, "choice.write_share": 1.0})
IN_PLACE = [case for case in CHOOSING[::2] if case[0] != "dart-plus"]  # its choice has no kernels yet
METHODS = [*REMASKED, *IN_PLACE, *STATIC, TWO_STAGES, ("dart", {"allocation": "uniform"})]


@pytest.mark.parametrize(("family", "method", "params"), product([*FAMILIES, "phi3"], METHODS, every=2))
def test_permuted_equals_masked(family, method, params):
    """Logits, re-masks and what is counted, over two prompts in turn; the weights come back bit for bit."""
    model = biased(family)
    before = bits(model)
    found = {}
    for execution in ("masked", "permuted"):
        with open_session(model, method, 0.5, execution=execution, **params) as session:
            found[execution] = [decoded(model, session, [random_tokens(20, seed)], steps=12) for seed in (3, 4)]
            assert session.execution == execution
        assert same(model, before)
    for (ours, events, share), (theirs, their_events, their_share) in zip(*found.values(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-8)
        assert [e["token"] for e in events] == [e["token"] for e in their_events]
        assert share == their_share
    if makes_new_masks(params):
        assert found["permuted"][0][1]  # masks did change


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_generate_says_the_same(family):
    model = biased(family)
    ids = torch.tensor([random_tokens(20, seed=3)])
    texts = []
    for execution in ("masked", "permuted"):
        with open_session(model, "dart", 0.5, execution=execution, **RESTLESS):
            texts.append(model.generate(ids, max_new_tokens=30, do_sample=False))
    dense = model.generate(ids, max_new_tokens=30, do_sample=False)
    assert torch.equal(*texts)
    assert not torch.equal(texts[0], dense) or family != "llama"  # the others happen to repeat one token, pruned or not


@pytest.mark.parametrize(("method", "params"), [*REMASKED[1::2], *CHOOSING[4::3], STATIC[0]])
def test_one_mask_for_a_batch(method, params):
    """Explicitly shared (or static): the batch runs permuted, and as the same mask by factors does."""
    model = biased("llama")
    prompts = [random_tokens(20, seed) for seed in (3, 4, 5)]
    found = {}
    for execution in ("masked", "permuted"):
        with open_session(model, method, 0.5, execution=execution, shared_mask=True, **params) as session:
            found[execution] = decoded(model, session, prompts)
            if session.state.masks is not None:
                for mask in session.state.masks:
                    assert all(torch.equal(mask[0], row) for row in mask)
                remasks = session.remasks
                assert len(set(remasks)) == 1
    assert torch.allclose(found["masked"][0], found["permuted"][0], rtol=1e-8, atol=1e-8)
    with open_session(model, method, 0.5, **params) as session:  # each its own: another result
        own = decoded(model, session, prompts)[0]
        if not session.method.mask.fixed:
            assert session.execution == "masked"
            assert not torch.allclose(own, found["masked"][0])


def test_one_sequence_shared_is_that_sequence():
    model = biased("llama")
    found = []
    for shared in (False, True):
        with open_session(model, "dart", 0.5, execution="masked", shared_mask=shared, **RESTLESS) as session:
            found.append(decoded(model, session, [random_tokens(20, seed=3)])[0])
    assert torch.allclose(*found, rtol=1e-10)


def test_auto_takes_what_fits():
    model = biased("llama")
    before = bits(model)
    with open_session(model, "griffin", 0.5) as session:
        decoded(model, session, [random_tokens(20)])
        assert session.execution == "permuted"
        assert not torch.equal(
            model.model.layers[0].mlp.gate_proj.weight, before["model.layers.0.mlp.gate_proj.weight"]
        )
        decoded(model, session, [random_tokens(20), random_tokens(20, 1)])  # masks of their own: the old order is back
        assert session.execution == "masked"
        assert same(model, before)
    with (
        pytest.raises(UserError, match="one mask at a time, and this batch has 2"),
        open_session(model, "griffin", 0.5, execution="permuted") as session,
    ):
        decoded(model, session, [random_tokens(20), random_tokens(20, 1)])
    with pytest.raises(UserError, match="did you mean permuted"), open_session(model, "griffin", execution="permute"):
        pass


def test_a_further_turn_and_chunked_prefill():
    """More context on a filled cache: observed in whatever order the neurons are, and masked anew."""
    model = biased("qwen2")
    first, second = torch.tensor([random_tokens(18, 1)]), torch.tensor([random_tokens(9, 2)])
    found = {}
    for execution in ("masked", "permuted"):
        with torch.no_grad(), open_session(model, "dart", 0.5, execution=execution, **RESTLESS) as session:
            out = model(first, use_cache=True)
            for token in (5, 6, 7, 8):
                out = model(torch.tensor([[token]]), use_cache=True, past_key_values=cache_of(out))
            with session.prompt():
                out = model(second, use_cache=True, past_key_values=cache_of(out))
            sums = [e.clone() for e in session.state.sums["score"].layers]
            last = model(torch.tensor([[9]]), use_cache=True, past_key_values=cache_of(out)).logits
            found[execution] = sums, last
    for ours, theirs in zip(*(f[0] for f in found.values()), strict=True):
        assert torch.allclose(ours, theirs)
    assert torch.allclose(*(f[1] for f in found.values()), rtol=1e-8, atol=1e-8)


# -- every neuron once, every bit back -----------------------------------------------------------------------


@settings(deadline=None)
@given(st.permutations(range(17)))
def test_two_rounds_of_swaps_sort_any_order(order):
    order = list(order)
    for a, b in involutions(order):
        assert len({*a, *b}) == 2 * len(a)  # disjoint pairs
        for i, j in zip(a, b, strict=True):
            order[i], order[j] = order[j], order[i]
    assert order == list(range(17))


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 40))
def test_a_matrix_is_turned_in_its_own_memory(rows, columns, interrupted):
    matrix = torch.arange(rows * columns).view(rows, columns)
    memory, turned = matrix.clone().view(-1), []
    work = Work(transpose(memory, rows, columns), lambda: turned.append(True))
    if interrupted < len(work.steps):  # an interrupt right after a write, before it is noted
        for step in work.steps[:interrupted]:
            step.write(step.read())
        values = work.steps[interrupted].read()
        work.steps[interrupted].write(values)
        work.at = (interrupted, values)
    work.finish()
    assert torch.equal(memory.view(columns, rows), matrix.t()) and turned
    Work(transpose(memory, columns, rows), lambda: None).finish()
    assert torch.equal(memory.view(rows, columns), matrix)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(["llama", "gpt2", "phi3", "opt"]), st.integers(0, 10**6), st.integers(1, 6))
def test_random_masks_never_lose_or_double_a_neuron(family, seed, changes):
    model = biased(family)
    before, ffns = bits(model), find_ffns(model)
    x = torch.randn(2, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    plain = [f.intermediate(x) for f in ffns]
    written = [f.write(h) for f, h in zip(ffns, plain, strict=True)]
    permuted = PermutedFFNs(ffns, model)
    permuted.begin()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(changes):
        for f in ffns:
            mask = torch.rand(f.size, generator=generator) < torch.rand(1, generator=generator)
            old = set(f.order[: permuted.kept[f.layer]].tolist()) if permuted.kept[f.layer] < f.size else None
            moved = permuted.select(f.layer, mask)
            count = int(mask.sum())
            assert sorted(f.order.tolist()) == list(range(f.size))
            assert set(f.order[:count].tolist()) == set(mask.nonzero().flatten().tolist())
            if old is not None and len(old) == count:
                assert moved == len(set(f.order[:count].tolist()) - old)  # only what changed
            h = f.intermediate(x)
            assert torch.allclose(f.by_neuron(h), plain[f.layer])
            assert torch.allclose(f.by_row(plain[f.layer]), h)
            assert torch.allclose(f.write(h), written[f.layer], rtol=1e-5, atol=1e-5)
    permuted.restore()
    assert same(model, before)
    assert all(f.order is None for f in ffns)


def test_restored_after_an_exception():
    model = biased("llama")
    before = bits(model)
    with open_session(model, "dart", 0.5, **RESTLESS) as session:
        decoded(model, session, [random_tokens(20)], steps=5)
        trap = model.model.layers[1].self_attn.o_proj.register_forward_hook(_raise)
        with pytest.raises(RuntimeError, match="boom"):
            decoded(model, session, [random_tokens(20)])
        assert not same(model, before)
    assert same(model, before)
    trap.remove()
    with torch.no_grad():
        ids = torch.tensor([random_tokens(20)])
        reference = biased("llama")
        assert torch.equal(model(ids).logits, reference(ids).logits)


def _raise(*_):
    raise RuntimeError("boom")


@pytest.fixture
def gradients():
    """An interrupt may hit torch as it leaves `no_grad`: gradients are on again for the tests that follow."""
    yield
    torch.set_grad_enabled(True)


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize("after", [False, True])
def test_restored_after_an_interrupt_anywhere_in_a_swap(after):
    """At every operation of a swap, before and after it has run; also in the middle of putting back."""
    model = biased("llama")
    before, ffns = bits(model), find_ffns(model)[:1]
    masks = [torch.rand(40, generator=torch.Generator().manual_seed(s)) < 0.4 for s in (1, 2)]

    def begin():
        permuted = PermutedFFNs(ffns, model)
        permuted.begin()
        permuted.select(0, masks[0])
        return permuted

    def work(permuted):
        permuted.select(0, masks[1])
        permuted.restore()

    assert interrupted_anywhere(begin, work, lambda at: after, model, before) > 30


def test_a_keyboard_interrupt_in_generate():
    model = biased("llama")
    before = bits(model)
    for at in range(100, 3000, 211):
        with (
            pytest.raises(KeyboardInterrupt),
            open_session(model, "dart-choice", 0.5, **RESTLESS),
            Interrupt(at, False),
        ):
            model.generate(torch.tensor([random_tokens(20)]), max_new_tokens=30, do_sample=False)
        assert same(model, before)


# -- memory --------------------------------------------------------------------------------------------------


class _Largest(TorchDispatchMode):
    """Bytes of the largest new storage that an operation makes."""

    def __init__(self, known):
        super().__init__()
        self.known, self.bytes = known, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return result


@torch.no_grad()
def test_nothing_of_a_weights_size_is_allocated():
    config = LlamaConfig(**{**SMALL, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 2})
    model = AutoModelForCausalLM.from_config(config).eval()
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    addresses = {n: p.data_ptr() for n, p in model.named_parameters()}
    with _Largest(known) as largest:
        with open_session(model, "dart", 0.7, allocation="uniform", **RESTLESS) as session:
            out = model(torch.tensor([random_tokens(6)]), use_cache=True)
            at = {n: (p.data_ptr(), p.shape) for n, p in model.named_parameters()}
            for token in range(5, 20):
                out = model(torch.tensor([[token]]), use_cache=True, past_key_values=cache_of(out))
                assert {n: (p.data_ptr(), p.shape) for n, p in model.named_parameters()} == at
            assert session.remasks[0] > 2
        assert session.execution == "masked"  # nothing is reordered any more
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == addresses
    assert 0 < largest.bytes < 512 * 2048 * 4 / 3


# -- where it cannot be done ---------------------------------------------------------------------------------


class Int8Linear(torch.nn.Module):
    """As quantisation libraries leave a projection: no plain weight."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("weight", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


def test_quantised_weights_fall_back_to_masks_and_say_so():
    model = biased("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj = Int8Linear(layer.mlp.down_proj)
    found = {}
    for execution in ("permuted", "auto", "masked"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with open_session(model, "dart", 0.5, execution=execution, **RESTLESS) as session:
                found[execution] = decoded(model, session, [random_tokens(20)])[0]
                assert session.execution == "masked"
        said = [str(w.message) for w in caught if "quantised" in str(w.message)]
        assert len(said) == (execution != "masked")
    assert torch.equal(found["permuted"], found["masked"])


def test_shared_weights_are_refused_or_masked():
    model = biased("llama")
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(UserError, match=r"layers.0.mlp.up_proj.weight and .*layers.2.mlp.up_proj.weight share memory"):
        open_session(model, "griffin", 0.5, execution="permuted").__enter__()
    with pytest.warns(UserWarning, match="share memory"):
        attached = open_session(model, "griffin", 0.5).__enter__()
    decoded(model, attached, [random_tokens(20)])
    assert attached.execution == "masked"
    attached.detach()
    views = biased("llama")  # a view of another's memory, under another name
    mlp = views.model.layers[0].mlp
    mlp.gate_proj.weight = torch.nn.Parameter(mlp.up_proj.weight.detach()[:])
    with pytest.raises(UserError, match="share memory"):
        PermutedFFNs(find_ffns(views), views)
    tied = copy.deepcopy(biased("llama"))  # embeddings and head, which no FFN uses
    tied.lm_head.weight = tied.model.embed_tokens.weight
    PermutedFFNs(find_ffns(tied), tied)


def test_two_at_once_are_refused():
    """An inner one that multiplies by masks would take rows for neurons."""
    model = biased("llama")
    before = bits(model)
    with open_session(model, "griffin", 0.5) as outer:
        decoded(model, outer, [random_tokens(20)], steps=2)
        with pytest.raises(UserError, match="another prune"):
            PermutedFFNs(find_ffns(model), model)
        for execution in ("masked", "auto"):
            with (
                outer.paused(),
                pytest.raises(UserError, match="another prune"),
                open_session(model, "griffin", 0.5, execution=execution),
            ):
                pass
    assert same(model, before)
