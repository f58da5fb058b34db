"""How many neurons a choice takes and writes of each layer: bytes read are the label to the neuron."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dart_eval.pruning.choices.choice import All
from dart_eval.pruning.choices.oracle import ByHidden
from dart_eval.pruning.counts import Counts, chosen_counts, in_steps
from dart_eval.pruning.methods.depth import depth_aware, normalise_sensitivity
from dart_eval.pruning.registry import CHOICES, make
from dart_eval.util.errors import UserError
from tests.helpers.models import tiny
from tests.helpers.sessions import generate, open_session, prompts_of


def test_counts_of_few_neurons_fit():
    """What is taken and not written must leave rows for what is: of few neurons that is soon none."""
    counts = chosen_counts([0.4375, 0.1, 0.2125], [1, 1, 1], 0.75, 3, 0)
    assert 2 * sum(counts.taken) + sum(counts.written) == 3 * round(0.25 * 3)


@st.composite
def layers_of(draw):
    """Densities of layers of various sizes at some sparsity, as an allocation makes them."""
    sizes = draw(st.lists(st.integers(1, 60), min_size=1, max_size=6))
    sparsity = draw(st.floats(0, 0.95))
    if draw(st.booleans()):
        return [1 - sparsity] * len(sizes), sizes, sparsity
    turns = draw(st.lists(st.floats(0, 1), min_size=len(sizes), max_size=len(sizes)))
    sizes = [sizes[0]] * len(sizes)
    return depth_aware(normalise_sensitivity(turns), sparsity), sizes, sparsity


@settings(deadline=None, max_examples=300)
@given(layers_of(), st.sampled_from([2, 3]), st.integers(0, 2))
def test_what_is_read_is_the_label_exactly(layers, matrices, whole):
    densities, sizes, sparsity = layers
    whole = min(whole, matrices - 1)
    kept = round((1 - sparsity) * sum(sizes))
    if whole * sum(sizes) > matrices * kept:
        with pytest.raises(UserError, match=f"reads {whole} of the FFN's {matrices} matrices whole"):
            chosen_counts(densities, sizes, sparsity, matrices, whole)
        return
    found = chosen_counts(densities, sizes, sparsity, matrices, whole)
    read = whole * sum(found.mask) + (matrices - 1 - whole) * sum(found.taken) + sum(found.written)
    assert read == matrices * kept and found.full_matrices == whole and found.mask == sizes
    for written, taken, size in zip(found.written, found.taken, sizes, strict=True):
        assert 0 <= written <= taken <= size
    # What is left is for all matrices alike, but for a row that does not divide.
    assert sum(found.taken) - sum(found.written) in (0, 1, 2)


@pytest.mark.parametrize(("counts", "most", "steps", "wanted"), [
    ([7, 5], [16, 5], [8, 1], [0, 5]),  # seven are too few for a step, and the other layer is full
    ([7, 5], [16, 9], [8, 1], [0, 9]), ([15, 5], [16, 9], [8, 1], [8, 9]), ([15, 9], [16, 9], [8, 1], [8, 9]),
    ([7, 7, 4], [8, 8, 9], [8, 8, 1], [8, 0, 9]),
])  # fmt: skip
def test_steps_by_hand(counts, most, steps, wanted):
    assert in_steps(counts, most, steps) == wanted


def test_counts_by_hand():
    """Half of the weights of 2 x 100 neurons: 300 rows in all."""
    half, every = ([0.5, 0.5], [100, 100], 0.5), [100, 100]
    assert chosen_counts([1.0, 1.0], every, 0.0, 3, 1) == Counts(every, every, every, 1)
    # 200 of the rows for the gate whole, a quarter of up and down each.
    assert chosen_counts(*half, 3, 1) == Counts(every, [25, 25], [25, 25], 1)
    # Nothing is read whole: what is taken is what a mask alone would keep.
    assert chosen_counts(*half, 3, 0) == Counts(every, [50, 50], [50, 50], 0)


@settings(deadline=None)
@given(
    st.lists(st.floats(0.05, 1.0), min_size=1, max_size=8),
    st.floats(0.05, 0.9),
    st.sampled_from([(2, 1), (2, 0), (3, 1), (3, 0), (3, 2)]),
)
def test_every_layer_reads_its_share(shares, sparsity, read_whole):
    """Where no layer's share is less than what it reads whole. Off by rounding alone."""
    matrices, whole = read_whole
    size, scale = 1000, (1 - sparsity) * len(shares) / sum(shares)
    ratios = [r * scale for r in shares]
    assume(max(ratios) <= 1 and min(ratios) * matrices >= whole)
    found = chosen_counts(ratios, [size] * len(ratios), sparsity, matrices, whole)
    for ratio, mask, taken, written in zip(ratios, found.mask, found.taken, found.written, strict=True):
        read = whole * mask + (matrices - 1 - whole) * taken + written
        assert abs(read - matrices * ratio * size) <= 6


@pytest.mark.parametrize("matrices", [2, 3])
@pytest.mark.parametrize("cls", CHOICES)
def test_a_choice_counts_what_it_says_that_it_reads(cls, matrices):
    found, every = cls().counts([0.5, 0.5], [100, 100], 0.5, matrices), [100, 100]
    if cls in (All, ByHidden):
        assert found == Counts(every, [50, 50], [50, 50], 0)
    elif matrices == 3:
        assert found == Counts(every, [25, 25], [25, 25], 1)
    else:  # up tells h: it is read whole, whatever the choice looks at
        assert found == Counts(every, [0, 0], [0, 0], 1)


@pytest.mark.parametrize("method", ["cats", "m-countdown"])
@pytest.mark.parametrize(("family", "most", "matrices"), [("llama", 0.66, 3), ("opt", 0.5, 2), ("gpt2", 0.5, 2)])
def test_a_sparsity_that_what_is_read_whole_does_not_leave_is_refused(method, family, most, matrices):
    model = tiny(family)
    choice = make(method).choice.title
    words = (
        rf"{choice} reads 1 of the FFN's {matrices} matrices whole, which is more than sparsity 0.7 leaves; "
        rf"use a sparsity up to {most}"
    )
    with pytest.raises(UserError, match=words), open_session(model, method, 0.7):
        pass
    with open_session(model, method, most) as session:
        generate(model, prompts_of(1, 9), tokens=3)
        assert session.weights_read == round((1 - most) * 120) / 120
