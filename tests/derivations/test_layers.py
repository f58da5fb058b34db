"""Matrices in graded bits: graded-layers, its oracle and bits-by-position, on the three matrices of an FFN.

The read 1 - s leaves a weight b bits: 16 (1 - s), less a scale's share of 16 bits (a scale for each 128 weights of a
row). A matrix is codes of b_high bits. A decoded token reads all of them, or their first b_low bits: r = (b - b_low) /
(b_high - b_low) of the tokens read b_high. `near` levels are the whole numbers around b.

graded-layers     of the n tokens of a text, int(r n) have an input x with a larger norm than t. A token reads b_high
                  where ||x|| > t.
oracle-layers     the same of ||W_high x - W_low x||.
bits-by-position  the first int(256 r) tokens after the prompt.

x is the input of the matrix: of down it is h. Prompts run on the weights.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dart_eval
from dart_eval.pruning.inputs.layers import GradedLayers
from dart_eval.pruning.registry import make
from dart_eval.util.bits import parse
from dart_eval.util.errors import UserError
from dart_eval.weights.rounding import rounded
from tests.derivations import ours
from tests.derivations.test_entries import FAMILIES, by_hand, ffns_of, thinned
from tests.derivations.test_thresholds import text
from tests.helpers.matrices import in_turn
from tests.helpers.models import biased, random_tokens, tiny
from tests.helpers.sessions import PLAIN, bits, generate, open_session, prompts_of, same

METHODS = ["graded-layers", "oracle-layers", "bits-by-position"]


def size(method, x, low, high):
    """What is compared with the threshold. low, high: the matrix as both kinds of tokens read it."""
    return math.sqrt(sum(v * v for v in (x if method == "graded-layers" else high @ x - low @ x).tolist()))


def threshold(share, sizes):
    """The largest size of the tokens of a text that do not read high bits, where this share of them does."""
    return sorted(sizes, reverse=True)[int(share * len(sizes) + 1e-9)]


EACH = in_turn(FAMILIES, METHODS, [(0.68, "near"), (0.6, "4-8"), (0.75, "2-4")])


@pytest.mark.parametrize(("family", "method", "sparsity", "levels"), EACH)
def test_matrices_are_read_in_high_bits_where_the_rule_says(family, method, sparsity, levels):
    model, length, used, least = biased(family), 9, [], {}
    texts, last = by_hand(model), 1 if family in PLAIN else 2
    matrices = sum(len(parts) for _, parts in ffns_of(model))

    def kept_of(i, k, weight, x):
        scale = 16 / min(128, len(x))
        b = 16 * (1 - sparsity) - scale
        b_low, b_high = (int(b), int(b) + 1) if levels == "near" else map(int, levels.split("-"))
        codes = rounded(weight, parse(f"{b_high}:128"))
        low, high = (codes.decoded(torch.float32, n).to(weight.dtype) for n in (b_low, b_high))
        share = (b - b_low) / (b_high - b_low)
        if method == "bits-by-position":
            chosen = len(used) // matrices < int(share * length + 1e-9)
        else:
            if (i, k) not in least:
                least[i, k] = threshold(share, [size(method, v, low, high) for v in texts[i][k == last]])
            chosen = size(method, x, low, high) > least[i, k]
        used.append((b_high if chosen else b_low) + scale)
        return (high if chosen else low) / torch.where(weight == 0, 1.0, weight)

    prompt, decoded = random_tokens(12, 1), random_tokens(10, 2)
    before = bits(model)
    run = ours.run(model, method, prompt, decoded, sparsity, "auto", text,
                   **{"entries.length": length, "entries.levels": levels})  # fmt: skip
    assert same(model, before)
    wanted, _ = thinned(model, prompt, decoded, kept_of)
    assert torch.allclose(run.logprobs, wanted, rtol=0, atol=2e-6)
    read = [sum(used[at : at + matrices]) / matrices / 16 for at in range(0, len(used), matrices)]
    assert run.read == pytest.approx(read) and len(set(run.read)) > 1
    if method == "bits-by-position":
        assert sorted(run.read, reverse=True) == run.read and sum(run.read[:length]) / length <= 1 - sparsity


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_the_mean_of_the_bits_is_met_on_the_text(data):
    """To one token, and never beyond; a read of all low or all high bits too."""
    part = GradedLayers(levels=data.draw(st.sampled_from(["2-4", "3-6", "4-5"])), length=data.draw(st.integers(1, 40)))
    low, high = part.bits
    room = data.draw(st.floats(low, high + 0.5) | st.sampled_from([float(low), float(high)]))
    sizes = torch.tensor(data.draw(st.lists(st.integers(0, 10**6), min_size=1, max_size=40, unique=True))).float()
    matrix = SimpleNamespace(room=room)
    for tokens, first in (
        (len(sizes), int((sizes > part.limit(matrix, sizes)).sum())),
        (part.length, int((torch.arange(part.length) < part.limit(matrix, None)).sum())),
    ):
        mean = low + (high - low) * first / tokens
        assert mean <= room + 1e-6 and (mean > room - (high - low) / tokens - 1e-6 or first == tokens)


@given(st.integers(0, 10**6), st.floats(3, 6))
@settings(max_examples=30, deadline=None)
def test_no_estimate_saves_more_error_than_the_oracle(seed, room):
    """On the text, where both give high bits to as many tokens."""
    draw = torch.Generator().manual_seed(seed)
    low, high = torch.randn(2, 5, 8, generator=draw)
    x, matrix = torch.randn(30, 8, generator=draw), SimpleNamespace(room=room, values=[lambda: low, lambda: high])
    saved = {}
    for by in ("norm", "error"):
        part = GradedLayers(levels="3-6", by=by)
        above = part.size(x, matrix) > part.limit(matrix, part.size(x, matrix))
        saved[by] = int(above.sum()), float((x @ (high - low).T)[above].square().sum())
    assert saved["norm"][0] == saved["error"][0] and saved["norm"][1] <= saved["error"][1] * (1 + 1e-5)


def test_positions_are_those_of_each_sequence():
    """Those after its own prompt, whatever stands beside it; a further turn begins anew."""
    model = tiny("llama")
    with open_session(model, "bits-by-position", 0.7, **{"entries.length": 9}) as session:
        valid = torch.tensor([[False, True, True], [True, True, True]])
        session.no_context(2, torch.device("cpu"))
        assert session.state.positions(valid).tolist() == [[0, 0, 1], [0, 1, 2]]
        with session.decode(valid):
            model(torch.ones(2, 3, dtype=torch.long))
        assert session.state.decoded.tolist() == [2, 3]
        assert session.state.select(torch.tensor([1, 0, 0])).decoded.tolist() == [3, 2, 2]
        session.state.finish_context(valid)
        assert session.state.decoded.tolist() == [0, 0]


def test_what_a_batch_reads_is_what_each_sequence_reads_alone():
    model, ids = tiny("llama"), prompts_of(3, 12)
    for method in METHODS:
        with open_session(model, method, 0.7, **{"entries.length": 5}) as session:
            generate(model, ids, tokens=7)
            together = torch.stack([step.read for step in session.steps], 1)
        for row, one in zip(together, ids, strict=True):
            with open_session(model, method, 0.7, **{"entries.length": 5}) as session:
                generate(model, one[None], tokens=7)
                assert [float(step.read) for step in session.steps] == pytest.approx(row.tolist())


def test_bytes_beyond_the_levels_are_refused():
    for levels, reads in (("near", "15.6 to 53.1"), ("3-6", "21.9 to 40.6")):
        method = make("graded-layers", {"entries.levels": levels})
        for sparsity, share in ((0.9, "10 %"), (0.3, "70 %")):
            message = f"entries=layers reads {reads} % of the bytes, not {share}; use a sparsity from"
            with pytest.raises(UserError, match=message), open_session(tiny("llama"), method, sparsity):
                pass


def test_weights_of_few_bits_and_no_text_are_refused():
    model = tiny("llama")
    with (
        dart_eval.rounded_ffns(model, 4), pytest.raises(UserError, match="codes of 16-bit weights, and these have"),
        open_session(model, make("graded-layers"), 0.7),
    ):  # fmt: skip
        pass
    with pytest.raises(UserError, match="calibrates on text and needs the tokenizer"):
        ours.run(model, "oracle-layers", [1, 2], [3], 0.7)
    assert ours.run(model, "bits-by-position", [1, 2], [3], 0.7).read


def test_bytes_beside_the_model():
    """A threshold for each matrix; or a number for each sequence."""
    for method, of_model in (("graded-layers", 3 * 3 * 4), ("oracle-layers", 3 * 3 * 4), ("bits-by-position", 0)):
        with open_session(tiny("llama"), method, 0.7) as session:
            assert session.state_bytes == of_model
            generate(session.model, prompts_of(2, 5), tokens=2)
            decoded = session.state.decoded
            assert (decoded is None) == bool(of_model) and (of_model or decoded.nbytes == 2 * 8)
