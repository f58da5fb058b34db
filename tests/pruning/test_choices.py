"""Choices: exactly as many neurons as are counted, inside the mask, the most important ones; what is read is measured.

What a whole model says under them: tests/derivations/test_choices.py.
"""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dart_eval.layers.families import cache_argument
from dart_eval.layers.find import find_ffns
from dart_eval.layers.shape import shape_of
from dart_eval.pruning.choices.cats import ByGate
from dart_eval.pruning.choices.choice import Choice, Token
from dart_eval.pruning.choices.countdown import ByUp
from dart_eval.pruning.choices.gate_up import GateUp
from dart_eval.pruning.choices.oracle import ByHidden, TopP
from dart_eval.pruning.cost import overhead
from dart_eval.pruning.method import Pruner
from dart_eval.pruning.registry import CHOICES, make
from dart_eval.util.errors import UserError
from tests.helpers.matrices import product
from tests.helpers.models import FAMILIES, biased, random_tokens, tiny
from tests.helpers.sessions import PLAIN, RESTLESS, cache_of, decoded, generate, open_session, prompts_of, state_of

EXACT = [cls for cls in CHOICES if cls.chooses and cls().exact and not cls.ranks]
LOOKS = {ByGate: "gate", ByUp: "up", ByHidden: "h", GateUp: "gate"}


