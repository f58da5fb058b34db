"""The Triton kernels of `graded_triton`: a token's choice of neurons, and its sums over rows and columns.

A chunk of 128 columns of a neuron is 64 bytes of first bits, and 16 bytes for each other bit. The lowest bits of its
bytes are the first columns (`packing.bits_of`). Rows of gate and up come by turns.
"""

import triton
import triton.language as tl

from dart_eval.kernels.cpu.packing import COLUMNS, FIRST

MOST = tl.constexpr(3.4028234663852886e38)  # the largest number of fp32
CHUNK = tl.constexpr(COLUMNS)
NIBBLE = tl.constexpr(FIRST)


@triton.jit
def _act(x, ACT: tl.constexpr):
    if ACT == "silu":
        y = x * tl.sigmoid(x)
    elif ACT == "gelu_tanh":
        y = x * tl.sigmoid(1.5957691216 * (x + 0.044715 * x * x * x))
    elif ACT == "gelu":
        y = x * 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    else:
        y = tl.where(x < 0, 0.0, x)  # NaN stays
    return y


@triton.jit
def _sums(
    codes, scales, x, rows, inside, width, count, groups, ROWS: tl.constexpr, CHUNKS: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """Sums over the columns of rows: scale * x * bits and scale * x, [ROWS] each, and x^2."""
    SIZE: tl.constexpr = 16 * BITS
    place = tl.arange(0, SIZE)
    total = tl.zeros((ROWS, CHUNKS, SIZE), dtype=tl.float32)
    shift = tl.zeros((ROWS, CHUNKS), dtype=tl.float32)
    squares = tl.zeros((CHUNKS, SIZE), dtype=tl.float32)
    for start in range(0, count, CHUNKS):
        c = start + tl.arange(0, CHUNKS)
        there = inside[:, None] & (c < count)[None, :]
        held = codes + (rows[:, None] * count + c[None, :])[:, :, None] * SIZE + place[None, None, :]
        bits = tl.load(held, mask=there[:, :, None], other=0).to(tl.int32)
        scale = tl.load(scales + rows[:, None] * groups + (c % groups)[None, :], mask=there, other=0.0)
        dots = tl.zeros((ROWS, CHUNKS, SIZE), dtype=tl.float32)
        both = tl.zeros((CHUNKS, SIZE), dtype=tl.float32)
        for part in tl.static_range(8 // BITS):
            d = c[:, None] * CHUNK + part * SIZE + place[None, :]
            v = tl.load(x + d, mask=d < width, other=0.0).to(tl.float32)
            dots += ((bits >> (BITS * part)) & (2**BITS - 1)).to(tl.float32) * v[None, :, :]
            both += v
            squares += v * v
        total += dots * scale.to(tl.float32)[:, :, None]
        shift += tl.sum(both, axis=1)[None, :] * scale.to(tl.float32)
    return tl.sum(tl.sum(total, axis=2), axis=1), tl.sum(shift, axis=1), tl.sum(tl.sum(squares, axis=1), axis=0)


@triton.jit
def _score(left):
    """A score that can be compared as a whole number: what is no number counts as the largest."""
    return tl.where(left <= MOST, tl.where(left > 0, left, 0.0), float("inf"))


@triton.jit
def look(
    first, scales, x, doubts, columns, seen, score, rough, h, size, width, count, groups, slope_gate, offset_gate,
    slope_up, offset_up, known, one, ACT: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """What first bits promise: h, scores for exact reading and for writing as seen; and sums to which others add.

    seen: code = one * (first - 8) + rest.
    """
    row = tl.program_id(0) * 2 * ROWS + tl.arange(0, 2 * ROWS)  # gate and up by turns
    sums, shift, squares = _sums(
        first, scales, x, row.to(tl.int64), row < 2 * size, width, count, groups, 2 * ROWS, CHUNKS, NIBBLE
    )
    tl.store(seen + row, one * (sums - 8 * shift), mask=row < 2 * size)
    gate, up = tl.split(tl.reshape(sums, (ROWS, 2)))
    shift_gate, shift_up = tl.split(tl.reshape(shift, (ROWS, 2)))
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside, norm = n < size, tl.sqrt(squares)
    gate, up = slope_gate * gate + offset_gate * shift_gate, slope_up * up + offset_up * shift_up
    off = norm * tl.load(doubts + n, mask=inside, other=0.0)
    off_up = norm * tl.load(doubts + size + n, mask=inside, other=0.0)
    a, b = _act(gate + off, ACT), _act(gate - off, ACT)
    expected, shown = (a * a + b * b) / 2 * (up * up + off_up * off_up), _act(gate, ACT) * up
    left, column = expected - (1 - known) * shown * shown, tl.load(columns + n, mask=inside, other=0.0)
    tl.store(h + n, shown, mask=inside)
    tl.store(score + n, _score(tl.where(left < 0, 0.0, left) * column), mask=inside)
    tl.store(rough + n, _score(expected * column), mask=inside)


@triton.jit
def _choose(scores, may, n, k, chosen):
    """Store the k neurons of the largest scores, ascending, ties to the lower index; return which, [NEURONS] bool.

    The bits of numbers >= 0 are ordered as they are. Two bits of the least score taken are found at a time: three
    numbers of neurons, of 21 bits each, are one sum.
    """
    v = tl.where(may, scores.to(tl.int32, bitcast=True) + 1, 0).to(tl.uint32)
    least = tl.full((), 0, tl.uint32)
    for step in range(16):
        one = tl.full((), 1, tl.uint32) << (30 - 2 * step)
        reach = (v >= least + one).to(tl.int64)
        reach += (v >= least + 2 * one).to(tl.int64) << 21
        reach += (v >= least + 3 * one).to(tl.int64) << 42
        count, few = tl.sum(reach), (1 << 21) - 1
        enough = ((count & few) >= k).to(tl.uint32) + (((count >> 21) & few) >= k).to(tl.uint32)
        least += one * (enough + ((count >> 42) >= k).to(tl.uint32))
    above, tie = v > least, v == least
    ties = k - tl.sum(above.to(tl.int32))
    take = above | (tie & (tl.cumsum(tie.to(tl.int32)) <= ties))
    tl.store(chosen + tl.cumsum(take.to(tl.int32)) - 1, n, mask=take)
    return take


@triton.jit
def threshold(score, rough, x, chosen, broken, size, width, taken, coarse, NEURONS: tl.constexpr, WIDTH: tl.constexpr):
    """Whom a token reads exactly, and who of the others writes as seen. broken: NaN if x is not finite, else 0."""
    n, d = tl.arange(0, NEURONS), tl.arange(0, WIDTH)
    exact = _choose(tl.load(score + n, mask=n < size, other=0.0), n < size, n, taken, chosen)
    others = (n < size) & (exact == 0)
    _choose(tl.load(rough + n, mask=n < size, other=0.0), others, n, coarse, chosen + size)
    v = tl.load(x + d, mask=d < width, other=0.0).to(tl.float32)
    tl.store(broken, tl.where(tl.sum((tl.abs(v) <= MOST).to(tl.int32)) == WIDTH, 0.0, float("nan")))


@triton.jit
def exact(
    rest, scales, x, seen, chosen, h, taken, width, count, groups, ACT: tl.constexpr, ROWS: tl.constexpr,
    CHUNKS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """h of the neurons taken, with all of their bits."""
    i = tl.program_id(0) * 2 * ROWS + tl.arange(0, 2 * ROWS)
    inside = i < 2 * taken
    row = 2 * tl.load(chosen + i // 2, mask=inside, other=0).to(tl.int64) + i % 2
    sums, _, _ = _sums(rest, scales, x, row, inside, width, count, groups, 2 * ROWS, CHUNKS, BITS)
    gate, up = tl.split(tl.reshape(sums + tl.load(seen + row, mask=inside, other=0.0), (ROWS, 2)))
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.load(chosen + i, mask=i < taken, other=0)
    tl.store(h + n, _act(gate, ACT) * up, mask=i < taken)


@triton.jit
def _part(held, scales, inside, weight, slope, offset, PART: tl.constexpr, BITS: tl.constexpr):
    scale = tl.load(scales + PART * 16 * BITS, mask=inside, other=0.0).to(tl.float32)
    bits = ((held >> (BITS * PART)) & (2**BITS - 1)).to(tl.float32)
    return weight[:, None, None] * scale * (slope * bits + offset)


@triton.jit
def _columns(
    codes, scales, index, k, h, out, slope, offset, count, step, split, splits, ROWS: tl.constexpr,
    CHUNKS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """out[d] = the sum over a split of k neurons of h * scale * (slope * bits + offset), by down's columns."""
    SIZE: tl.constexpr = 16 * BITS
    c, place = tl.program_id(0) * CHUNKS + tl.arange(0, CHUNKS), tl.arange(0, SIZE)
    d = c[:, None] * CHUNK + place[None, :]
    a = tl.zeros((ROWS, CHUNKS, SIZE), dtype=tl.float32)  # of each part of a byte
    b = tl.zeros((ROWS, CHUNKS, SIZE), dtype=tl.float32)
    e = tl.zeros((ROWS, CHUNKS, SIZE), dtype=tl.float32)
    f = tl.zeros((ROWS, CHUNKS, SIZE), dtype=tl.float32)
    for start in range(split * ROWS, k, splits * ROWS):
        i = start + tl.arange(0, ROWS)
        n = tl.load(index + i, mask=i < k, other=0).to(tl.int64)
        weight = tl.load(h + n, mask=i < k, other=0.0)
        inside = ((i < k)[:, None] & (c < count)[None, :])[:, :, None]
        held = codes + (n[:, None] * count + c[None, :])[:, :, None] * SIZE + place[None, None, :]
        held = tl.load(held, mask=inside, other=0).to(tl.int32)
        own = scales + (n // CHUNK * step)[:, None, None] + d[None, :, :]
        a += _part(held, own, inside, weight, slope, offset, 0, BITS)
        b += _part(held, own, inside, weight, slope, offset, 1, BITS)
        if BITS == 2:
            e += _part(held, own, inside, weight, slope, offset, 2, BITS)
            f += _part(held, own, inside, weight, slope, offset, 3, BITS)
    inside = (c < count)[:, None]
    tl.store(out + d, tl.sum(a, axis=0), mask=inside)
    tl.store(out + d + SIZE, tl.sum(b, axis=0), mask=inside)
    if BITS == 2:
        tl.store(out + d + 2 * SIZE, tl.sum(e, axis=0), mask=inside)
        tl.store(out + d + 3 * SIZE, tl.sum(f, axis=0), mask=inside)


@triton.jit
def write(
    first, rest, scales, chosen, h, parts, size, taken, coarse, count, step, slope, offset, one, splits,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Sums of columns of down: the other bits of neurons read exactly, their first bits, the line of the others."""
    kind, split = tl.program_id(1) // splits, tl.program_id(1) % splits
    out = parts + tl.program_id(1) * count * CHUNK
    if kind == 0:
        _columns(rest, scales, chosen, taken, h, out, 1.0, 0.0, count, step, split, splits, ROWS, CHUNKS, BITS)
    else:
        seen = kind == 2
        slope, offset = tl.where(seen, slope, one), tl.where(seen, offset, -8 * one)
        index, k = chosen + tl.where(seen, size, 0), tl.where(seen, coarse, taken)
        _columns(first, scales, index, k, h, out, slope, offset, count, step, split, splits, ROWS, CHUNKS, NIBBLE)


@triton.jit
def add(parts, broken, out, width, wide, count, COUNT: tl.constexpr, WIDE: tl.constexpr):
    """out[d] = the sum of all parts, in one order."""
    d, p = tl.program_id(0) * WIDE + tl.arange(0, WIDE), tl.arange(0, COUNT)
    inside = (p < count)[:, None] & (d < width)[None, :]
    found = tl.load(parts + p[:, None] * wide + d[None, :], mask=inside, other=0.0)
    tl.store(out + d, tl.sum(found, axis=0) + tl.load(broken), mask=d < width)
