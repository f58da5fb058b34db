"""Choices: exactly as many neurons as are counted, the most important ones; what is read is measured.

What a whole model says under them: tests/derivations/test_choices.py.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dart_eval.layers.find import find_ffns
from dart_eval.layers.shape import shape_of
from dart_eval.pruning.cost import overhead
from dart_eval.pruning.counts import chosen_counts
from dart_eval.pruning.methods.cats import Cats, MCountdown, OracleToken, TokenChoice
from dart_eval.pruning.registry import make
from dart_eval.util.errors import UserError
from tests.helpers.models import random_tokens, tiny
from tests.helpers.sessions import RandomCalibration, decoded, generate, go_on, open_session, prompts_of, rows_of

# -- one layer -------------------------------------------------------------------------------------------------------


def test_a_choice_takes_activations_of_any_dtype_and_sign():
    rows = SimpleNamespace(counts=torch.tensor([[[3, 3, 3]]]))
    for cls, dtype in itertools.product(
        (Cats, MCountdown, OracleToken), (torch.float16, torch.bfloat16, torch.float64)
    ):
        h = torch.tensor([[[-4.0, 1.0, -2.0, 0.0, 3.5]]]).to(dtype)
        taken = cls().choose(SimpleNamespace(layer=0), h, cls().importance(h, h, h), rows)
        assert taken.nonzero()[:, 2].tolist() == [0, 2, 4]


# -- a whole model ---------------------------------------------------------------------------------------------------


METHODS = ("cats", "m-countdown", "oracle-token")


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_session_that_begins_on_a_filled_cache_chooses_from_its_first_token(llama, method):
    out = llama(prompts_of(1, 20), use_cache=True)
    with open_session(llama, method, 0.5) as session:
        for token in random_tokens(3, seed=2):
            out = go_on(llama, out, torch.tensor([[token]]))
        assert [float(step.read[0]) for step in session.steps] == [0.5] * 3 and session.effective_sparsity == 0.5


CALIBRATED = {"choice.threshold": "calibrated"}


def test_what_varies_is_measured_token_by_token(llama):
    """Of each sequence on its own; and it is what sparsity is told."""
    with open_session(llama, "cats", 0.4, execution="masked", **CALIBRATED) as session:
        out = llama(prompts_of(2, 20), use_cache=True)
        counted, reads = [], []
        for ffn in find_ffns(llama):  # which columns of down the tokens multiply
            ffn.down.register_forward_pre_hook(lambda _m, args: counted.append(args[0].flatten(0, -2) != 0))
        for token in random_tokens(4, seed=3):
            counted.clear()
            out = go_on(llama, out, torch.full((2, 1), token))
            reads.append([(120 + 2 * sum(int(layer[row].sum()) for layer in counted)) / 360 for row in range(2)])
        assert torch.allclose(torch.stack([s.read for s in session.steps]), torch.tensor(reads, dtype=torch.float64))
        assert len({read for row in reads for read in row}) > 1
        assert session.steps[0].mask.tolist() == [1, 1]
        pruned = sum(1 - read for row in reads for read in row)
        assert session.effective_sparsity == pytest.approx(pruned / 10)  # the prompts' own tokens ran dense


def test_a_blocks_measure_is_the_mean_over_its_real_tokens(llama):
    method, rows = rows_of("cats", llama, batch=2, calibration=RandomCalibration(llama), **CALIBRATED)
    method.thresholds = [0.5] * 3
    gate = torch.zeros(2, 3, 40)
    gate[..., 0], gate[0, 0], gate[1, 2] = 1, 1.0, 1.0  # one neuron is above it, or all are
    for ffn in method.ffns:
        method.choose(ffn, gate, gate, rows)
    valid = torch.tensor([[True, True, True], [True, True, False]])
    assert method.read(rows, valid).tolist() == pytest.approx([(40 + 2 * (40 + 1 + 1) / 3) / 120, (40 + 2) / 120])
    assert method.read(rows, valid).tolist() == [0.5, 0.5]  # of a forward that chose nothing


def test_what_a_choice_costs(llama):
    """Three operations for each neuron."""
    shape = shape_of(llama, find_ffns(llama))
    for name in METHODS:
        cost = overhead(make(name), shape, 100, 0.5)
        assert (cost.prefill, cost.remask, cost.remask_read) == (0, 0, 0.0)
        assert cost.decode_step == 3 * 120


def test_a_choice_of_ones_own_says_what_it_reads_and_what_matters(llama):
    """Two matrices whole, and a number for each neuron."""

    class Both(TokenChoice):
        whole = 2

        def importance(self, h, gate, up):
            return (gate * up).abs()

    with open_session(llama, Both(), 0.25) as session:
        found = decoded(llama, session, prompts_of(1, 12), steps=4)[0]
        assert session.weights_read == 0.75
    with open_session(llama, "oracle-token", 0.75) as session:  # down alone: a quarter of its columns
        assert torch.allclose(found, decoded(llama, session, prompts_of(1, 12), steps=4)[0])
    with pytest.raises(UserError, match="whole"):
        open_session(llama, Both(), 0.4).__enter__()


def test_a_threshold_is_not_rounded_to_the_models_dtype(llama):
    """1.0078125 is a bfloat16, and 1.005 is none: it would be rounded up to it."""
    method, rows = rows_of("cats", llama, calibration=RandomCalibration(llama), **CALIBRATED)
    method.thresholds = [1.005] * 3
    gate = torch.tensor([[[1.0078125, 1.0]]], dtype=torch.bfloat16)
    assert method.choose(method.ffns[0], gate, gate, rows).tolist() == [[[True, False]]]


# -- how many neurons a choice takes and writes of each layer ---------------------------------------------------------


@settings(deadline=None, max_examples=120)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=6), st.floats(0, 0.95), st.sampled_from([2, 3]), st.integers(0, 2)
)
def test_what_is_read_is_the_label_exactly(sizes, sparsity, matrices, whole):
    whole = min(whole, matrices - 1)
    kept = round((1 - sparsity) * sum(sizes))
    if whole * sum(sizes) > matrices * kept:
        with pytest.raises(UserError, match="whole"):
            chosen_counts(sizes, sparsity, matrices, whole, "cats")
        return
    taken, written = chosen_counts(sizes, sparsity, matrices, whole, "cats")
    assert whole * sum(sizes) + (matrices - 1 - whole) * sum(taken) + sum(written) == matrices * kept
    assert all(0 <= few <= many <= size for few, many, size in zip(written, taken, sizes, strict=True))
    # What is left is for all matrices alike, but for a row that does not divide.
    assert sum(taken) - sum(written) in (0, 1, 2)


@settings(deadline=None)
@given(
    st.lists(st.integers(100, 1000), min_size=1, max_size=8), st.floats(0, 0.99),
    st.sampled_from([(2, 1), (2, 0), (3, 1), (3, 0), (3, 2)]),
)  # fmt: skip
def test_every_layer_reads_its_share(sizes, share, read_whole):
    """Off by rounding alone. share: of the sparsities that what is read whole leaves."""
    matrices, whole = read_whole
    sparsity = share * (1 - whole / matrices)
    taken, written = chosen_counts(sizes, sparsity, matrices, whole, "cats")
    for size, many, few in zip(sizes, taken, written, strict=True):
        read = whole * size + (matrices - 1 - whole) * many + few
        assert abs(read - matrices * (1 - sparsity) * size) <= 6


@pytest.mark.parametrize(("method", "family", "most"), [("cats", "llama", 0.66), ("m-countdown", "opt", 0.5)])
def test_a_sparsity_that_what_is_read_whole_does_not_leave_is_refused(method, family, most):
    model = tiny(family)
    with pytest.raises(UserError, match=f"up to {most}"), open_session(model, method, 0.7):
        pass
    with open_session(model, method, most) as session:
        generate(model, prompts_of(1, 9), tokens=3)
        assert session.weights_read == round((1 - most) * 120) / 120
