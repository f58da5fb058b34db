"""How many neurons a choice takes and writes of each layer: bytes read are the label to the neuron."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dart_eval.pruning.choices.choice import All
from dart_eval.pruning.choices.oracle import ByHidden, TopP
from dart_eval.pruning.masks.counts import Budget, Counts, chosen_counts, in_steps, keep_counts
from dart_eval.pruning.masks.depth import depth_aware, normalise_sensitivity
from dart_eval.pruning.registry import CHOICES, make
from dart_eval.util.errors import UserError
from tests.helpers.models import tiny
from tests.helpers.sessions import generate, open_session, prompts_of


def test_counts_of_few_neurons_fit():
    """What is taken and not written must leave rows for what is: of few neurons that is soon none."""
    counts = chosen_counts(Budget([0.4375, 0.1, 0.2125], [1, 1, 1], 0.75, 3), 0, None, 0.5)
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
@given(layers_of(), st.sampled_from([2, 3]), st.integers(0, 2), st.none() | st.floats(1.0, 4.0), st.floats(0.05, 1.0))
def test_what_is_read_is_the_label_exactly(layers, matrices, whole, ratio, write_share):
    densities, sizes, sparsity = layers
    whole = min(whole, matrices - 1)
    kept = round((1 - sparsity) * sum(sizes))
    if ratio is None and whole * sum(sizes) > matrices * kept:
        with pytest.raises(UserError, match=f"reads {whole} of the FFN's {matrices} matrices whole"):
            chosen_counts(Budget(densities, sizes, sparsity, matrices), whole, ratio, write_share)
        return
    found = chosen_counts(Budget(densities, sizes, sparsity, matrices), whole, ratio, write_share)
    read = whole * sum(found.mask) + (matrices - 1 - whole) * sum(found.taken) + sum(found.written)
    assert read == matrices * kept and found.full_matrices == whole
    for written, taken, mask, size in zip(found.written, found.taken, found.mask, sizes, strict=True):
        assert 0 <= written <= taken <= mask <= size
    assert sum(found.mask) == sum(sizes) if ratio is None else sum(found.mask) >= kept
    if write_share == 1:
        # What the masks have enough of is for all alike, but for a row that does not divide.
        spare = all(t < m for t, m in zip(found.taken, found.mask, strict=True))
        assert not spare or sum(found.taken) - sum(found.written) in (0, 1, 2)


@pytest.mark.parametrize(("counts", "most", "steps", "wanted"), [
    ([7, 5], [16, 5], [8, 1], [0, 5]),  # seven are too few for a step, and the other layer is full
    ([7, 5], [16, 9], [8, 1], [0, 9]), ([15, 5], [16, 9], [8, 1], [8, 9]), ([15, 9], [16, 9], [8, 1], [8, 9]),
    ([7, 7, 4], [8, 8, 9], [8, 8, 1], [8, 0, 9]),
])  # fmt: skip
def test_steps_by_hand(counts, most, steps, wanted):
    assert in_steps(counts, most, steps) == wanted


def test_counts_by_hand():
    """Half of the weights of 2 x 100 neurons, mask 1.3 times that: 65 gates, and (150 - 65) / 2 rows of up and down."""
    half = [0.5, 0.5], [100, 100], 0.5
    assert chosen_counts(Budget(*half, 3), 1, 1.3, 1) == Counts([65, 65], [43, 42], [43, 42], 1)
    assert chosen_counts(Budget([1.0, 1.0], [100, 100], 0.0, 3), 1, 1.3, 1) == Counts(*[[100, 100]] * 3, 1)
    assert chosen_counts(Budget(*half, 3), 1, 9.0, 1) == Counts([100, 100], [25, 25], [25, 25], 1)  # the gate dense
    # Gate, up and down, 150 rows a layer: 80 gates, then 70 rows of which down has 0.6 times as many as up.
    assert chosen_counts(Budget(*half, 3), 1, 1.6, 0.6) == Counts([80, 80], [44, 44], [26, 26], 1)
    assert chosen_counts(Budget(*half, 3), 1, 1.0, 0.6) == Counts([50, 50], [50, 50], [50, 50], 1)  # a mask alone
    assert chosen_counts(Budget(*half, 2), 1, 1.6, 0.6) == Counts([80, 80], [20, 20], [20, 20], 1)  # no gate
    # A mask of everything: 200 of the 300 rows' budget for the gate whole, a quarter of up and down each.
    assert chosen_counts(Budget(*half, 3), 1, None, 1) == Counts([100, 100], [25, 25], [25, 25], 1)
    # Nothing is read whole: the mask is wider, and what is taken is what a mask alone would keep.
    assert chosen_counts(Budget(*half, 3), 0, None, 1) == Counts([100, 100], [50, 50], [50, 50], 0)
    assert chosen_counts(Budget(*half, 3), 0, 1.6, 1) == Counts([80, 80], [50, 50], [50, 50], 0)
    assert chosen_counts(Budget(*half, 3), 0, 1.6, 0.5) == Counts([80, 80], [60, 60], [30, 30], 0)


@settings(deadline=None)
@given(
    st.lists(st.floats(0.05, 1.0), min_size=1, max_size=8),
    st.floats(0.05, 0.9),
    st.floats(1.0, 4.0),
    st.sampled_from([(2, 1), (2, 0), (3, 1), (3, 0), (3, 2)]),
    st.floats(0.05, 1.0),
)
def test_every_layer_reads_its_share(shares, sparsity, spread, read_whole, down):
    """Also where a layer's mask ends at all its neurons: no other layer pays for it. Off by rounding alone."""
    matrices, whole = read_whole
    size, scale = 1000, (1 - sparsity) * len(shares) / sum(shares)
    ratios = [r * scale for r in shares]
    assume(max(ratios) <= 1)
    for share in (down, 1.0):
        found = chosen_counts(Budget(ratios, [size] * len(ratios), sparsity, matrices), whole, spread, share)
        for ratio, mask, taken, written in zip(ratios, found.mask, found.taken, found.written, strict=True):
            read = whole * mask + (matrices - 1 - whole) * taken + written
            assert abs(read - matrices * ratio * size) <= 6


