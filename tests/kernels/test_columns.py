"""The kernel of graded columns beside its twin in torch, and in a session."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear
from transformers import LlamaForCausalLM

from dart_eval.kernels import fast
from dart_eval.kernels.cpu import build
from dart_eval.kernels.cpu.columns import LEVELS, ColumnsFFN, ColumnsMatrix
from dart_eval.layers.find import find_ffns
from dart_eval.pruning.methods.columns import Levels, Nested
from dart_eval.pruning.registry import make, parse
from dart_eval.pruning.session import prune
from dart_eval.util.bits import Rounding
from tests.helpers.models import odd_llama, random_tokens
from tests.helpers.twins import ACTS, SHAPES, apart, coded, matrices, token

pytestmark = pytest.mark.skipif(build.why_no_kernel() is not None, reason=f"{build.why_no_kernel()}")
PROMPT = torch.tensor([random_tokens(20, seed=4)])


def product(packed, at, x):
    """What columns of these levels give, and the size of the sums, in double precision."""
    weight = sum(packed.decoded(torch.float64, b) * (at == i) for i, b in enumerate(LEVELS) if b)
    return linear(x.double(), weight), (weight.norm(dim=1) * (x.double() * (at > 0)).norm())


def check_choice(matrix, x, gains):
    """As many planes as there are to read, and none that saves less than one that is not read."""
    at, saved = matrix.level.long(), x.float().square() * gains[:, None]
    taken = torch.arange(4)[:, None] < at
    assert int(at.sum()) == min(matrix.job.steps, saved.numel())
    if taken.any() and not taken.all():
        assert saved[taken].min() >= saved[~taken].max() * (1 - 1e-6)
    return at


@settings(max_examples=25, deadline=None)
@given(**SHAPES, share=st.floats(0.02, 0.52), group=st.sampled_from([128, 0]), threads=st.integers(1, 3))
def test_columns_are_chosen_and_multiplied_as_by_their_twin(
    level, width, neurons, seed, kind, act, share, group, threads
):
    packed, x = coded(*matrices(width, neurons, seed, kind), Rounding(8, group)), token(width, seed, kind)
    own = matrices(width, neurons, seed, kind)
    levels = Levels("0-2-4-6-8", group)
    gains = [Nested(levels, weight, None, 16 * share).gains for weight in own]
    made = [ColumnsMatrix(p, g.tolist(), int(16 * share * p.shape[1])) for p, g in zip(packed, gains, strict=True)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = ColumnsFFN(made, act, level)(x)
    finally:
        torch.set_num_threads(before)
    (gate, by_gate), (up, by_up) = (
        product(p, check_choice(m, x[0], g), x[0]) for p, m, g in zip(packed[:2], made[:2], gains[:2], strict=True)
    )
    h = ACTS[act](gate) * up
    out, beside = product(packed[2], made[2].level.long(), h)
    assert int(made[2].level.sum()) == min(made[2].job.steps, 4 * neurons)
    assert apart(found[0], out, beside.norm() + (by_gate * by_up).norm() * packed[2].values.double().norm()) < 1e-3


def test_every_bit_of_every_code_counts(level):
    """Single inputs, with all codes there are, each level alone."""
    width = 140
    for rows, planes in itertools.product((1, 64, 127, 129, 385), range(1, 5)):
        codes = (torch.arange(rows * width) * 7 % 256 - 128).to(torch.int8).view(rows, width)
        packed = coded(*matrices(width, rows), Rounding(8, 128))
        packed[0].codes.copy_(codes)
        gains = [[1.0] * n + [0.0] * (4 - n) for n in (planes, 4, 4)]
        bits = 2 * planes, 8 * width, 8 * rows
        made = [ColumnsMatrix(p, g, b) for p, g, b in zip(packed, gains, bits, strict=True)]
        for place in (0, 1, 31, 63, 64, 127, 128, width - 1):
            x = torch.zeros(1, width)
            x[0, place] = 1.0
            found = ColumnsFFN(made, "relu", level)(x)
            gate = packed[0].decoded(torch.float32, 2 * planes)[:, place]
            h = gate.double().relu() * packed[1].values.double()[:, place]
            assert made[0].level[place] == planes and made[0].level.sum() == planes
            assert apart(found[0], packed[2].values.double() @ h, 1e-3) < 1e-3


def test_what_is_no_number_gives_none(level):
    packed = coded(*matrices(150, 90), Rounding(8, 128))
    made = [ColumnsMatrix(p, [1.0] * 4, 4 * p.shape[1]) for p in packed]
    for bad in (torch.nan, torch.inf):
        x = token(150)
        x[0, 77] = bad
        assert not ColumnsFFN(made, "silu", level)(x).isfinite().any()


# -- in a session ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return odd_llama()


def written(model, sparsity, execution="auto", batch=1):
    with prune(model, "grinqh", sparsity, execution=execution) as run:
        made = model.generate(
            PROMPT.repeat(batch, 1), max_new_tokens=10, do_sample=False, output_logits=True,
            return_dict_in_generate=True, min_length=30,
        )  # fmt: skip
        return torch.cat(made.logits).float(), made.sequences, run.weights_read, run.execution


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9])
def test_the_kernel_writes_what_masks_write(model, sparsity):
    before = {name: p.clone() for name, p in model.named_parameters()}
    logits, tokens, read, ran = written(model, sparsity)
    wanted, expected, of_masks, _ = written(model, sparsity, "masked")
    assert ran == "copied" and read == pytest.approx(of_masks, abs=1e-12)
    assert torch.equal(tokens, expected) and (logits - wanted).norm() < 4e-2 * wanted.norm()  # near-ties
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all("forward" not in f.block.__dict__ for f in find_ffns(model))


def test_what_a_token_reads_is_the_label(model):
    with prune(model, "grinqh", 0.7) as run:
        model.generate(PROMPT, max_new_tokens=3, do_sample=False)
        read = sum(sum(rows.rows_read) * 2 * rows.ffn.width for rows in run.fast.copies)
    everything = sum(2 * p.weight.numel() for f in run.ffns for p in f.projections)
    # Rows are filled up to whole groups of 128 in memory: of 301 and 130 to 384 and 256.
    assert read / everything == pytest.approx(0.3 * (2 * 384 / 301 + 256 / 130) / 3, rel=0.05)


def test_what_settings_have_a_kernel(model):
    for spec, reason in (
        ("grinqh:entries.levels=0-2-3-4-5-6-8", "8 bits"), ("decdec", "8 bits"), ("grinqh:entries.group=32", "128"),
        ("grinqh", None), ("grinqh:entries.group=0", None),
    ):  # fmt: skip
        found = fast.why_no_kernel(make(*parse(spec)), find_ffns(model))
        assert found is None if reason is None else reason in found


def doubled(ffn):
    ffn.block.forward = lambda x: 2 * ffn.down(ffn.intermediate(x))


@pytest.mark.parametrize(("change", "reason"), [
    (lambda f: f.down.to("meta"), "on a CPU"),
    (lambda f: setattr(f, "act", torch.nn.Tanh()), "Tanh"),
    (lambda f: setattr(f.up, "bias", torch.nn.Parameter(torch.ones(301))), "biases"),
    (doubled, "LlamaMLP"),
])  # fmt: skip
def test_what_the_kernel_cannot_run_has_a_reason(model, change, reason):
    ffn = find_ffns(LlamaForCausalLM(model.config).bfloat16().eval())[1]
    assert fast.why_not_whole(ffn) is None
    change(ffn)
    assert reason in fast.why_not_whole(ffn)
    assert reason in fast.why_no_kernel(make("grinqh"), [ffn]) or ffn.down.weight.is_meta


def test_activations_are_known_by_their_values(model):
    for act, twin in zip(fast.ACTS, fast.TWINS, strict=True):
        assert fast.act_of(SimpleNamespace(act=twin)) == act
        assert fast.act_of(SimpleNamespace(act=lambda x, twin=twin: twin(x) * 1.001)) is None
    assert fast.act_of(find_ffns(model)[0]) == "silu"
