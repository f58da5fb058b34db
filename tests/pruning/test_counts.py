"""How many neurons a choice takes and writes of each layer: bytes read are the label to the neuron."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dart_eval.pruning.counts import chosen_counts, in_steps
from dart_eval.util.errors import UserError
from tests.helpers.models import tiny
from tests.helpers.sessions import generate, open_session, prompts_of


def test_counts_of_few_neurons_fit():
    """What is taken and not written must leave rows for what is: of few neurons that is soon none."""
    taken, written = chosen_counts([1, 1, 1], 0.75, 3, 0, "cats")
    assert 2 * sum(taken) + sum(written) == 3 * round(0.25 * 3)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=6), st.floats(0, 0.95), st.sampled_from([2, 3]), st.integers(0, 2)
)
def test_what_is_read_is_the_label_exactly(sizes, sparsity, matrices, whole):
    whole = min(whole, matrices - 1)
    kept = round((1 - sparsity) * sum(sizes))
    if whole * sum(sizes) > matrices * kept:
        with pytest.raises(UserError, match=f"reads {whole} of the FFN's {matrices} matrices whole"):
            chosen_counts(sizes, sparsity, matrices, whole, "cats")
        return
    taken, written = chosen_counts(sizes, sparsity, matrices, whole, "cats")
    assert whole * sum(sizes) + (matrices - 1 - whole) * sum(taken) + sum(written) == matrices * kept
    assert all(0 <= few <= many <= size for few, many, size in zip(written, taken, sizes, strict=True))
    # What is left is for all matrices alike, but for a row that does not divide.
    assert sum(taken) - sum(written) in (0, 1, 2)


@pytest.mark.parametrize(("counts", "most", "steps", "wanted"), [
    ([7, 5], [16, 5], [8, 1], [0, 5]),  # seven are too few for a step, and the other layer is full
    ([7, 5], [16, 9], [8, 1], [0, 9]), ([15, 5], [16, 9], [8, 1], [8, 9]), ([15, 9], [16, 9], [8, 1], [8, 9]),
    ([7, 7, 4], [8, 8, 9], [8, 8, 1], [8, 0, 9]),
])  # fmt: skip
def test_steps_by_hand(counts, most, steps, wanted):
    assert in_steps(counts, most, steps) == wanted


def test_counts_by_hand():
    """Half of the weights of 2 x 100 neurons: 300 rows in all."""
    every = [100, 100]
    assert chosen_counts(every, 0.0, 3, 1, "cats") == (every, every)
    # 200 of the rows for the gate whole, a quarter of up and down each.
    assert chosen_counts(every, 0.5, 3, 1, "cats") == ([25, 25], [25, 25])
    # Nothing is read whole: what is taken is what a mask alone would keep.
    assert chosen_counts(every, 0.5, 3, 0, "oracle-token") == ([50, 50], [50, 50])
    # Up alone, of a plain FFN, reads all that the sparsity leaves.
    assert chosen_counts(every, 0.5, 2, 1, "cats") == ([0, 0], [0, 0])


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


@pytest.mark.parametrize("method", ["cats", "m-countdown"])
@pytest.mark.parametrize(("family", "most", "matrices"), [("llama", 0.66, 3), ("opt", 0.5, 2), ("gpt2", 0.5, 2)])
def test_a_sparsity_that_what_is_read_whole_does_not_leave_is_refused(method, family, most, matrices):
    model = tiny(family)
    words = (
        rf"{method} reads 1 of the FFN's {matrices} matrices whole, which is more than sparsity 0.7 leaves; "
        rf"use a sparsity up to {most}"
    )
    with pytest.raises(UserError, match=words), open_session(model, method, 0.7):
        pass
    with open_session(model, method, most) as session:
        generate(model, prompts_of(1, 9), tokens=3)
        assert session.weights_read == round((1 - most) * 120) / 120
