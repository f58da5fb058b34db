"""dart-plus (this project's own), token by token and neuron by neuron.

FFN weights are whole numbers c of b bits, with a scale s for neighbours in a row: w = s c. The first p bits of c leave
2^(b - p) values open. Of p >= 4 they stand for a line through the matrix's numbers, by least squares, and else for the
mean of the numbers that begin so. A decoded token x reads the first bits of every row of gate and up: that gives g and
u, the preview P = act(g) u, and with e = ||x|| times what first bits leave out of a row (root mean square)

    E = (act(g + e_g)^2 + act(g - e_g)^2) / 2 * (u^2 + e_u^2)            what h^2 is to be expected

With n^2 the square of the norm of the neuron's column of down, the largest (E - P^2 + 0.2 P^2) n^2 are read exactly:
their own h goes through their own column. Of the others the largest E n^2 write P through the first bits of their
column. A plain FFN has up alone, and E its first factor. Doubts and norms are kept in 16 bits.

Where bytes are short, a preview reads p bits of the tiles of columns in which x has the largest norm, and p - 1 bits of
the next ones; then g, u and e^2 are sums over both parts of x. Columns lie in the order of their mean square on a text.
"""

import numpy as np
import pytest
import torch

from dart_eval.layers.find import find_ffns
from dart_eval.util.bits import parse
from dart_eval.weights.rounding import rounded
from tests.helpers.models import biased, random_tokens, tiny
from tests.helpers.sessions import RandomCalibration, generate, open_session

LAYER = 1
ACTS = {
    "llama": lambda z: z / (1 + np.exp(-z)),
    "gemma3": lambda z: 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))),
    "opt": lambda z: np.maximum(z, 0),
}
# What weights are, first bits, tiles of how many columns; tiles read in p bits, and in p - 1; sparsity; as typed.
SETTINGS = {
    "all columns": ("6:128", 4, 40, 1, 0, 0.7, {}),
    "tiles": ("5:16", 3, 8, 1, 2, 0.78, {
        "image.code": 5, "image.group": 16, "image.bits": 3, "choice.fine": 0.2, "choice.rough": 0.4, "choice.tile": 8,
    }),
}  # fmt: skip


def kept16(values):
    return values.astype(np.float16).astype(np.float64)


def served(weight, text, order):
    """Codes [out, in], their scales weight by weight, and what they stand for; by columns in their own order."""
    made = rounded(weight[:, order], parse(text))
    width = weight.shape[1]
    scales = made.scales.double().numpy().repeat(min(made.rounding.group, width), axis=1)[:, :width]
    back = np.argsort(order)
    codes, scales = made.codes.numpy().astype(int)[:, back], scales[:, back]
    return codes, scales, codes * scales


def begun(codes, scales, bits, low):
    """What codes stand for without their last bits."""
    first = np.floor_divide(codes, 2**low)
    if bits - low < 4:
        mean = {begin: codes[first == begin].mean() for begin in {*first.flat}}
        return scales * np.vectorize(mean.get)(first)
    slope, middle = np.polyfit(first.ravel(), codes.ravel(), 1)
    return scales * (slope * first + middle)


