"""Experts in graded bits: graded-experts, held against sums by hand over the matrices of each expert.

An expert's matrices [out, n] are codes of B bits, with a scale for each 128 weights of a row. A token reads the first
b_e bits of the codes of its expert e; 0 bits are none of the expert but its biases. E(b) = 1 - (1 - r)^3, where r is
the squared error of all weights of the layer's experts at b bits / the sum of their squares. The bits of a token's
experts begin at the lowest level. Then the expert is raised, level by level, that saves most of sum_e g_e^2 E(b_e) for
a bit, g_e the router's weight, until the layer's bits are spent.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dart_eval
from dart_eval.layers.find import find_ffns
from dart_eval.pruning.experts.by_weight import ByWeight
from dart_eval.pruning.registry import make
from dart_eval.util.bits import parse
from dart_eval.util.errors import UserError
from dart_eval.weights.rounding import rounded
from tests.derivations.test_columns import raised, slopes
from tests.derivations.test_routings import wider, written
from tests.helpers.sessions import bits, generate, open_session, prompts_of, same
from tests.matrix.types import tiny

SPARSITY = 0.7


class AtBits:
    """The experts of a module, all weights in their first bits."""

    def __init__(self, experts, levels, first):
        self.first = first
        turned = hasattr(experts, "gate_up_proj_bias")  # gpt-oss stores [in, out]
        for name in ("gate_up_proj", "down_proj"):
            found = []
            for weight in getattr(experts, name).detach():
                codes = rounded((weight.T if turned else weight).contiguous(), parse(f"{levels[-1]}:128"))
                read = codes.decoded(torch.float32, first) if first else torch.zeros_like(codes.values)
                found.append(read.T if turned else read)
            setattr(self, name, torch.stack(found))
            if turned:
                setattr(self, f"{name}_bias", getattr(experts, f"{name}_bias").detach())


def lost(experts, at):
    """E(b) of a layer's experts."""
    wrong = everything = 0.0
    for name in ("gate_up_proj", "down_proj"):
        for weight, read in zip(getattr(experts, name).detach(), getattr(at, name), strict=True):
            wrong += (weight - read).double().square().sum().item()
            everything += weight.double().square().sum().item()
    return 1 - (1 - wrong / everything) ** 3


def by_hand(experts, x, index, weights, levels, room):
    """[D] and the level of each expert: what a token's experts write, in as many bits together as there is room for."""
    at = [AtBits(experts, levels, b) for b in levels]
    errors = [lost(experts, one) for one in at]
    chosen = raised([w * w for w in weights.tolist()], slopes(errors, levels), levels, room)
    out = torch.zeros_like(x)
    for expert, weight, level in zip(index.tolist(), weights, chosen, strict=True):
        out += weight * written(at[level], x, expert)
    return out, [levels[level] for level in chosen]


@pytest.mark.parametrize(("name", "levels", "sparsity", "room"), [
    # 4.8 bits a weight, of which scales take 2/3: of gate and up 16 bits for 32 weights, of down 16 for 16.
    ("qwen3_moe", "0-1-2-3-4-5-6-7-8", 0.7, [16, 17, 16, 17]),  # four times 4.13 bits, in whole bits
    ("qwen3_moe", "0-8", 0.7, [16, 16, 16, 16]),  # the best two of four in eight bits
    ("qwen3_moe", "0-1-2-3-4-5-6-7-8", 1 - (4 + 2 / 3) / 16, [16, 16, 16, 16]),  # whole bits
    ("mixtral", "2-3-4-5-6-7-8", 0.7, [17, 17, 18, 17]),  # experts of 48 neurons: scales take 4/9; 4 * 4.36 = 17.42
    ("gpt_oss", "0-4-8", 0.7, [16, 16, 20, 16]),  # 17.42 in steps of four: the rest grows by 1.42 a layer
    ("deepseek_v3", "0-2-4-6-8", 0.3, None), ("qwen2_moe", "2-8", 0.4, None),  # with shared experts, read whole
])  # fmt: skip
def test_experts_are_read_in_the_bits_that_save_most(name, levels, sparsity, room):
    model, prompt = wider(name), prompts_of(1, 12)
    words, seen, before = [int(b) for b in levels.split("-")], [], bits(model)
    method = make("graded-experts", {"routing.levels": levels})
    ffns = find_ffns(model)
    routed = [f for f in ffns if f.routed]
    handles = [
        f.routed.experts.register_forward_hook(
            lambda _m, args, out, f=f: seen.append((f, [a.clone() for a in args], out.clone()))
        ) for f in routed
    ]  # fmt: skip
    with torch.no_grad(), open_session(model, method, sparsity) as session:
        generate(model, prompt, 3)
        read = session.weights_read
    for handle in handles:
        handle.remove()
    assert same(model, before)
    rooms = method.routing.token_bits(sparsity, ffns)
    if room is not None:
        assert rooms == room
    seen = seen[-2 * len(routed) :]  # two decoded tokens
    counted = 0.0
    for f, (x, index, weights), out in seen:
        wanted, got = by_hand(f.routed.experts, x[0], index[0], weights[0], words, rooms[f.layer])
        assert torch.allclose(out[0], wanted, rtol=1e-4, atol=1e-5)
        assert sum(got) == rooms[f.layer]
        inner = f.routed.inner
        scales = (2 * 16 / 32 + 16 / inner) / 3
        counted += sum((b + scales) * inner for b in got) / 16
    whole = sum(f.size for f in ffns if not f.routed)
    everything = sum(f.size for f in ffns)
    assert read == pytest.approx((counted / 2 + whole) / everything)
    step = words[1] - words[0]
    assert 0 <= 1 - sparsity - read < step * routed[0].routed.inner / 16 / everything + 1e-9