def tokens_of(seed, size, tokens, ties, usual=False):
    """What a layer has computed for two sequences, with many equal numbers where `ties`; and their masks."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        x = torch.randn(*shape, generator=generator)
        return (x * 1.5).round() if ties else x

    gate, up = numbers(2, tokens, size), numbers(2, tokens, size)
    mask = torch.rand(2, 1, size, generator=generator) < 0.7
    usual = numbers(2, 1, size).abs() if usual else None
    return Token(gate * up, gate, up, usual, allowed=mask), mask


def take(choice, token, taken=None, written=None):
    """What it takes of neurons of which all are allowed, if the token does not say which."""
    allowed = torch.ones_like(token.h, dtype=torch.bool)[:, :1] if token.allowed is None else token.allowed
    return choice.choose(dataclasses.replace(token, allowed=allowed, taken=taken, written=written))


def seen(h):
    return Token(h, h, h)


def best(scores, among, count):
    """[F] bool: the `count` largest of those that are there, of equal ones the first."""
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[[j for j in scores.argsort(descending=True, stable=True).tolist() if among[j]][:count]] = True
    return kept


# -- one layer -------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.sampled_from(EXACT), st.integers(0, 10_000), st.integers(1, 20), st.integers(1, 4), st.booleans(),
       st.booleans())  # fmt: skip
def test_each_token_takes_exactly_its_count_inside_the_mask_and_the_most_important_ones(
    cls, seed, size, tokens, ties, usual
):
    choice = cls()
    token, mask = tokens_of(seed, size, tokens, ties, usual and cls is GateUp)
    generator = torch.Generator().manual_seed(seed + 1)
    taken = (mask.sum((1, 2)) * torch.rand(2, generator=generator)).round().long()
    written = (taken * torch.rand(2, generator=generator)).round().long()
    looked = getattr(token, LOOKS[cls]).abs()
    looked = looked * token.context_rms if token.context_rms is not None else looked
    for less in (taken, written):
        kept = take(choice, token, taken, less)
        assert kept.dtype == torch.bool and kept.shape == token.h.shape
        assert kept.sum(-1).tolist() == [[int(n)] * tokens for n in less]
        for row in range(2):
            for t in range(tokens):
                first = best(looked[row, t], mask[row, 0], int(taken[row]))
                assert torch.equal(kept[row, t], best(token.h[row, t].abs(), first, int(less[row])))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cls", [*EXACT, TopP])
def test_a_choice_takes_activations_of_any_dtype_and_sign(cls, dtype):
    h = torch.tensor([[[-4.0, 1.0, -2.0, 0.0, 3.5]]]).to(dtype)
    kept = take(cls(), seen(h), torch.tensor([3]), torch.tensor([3]))
    assert kept.nonzero()[:, 2].tolist() == [0, 2, 4]  # the share 0.9 of a sum of 10.5 needs three, too


def test_what_is_usual_of_up_weighs_the_gate():
    gate = torch.tensor([[[3.0, -2.0, 1.0]]])
    usual = torch.tensor([[[1.0, 2.0, 0.0]]])
    token = Token(gate, gate, gate, usual)
    assert GateUp().importance(token).tolist() == [[[3.0, 4.0, 0.0]]]
    assert GateUp().importance(Token(gate, gate, gate, None)).tolist() == [[[3.0, 2.0, 1.0]]]
    # It keeps the sum of (up x)^2 of the context, none of a plain FFN.
    up, weight = torch.tensor([[[1.0, 2.0, -3.0], [2.0, 0.0, 1.0]]]), torch.tensor([[1.0, 0.5]])
    assert GateUp().observe(gate, up, weight).tolist() == [[3.0, 4.0, 9.5]]
    assert GateUp().observe(gate, None, weight) is None


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 20), st.floats(0.01, 1.0), st.booleans())
def test_top_p_takes_the_smallest_set_with_its_share(seed, size, p, ties):
    token, mask = tokens_of(seed, size, 3, ties)
    kept = take(TopP(p=p), token)
    assert not (kept & ~mask).any()
    for row in range(2):
        for t in range(3):
            mass = token.h[row, t].double().abs() * mask[row, 0]
            mine, count = kept[row, t], int(kept[row, t].sum())
            assert torch.equal(mine, best(mass, mask[row, 0], count))  # the largest, ties to the lower index
            total = float(mass.sum())
            assert float(mass[mine].sum()) >= p * total * (1 - 1e-5)
            if count:  # without its least one it has less
                assert float(mass[mine].sum() - mass[mine].min()) < p * total * (1 + 1e-5)
                assert float(mass[mine].min()) > 0
            assert bool(count) == (total > 0)


def test_top_p_stops_where_its_share_is_met_exactly():
    token = seen(torch.tensor([[[2.0, 4.0, 1.0, 3.0]]]))
    assert take(TopP(p=0.9), token).tolist() == [[[True, True, False, True]]]
    assert take(TopP(p=1.0), token).all()


# -- a whole model ---------------------------------------------------------------------------------------------------


INSIDE = [(name, {}) for name in ("cats", "m-countdown", "oracle-token")] + [
    (mask, {"choice": choice}) for mask in ("random", "griffin", "dart-choice", "oracle-token")
    for choice in ("gate-up", "gate", "up", "hidden") if (mask, choice) != ("oracle-token", "hidden")
]  # fmt: skip


@pytest.mark.parametrize(("family", "method", "params"), product(FAMILIES, INSIDE, every=2))
def test_bytes_read_are_the_label_to_the_neuron(family, method, params):
    allocation = "uniform" if method == "random" else "depth"  # it is made before any prompt
    model = tiny(family)
    sparsity = 0.45 if make(method, params).mask.holds_all else 0.63
    with open_session(model, method, sparsity, execution="masked", **params, allocation=allocation) as session:
        out = model(prompts_of(2, 20), use_cache=True)
        counted = []
        handle = _count_columns(model, counted)
        model(prompts_of(2, 1), use_cache=True, **{cache_argument(model): cache_of(out)})
        handle()
        (step,) = session.steps
        wanted = round((1 - sparsity) * 120) / 120
        assert step.read.tolist() == [wanted, wanted]  # exactly
        state = session.state
        assert torch.equal(step.mask, state.mask_counts.double().sum(1) / 120)
        for layer, columns in enumerate(counted):
            assert all(a <= b for a, b in zip(columns, state.written[:, layer].tolist(), strict=True))
        if family not in PLAIN:  # there none of a's is exactly 0
            assert [sum(c[row] for c in counted) for row in range(2)] == state.written.sum(1).tolist()


def _count_columns(model, found):
    """How many columns of down every sequence's last token multiplies."""

    def hook(_module, args):
        found.append((args[0].reshape(2, -1, args[0].shape[-1])[:, -1] != 0).sum(-1).tolist())

    handles = [f.down.register_forward_pre_hook(hook) for f in find_ffns(model)]
    return lambda: [h.remove() for h in handles]