@pytest.mark.parametrize("matrices", [2, 3])
@pytest.mark.parametrize("cls", [c for c in CHOICES if not c.ranks])
def test_a_choice_counts_what_it_says_that_it_reads(cls, matrices):
    choice, half = cls(), ([0.5, 0.5], [100, 100], 0.5, matrices)
    alone, everything, inside = [50, 50], [100, 100], [80, 80]
    if cls is All:
        assert (
            choice.counts(Budget(*half, True)) == choice.counts(Budget(*half, False)) == Counts(alone, alone, alone, 0)
        )
    elif cls is TopP:
        assert choice.counts(Budget(*half, True)) == Counts(everything, everything, everything, 0)
        assert choice.counts(Budget(*half, False)) == Counts(alone, alone, alone, 0)
    elif cls is ByHidden:
        assert choice.counts(Budget(*half, True)) == Counts(everything, alone, alone, 0)
        assert choice.counts(Budget(*half, False)) == Counts(inside, alone, alone, 0)
    elif matrices == 3:
        assert choice.counts(Budget(*half, True)) == Counts(everything, [25, 25], [25, 25], 1)
        assert choice.counts(Budget(*half, False)) == Counts(inside, [35, 35], [35, 35], 1)
    else:  # up tells h: it is read whole, whatever the choice looks at
        assert choice.counts(Budget(*half, True)) == Counts(everything, [0, 0], [0, 0], 1)
        assert choice.counts(Budget(*half, False)) == Counts(inside, [20, 20], [20, 20], 1)


def test_uniform_counts_of_a_mask_alone_are_those_without_a_choice():
    densities, sizes = [0.3, 0.45, 0.15], [40, 40, 40]
    for ratio in (1.0, 1.6):
        found = chosen_counts(Budget(densities, sizes, 0.7, 3), 1, ratio, 1.0)
        assert sum(found.mask) == round(ratio * 36)  # 58 leave 50 rows, for up and down alike
    assert sum(chosen_counts(Budget(densities, sizes, 0.7, 3), 1, 1.58, 1.0).mask) == 56  # 57 would leave 51
    assert All().counts(Budget(densities, sizes, 0.7, 3, False)).mask == keep_counts(densities, sizes, 0.7)


@pytest.mark.parametrize("method", ["cats", "m-countdown"])
@pytest.mark.parametrize(("family", "most", "matrices"), [("llama", 0.66, 3), ("opt", 0.5, 2), ("gpt2", 0.5, 2)])
def test_a_sparsity_that_what_is_read_whole_does_not_leave_is_refused(method, family, most, matrices):
    model = tiny(family)
    choice = make(method).choice.title
    words = (
        rf"{choice} reads 1 of the FFN's {matrices} matrices whole, which is more than sparsity 0.7 leaves; "
        rf"use a sparsity up to {most}, or a mask that is not everything"
    )
    with pytest.raises(UserError, match=words), open_session(model, method, 0.7):
        pass
    with open_session(model, method, most) as session:
        generate(model, prompts_of(1, 9), tokens=3)
        assert session.weights_read == round((1 - most) * 120) / 120
    with open_session(model, "griffin", 0.9, choice=make(method).choice.name):  # inside a mask any may be met
        pass