def by_hand(ffn, act, x, counts, setting, order):
    """What one token's FFN adds, [D], without down's bias; the neurons read exactly, those that write so too; bits."""
    text, first, tile, fine, rough, *_ = setting
    modules = [m for m in (ffn.gate, ffn.up) if m is not None]
    biases = [0.0 if m.bias is None else m.bias.detach().double().numpy() for m in modules]
    down = ffn.down.weight.detach()
    bits = int(text[0])
    rows = [served(m.weight.detach(), text, order) for m in modules]
    codes, scales, written = served(down, text, np.arange(down.shape[1]))
    tiles = [order[i : i + tile] for i in range(0, len(order), tile)]
    tiles.sort(key=lambda columns: -float((x[columns] ** 2).sum()))
    parts = [np.zeros_like(x), np.zeros_like(x)]
    for part, some in zip(parts, (tiles[:fine], tiles[fine : fine + rough]), strict=True):
        for columns in some:
            part[columns] = x[columns]
    seen, off = [], []
    for (c, s, w), b in zip(rows, biases, strict=True):
        images = [begun(c, s, bits, bits - first), begun(c, s, bits, bits - first + 1)]
        seen.append(sum(image @ part for image, part in zip(images, parts, strict=True)) + b)
        doubts = [kept16(np.sqrt(((w - image) ** 2).mean(1))) for image in images]
        off.append(np.sqrt(sum((np.linalg.norm(p) * d) ** 2 for p, d in zip(parts, doubts, strict=True))))
    expected = (act(seen[0] + off[0]) ** 2 + act(seen[0] - off[0]) ** 2) / 2
    preview, exact = act(seen[0]), act(rows[0][2] @ x + biases[0])
    if len(modules) == 2:
        expected, preview = expected * (seen[1] ** 2 + off[1] ** 2), preview * seen[1]
        exact = exact * (rows[1][2] @ x + biases[1])
    norms = kept16(np.linalg.norm(written, axis=0)) ** 2
    taken, writing = counts
    score = np.argsort(-np.maximum(expected - 0.8 * preview**2, 0) * norms, kind="stable")
    read, others = score[:taken], score[taken:]
    others = others[np.argsort(-(expected * norms)[others], kind="stable")][: writing - taken]
    coarse = begun(codes, scales, bits, bits - first)
    return written[:, read] @ exact[read] + coarse[:, others] @ preview[others], read, others


def bits_by_hand(ffn, setting, taken, others):
    """Bits that one token reads of a gated FFN, counted one by one."""
    text, first, tile, fine, rough, *_ = setting
    bits, group = map(int, text.split(":"))
    neurons, width = ffn.gate.weight.shape
    groups = -(-width // group)
    levels = 1 + (rough > 0)
    total = 0
    for _ in ("gate", "up"):
        at_once = first * min(width, fine * tile) + (first - 1) * rough * tile
        total += neurons * (at_once + 16 * groups + 16 * levels)  # scales; a doubt a row for each precision
        total += taken * (bits * width - at_once)
    total += 16 * neurons + 16 * width * -(-neurons // group)  # norms of columns; all scales of down
    return total + taken * bits * width + others * first * width


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("family", ACTS)
def test_a_token_reads_more_bits_of_what_matters_more(family, name):
    model = biased(family) if family != "gemma3" else tiny(family)
    model.bfloat16().float()  # weights of 16 bits, multiplied in more
    seen, ffn, (*setting, sparsity, params) = {}, find_ffns(model)[LAYER], SETTINGS[name]
    order = np.arange(ffn.width)
    if params:
        squares = np.zeros(ffn.width)

        def see(layer, x, _h):
            squares[:] += (layer == LAYER) * x.double().square().sum(0).numpy()

        RandomCalibration(model, None).visit(see)
        order = np.argsort(-squares.astype(np.float32), kind="stable")
    bias = 0.0 if ffn.down.bias is None else ffn.down.bias.detach().numpy()
    own = {n: p.clone() for n, p in model.named_parameters()}
    hooks = [ffn.block.register_forward_pre_hook(lambda _m, args: seen.update(x=args[0].detach().flatten()))]
    with open_session(model, "dart-plus", sparsity, execution="masked", **params) as session:
        # What stands in for the first bits of down is added behind the hooks of the session: ours come after these.
        hooks.append(ffn.down.register_forward_hook(lambda _m, _a, out: seen.update(out=out.detach().flatten())))
        generate(model, torch.tensor([random_tokens(14)]), 4)
        taken, written = int(session.state.taken[0, LAYER]), int(session.state.written[0, LAYER])
        paid = torch.tensor(session.prepared.layers[LAYER].cost_terms, dtype=torch.float64)
    for hook in hooks:
        hook.remove()
    assert all(torch.equal(p, own[n]) for n, p in model.named_parameters())
    assert 0 < taken < written < ffn.size
    wanted, read, others = by_hand(
        ffn, ACTS[family], seen["x"].double().numpy(), (taken, written), setting, torch.from_numpy(order).numpy()
    )
    assert len(read) == taken and len(others) == written - taken
    if family == "llama":
        told = paid @ torch.tensor([ffn.size, ffn.size, taken, written]).double()
        assert float(told) * 16 * ffn.width == pytest.approx(bits_by_hand(ffn, setting, taken, written - taken))
    wanted = wanted + bias
    assert np.allclose(seen["out"].numpy(), wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())