@pytest.mark.parametrize("execution", ["masked", "auto"])
@pytest.mark.parametrize(("method", "params"), [
    *((m, {}) for m in ("cats", "m-countdown", "oracle-token", "top-p")), ("random", {"choice": "gate-up"}),
    ("dense", {"choice": "gate-up"}), ("magnitude", {"choice": "top-p", "compensation": "mean"}),
])  # fmt: skip
@torch.no_grad()
def test_a_session_that_begins_on_a_filled_cache_chooses_from_its_first_token(llama, method, params, execution):
    """A mask that no context makes needs none; `gate-up` goes by the gate alone where it has seen no context."""
    out, reads = llama(prompts_of(1, 20), use_cache=True), []
    name = cache_argument(llama)
    with open_session(llama, method, 0.5, execution=execution, **params) as session:
        for token in random_tokens(3, seed=2):
            out = llama(torch.tensor([[token]]), use_cache=True, **{name: cache_of(out)})
            reads = [float(step.read[0]) for step in session.steps]
        assert len(reads) == 3 and session.effective_sparsity == pytest.approx(1 - sum(reads) / 3)
        assert reads == [0.5] * 3 if make(method, params).sized and method != "magnitude" else 0 < max(reads) < 1


@pytest.mark.parametrize(
    ("family", "choice"), [("llama", "gate"), ("phi3", "up"), ("opt", "hidden"), ("llama", "gate-up"), ("opt", "up")]
)
def test_inside_a_mask_of_everything_a_choice_is_the_choice_alone(family, choice):
    """GRIFFIN's mask at a ratio that reaches every neuron: the same tokens, the same counts, as without a mask."""
    model, found = biased(family), []
    wide = {"choice.mask_ratio": 3.0} if choice in ("gate-up", "hidden") else {"choice.mask_ratio": 9.0}
    sparsity = 0.4
    for method, params in (("griffin", wide), ("dense", {})):
        with open_session(model, method, sparsity, choice=choice, execution="masked", **params) as session:
            found.append((decoded(model, session, prompts_of(2, 20), steps=8)[0], session.effective_sparsity))
            assert session.mask_sparsity == 0
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_top_p_with_all_of_the_sum_is_dense_and_reads_what_is_not_zero(family):
    model = tiny(family)
    dense = generate(model, prompts_of(2, 12), tokens=5)
    with open_session(model, "top-p", 0.5, execution="masked", **{"choice.p": 1.0}) as session:
        found = generate(model, prompts_of(2, 12), tokens=5)
        assert torch.allclose(torch.stack(found.logits), torch.stack(dense.logits), atol=1e-9)
        reads = torch.stack([step.read for step in session.steps])
        assert bool((reads == 1).all()) == (family != "opt")  # whose activations are half zero


@pytest.mark.parametrize("method", ["top-p", "magnitude", "griffin"])
def test_what_top_p_reads_is_measured_token_by_token(llama, method):
    """Of each sequence on its own, over the tokens of a block that are real; and it is what sparsity is told."""
    with open_session(llama, method, 0.4, execution="masked", choice="top-p", **{"choice.p": 0.6}) as session:
        out = llama(prompts_of(2, 20), use_cache=True)
        counted, reads = [], []
        handle = _count_columns(llama, counted)
        for token in random_tokens(4, seed=3):
            counted.clear()
            out = llama(torch.full((2, 1), token), use_cache=True, **{cache_argument(llama): cache_of(out)})
            reads.append([sum(layer[row] for layer in counted) / 120 for row in range(2)])
        handle()
        assert torch.allclose(torch.stack([s.read for s in session.steps]), torch.tensor(reads, dtype=torch.float64))
        assert len({read for row in reads for read in row}) > 1
        outside = 0.0 if method == "top-p" else 0.4
        assert session.steps[0].mask.tolist() == pytest.approx([1 - outside] * 2)
        pruned = sum(1 - read for row in reads for read in row)
        assert method != "top-p" or session.sparsity == 0  # it follows none
        assert session.effective_sparsity == pytest.approx(pruned / 10)  # the prompts' own tokens ran dense