def test_without_a_rank_all_experts_have_the_same_bits():
    """Of 16 or 17 bits four experts have 4 each, and one has one more; by weight they differ by more."""
    model, prompt = wider("qwen3_moe"), prompts_of(2, 12)
    for rank, same_bits in (("none", True), ("weight", False)):
        with open_session(model, "graded-experts", SPARSITY, **{"routing.rank": rank}) as session:
            generate(model, prompt, 3)
            found = [layer.read for layer in session.prepared.beside.orders.values()]
        spread = [int(read.max() - read.min()) for read in found]
        assert (max(spread) <= 1) == same_bits
        assert [read.sum(1).tolist() for read in found] == [[n, n] for n in (16, 17, 16, 17)]


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_every_token_reads_the_same_bits(data):
    part = ByWeight(levels=data.draw(st.sampled_from(["0-1-2-3-4-5-6-7-8", "0-2-4-6-8", "2-8", "0-4-8"])))
    step, count = part.bits[1] - part.bits[0], data.draw(st.integers(1, 6))
    room = part.bits[0] * count + step * data.draw(st.integers(0, count * (len(part.bits) - 1)))
    drops = [data.draw(st.floats(0.0078125, 1, width=32)) for _ in part.bits]
    errors = torch.tensor(drops).cumsum(0).flip(0)
    weights = torch.tensor([[data.draw(st.floats(0.0078125, 1, width=32)) for _ in range(count)] for _ in range(3)])
    levels = part.chosen(weights, part.gains(errors), room)
    read = torch.tensor(part.bits)[levels]
    assert read.sum(1).tolist() == [room] * 3
    for of_token, w in zip(read.tolist(), weights.tolist(), strict=True):
        assert all(a >= b for a, v in zip(of_token, w, strict=True) for b, u in zip(of_token, w, strict=True) if v > u)


@pytest.mark.parametrize(("method", "sparsity", "words"), [
    ("graded-experts", 0.4, "reads 4.2 to 54.2 % of the bytes, not 60 %; use a sparsity from 0.458 to 0.958, or other"),
    ("graded-experts:routing.levels=2-8", 0.9, "reads 16.7 to 54.2 % of the bytes, not 10 %; use a sparsity from"),
])  # fmt: skip
def test_bytes_beyond_the_levels_are_refused(method, sparsity, words):
    name, _, rest = method.partition(":")
    params = dict([rest.split("=")] if rest else [])
    with pytest.raises(UserError, match=words), open_session(wider("qwen3_moe"), name, sparsity, **params):
        pass


def test_what_it_does_not_fit_is_one_line(llama):
    with (
        pytest.raises(UserError, match="leaves out experts, and this model has none"),
        open_session(llama, "graded-experts", SPARSITY),
    ):
        pass
    model = tiny("qwen3_moe")
    with (
        dart_eval.rounded_ffns(model, 4), pytest.raises(UserError, match="codes of 16-bit weights, and these have"),
        open_session(model, "graded-experts", SPARSITY),
    ):  # fmt: skip
        pass
    model = tiny("longcat_flash")
    with open_session(model, "graded-experts", 0.2), pytest.raises(UserError, match="have fewer experts now and then"):
        generate(model, prompts_of(1, 8), 4)
    assert all(f.routed.multiply is None and f.routed.settle is None for f in find_ffns(model) if f.routed)


def test_a_token_multiplies_all_that_it_reads():
    """Fewer bits are no fewer products; of fewer experts there are fewer."""
    assert make("graded-experts").other.multiplied(0.3) == 1.0 and make("fewer-experts").other.multiplied(0.3) == 0.3