def test_tokens_that_run_dense_are_measured_as_dense(llama):
    """After an alarm, in a batch of which one sequence has ended: not as what they would have taken."""
    params = {**RESTLESS, "remask.dense_tokens": 2, "choice": "top-p", "choice.p": 0.6}
    with open_session(llama, "dart-code", 0.4, execution="masked", **params) as session:
        decoded(llama, session, prompts_of(2, 20), steps=6)
        reads = [step.read.tolist() for step in session.steps]
    assert [max(read) < 1 for read in reads] == [True] * 3 + [False] * 2 + [True]
    state = state_of("dart-code", llama, batch=2, **params)
    valid, h = torch.ones(2, 4, dtype=torch.bool), torch.randn(2, 4, 40)
    for layer in range(3):
        state.observe(layer, h, valid)
        state.observe_change(layer, torch.randn(2, 4, 32), torch.randn(2, 4, 32), valid)
    state.finish_context(valid)
    state.remasking.dense_left = torch.tensor([2, 0])
    for layer in range(3):
        state.prune(layer, h[:, :1], valid[:, :1], h[:, :1], h[:, :1])
    read = state.measured(valid[:, :1]).read.tolist()
    assert read[0] == 1 and 0 < read[1] < 0.6


def test_a_blocks_measure_is_the_mean_over_its_real_tokens(llama):
    state, one = state_of("top-p", llama, batch=2, **{"choice.p": 0.49}), torch.ones(2, 3, dtype=torch.bool)
    state.skip_context()
    h = torch.zeros(2, 3, 40)
    h[..., 0], h[0, 0], h[1, 2] = 1, 1.0, 1.0  # one neuron has it all, or half of all have 0.49
    for layer in range(3):
        state.prune(layer, h, one, h, h)
    valid = torch.tensor([[True, True, True], [True, True, False]])
    step = state.measured(valid)
    assert step.read.tolist() == pytest.approx([(20 + 1 + 1) / 3 / 40, 1 / 40])
    assert step.mask.tolist() == [1, 1]
    assert state.measured(valid) is None  # of a forward that chose nothing


def test_what_a_choice_costs(llama):
    """Three operations for each neuron of the mask; the observed ones' squares, factors and sums."""
    shape = shape_of(llama, find_ffns(llama))
    for name in ("cats", "m-countdown", "oracle-token", "top-p"):
        cost = overhead(make(name), shape, 100, 0.5)
        assert (cost.prefill, cost.remask, cost.remask_read) == (0, 0, 0.0)
        assert cost.decode_step == 3 * 120
    inside = overhead(make("griffin", {"choice": "up", "choice.mask_ratio": 1.4}), shape, 100, 0.5)
    assert inside.decode_step == pytest.approx(3 * 0.7 * 120)
    assert inside.prefill == overhead(make("griffin"), shape, 100, 0.5).prefill
    assert overhead(make("griffin", {"choice": "gate", "choice.mask_ratio": 9}), shape, 9, 0.5).decode_step == 3 * 120


def test_a_choice_of_ones_own_says_what_it_reads_and_what_matters(llama):
    """As docs/extending.md has it: two matrices whole, and a number for each neuron."""

    class Both(Choice):
        name = "both"
        reads_whole = ("gate", "up")

        def importance(self, token):
            return (token.gate * token.up).abs()

    with open_session(llama, Pruner(choice=Both()), 0.25) as session:
        found = decoded(llama, session, prompts_of(1, 12), steps=4)[0]
        assert session.weights_read == 0.75
    with open_session(llama, "oracle-token", 0.75) as session:  # down alone: a quarter of its columns
        assert torch.allclose(found, decoded(llama, session, prompts_of(1, 12), steps=4)[0])
    with pytest.raises(UserError, match="reads 2 of the FFN's 3 matrices whole"):
        open_session(llama, Pruner(choice=Both()), 0.4).__enter__()


def test_a_threshold_is_not_rounded_to_the_models_dtype():
    """1.0078125 is a bfloat16, and 1.005 is none: it would be rounded up to it."""
    choice = make("m-countdown").choice
    up = torch.tensor([[[1.0078125, 1.0]]], dtype=torch.bfloat16)
    token = Token(h=up, gate=None, up=up, allowed=torch.ones_like(up, dtype=torch.bool), threshold=1.005,
                  taken=torch.tensor([1]), written=torch.tensor([1]))  # fmt: skip
    assert choice.choose(token).tolist() == [[[True, False]]]
