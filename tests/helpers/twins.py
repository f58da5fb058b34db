"""dart-plus and plain FFNs of codes, as twins of the kernels: the product's own formulas, in double precision."""

import torch
from hypothesis import strategies as st
from torch.nn.functional import gelu, linear, relu, silu

from dart_eval.kernels.top import top_k_mask
from dart_eval.pruning.choices.choice import Token
from dart_eval.pruning.choices.dart_plus import DartPlus
from dart_eval.pruning.choices.look import Preview
from dart_eval.weights.rounding import rounded

ACTS = {"silu": silu, "gelu_tanh": lambda x: gelu(x, approximate="tanh"), "gelu": gelu, "relu": relu}


def matrices(width, neurons, seed=0, kind="normal"):
    """Gate, up and down in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for shape in ((neurons, width), (neurons, width), (width, neurons)):
        w = torch.randn(shape, generator=generator) * 0.05
        if kind == "zero":
            w = torch.zeros(shape)
        elif kind == "equal":
            w = torch.full(shape, 0.03)
        elif kind == "outliers":
            w.view(-1)[:: max(1, w.numel() // 7)] *= 100
        found.append(w.bfloat16())
    return found


def token(width, seed=0, kind="normal"):
    x = torch.randn(1, width, generator=torch.Generator().manual_seed(seed + 1))
    if kind == "outliers":
        x[0, seed % width] *= 50
    return x * (kind != "zero")


def coded(gate, up, down, rounding):
    return [rounded(w, rounding) for w in (gate, up, down)]


def values(packed):
    return [p.values.double() for p in packed]


def dense(x, gate, up, down, act="silu"):
    x = x.double()
    return linear(ACTS[act](linear(x, gate.double())) * linear(x, up.double()), down.double())


def parts(x, gate, up):
    """[F], the size of h where gate x and up x are sums of as large parts with random signs: nothing cancels."""
    return (gate.double() * x).norm(dim=1) * (up.double() * x).norm(dim=1)


def size(x, gate, up, down):
    """The size of what comes out, in the same way."""
    return (down.double() * parts(x, gate, up)).norm()


def apart(found, expected, beside=0.0):
    """How far numbers lie apart, all together, beside their size, or that of what is added up in them."""
    assert found.shape == expected.shape and found.isfinite().all()
    return float((found.double() - expected).norm() / max(float(expected.norm()), float(beside), 1e-20))


SHAPES = {
    "width": st.integers(1, 400), "neurons": st.integers(1, 300), "seed": st.integers(0, 1000),
    "kind": st.sampled_from(["normal", "normal", "outliers", "zero", "equal"]), "act": st.sampled_from(sorted(ACTS)),
}  # fmt: skip


class Twin:
    """What dart-plus computes of a token, by the product's own parts."""

    def __init__(self, packed, taken, coarse, act, known=0.2):
        self.values = values(packed)
        self.images = [image(p, line) for p, line in zip(packed, lines(packed), strict=True)]
        pairs = list(zip(self.values[:2], self.images[:2], strict=True))
        self.doubts = [(v - seen).square().mean(1).sqrt().half().double() for v, seen in pairs]
        self.columns = self.values[2].norm(dim=0).half().double().square()
        self.taken, self.coarse, self.act, self.choice = taken, coarse, ACTS[act], DartPlus(known=known)

    def scores(self, x):
        """h as first bits show it, and the scores for exact reading and for writing as seen: [F] each."""
        images = tuple((lambda w=w: w) for w in self.images[:2])
        shown, expected = Preview(images, (None, None), tuple(self.doubts), self.act).look(x.double()[None])
        exact = (expected - (1 - self.choice.known) * shown.square()).clamp(min=0)
        return shown[0, 0], (exact * self.columns)[0, 0], (expected * self.columns)[0, 0]

    def chosen(self, x):
        """The neurons that the method takes, by its own code: [F] bool each."""
        images = tuple((lambda w=w: w) for w in self.images[:2])
        shown, expected = Preview(images, (None, None), tuple(self.doubts), self.act).look(x.double()[None])
        size = len(self.columns)
        made = Token(
            shown, shown, shown, allowed=torch.ones(1, 1, size, dtype=torch.bool), taken=torch.tensor([self.taken]),
            written=torch.tensor([self.taken + self.coarse]), preview=shown, expected=expected.double(),
            columns=self.columns[None, None],
        )  # fmt: skip
        exact = self.choice.choose(made)
        return exact[0, 0], self.choice.approximated(made, exact)[0, 0]

    def write(self, x, exact, coarse):
        """The output where these neurons are taken."""
        gate, up, down = self.values
        x, h = x.double(), self.scores(x)[0]
        return dense_of(x, gate[exact], up[exact], down[:, exact], self.act) + h[coarse] @ self.images[2][:, coarse].T


def dense_of(x, gate, up, down, act):
    return linear(act(linear(x, gate)) * linear(x, up), down)


def image(held, line):
    """What the first bits of codes stand for by a line, times scales: [rows, width] double."""
    half, (slope, offset) = 2 ** (held.rounding.bits - 1), line
    first = ((held.codes.int() + half) >> (held.rounding.bits - 4)).double()
    width, group = held.codes.shape[1], held.rounding.group or held.codes.shape[1]
    return (slope * first + offset) * held.scales.double().repeat_interleave(group, 1)[:, :width]


def lines(packed):
    """Slope and offset of what four first bits stand for, of each matrix."""
    return [p.line(p.rounding.bits - 4) for p in packed]


def check(out, score, shown, chosen, twin, x, most):
    """What a kernel made of a token is the twin's, within a share of the size of what is added up.

    Args:
        score, shown: [F], scores for exact reading, and h by first bits, as the kernel has them.
        chosen: its neurons, read exactly and writing as they are seen.
    """
    h, exact_score, rough_score = twin.scores(x)
    beside = parts(x, *twin.values[:2])
    assert apart(shown, h, beside.norm()) < most
    assert apart(score, exact_score, (beside.square() * twin.columns).norm()) < 2 * most
    # by its scores it takes whom the product takes, ties too
    exact, others = (index.long() for index in chosen)
    assert torch.equal(exact, top_k_mask(score, torch.tensor(twin.taken)).nonzero().flatten())
    assert len(set(exact.tolist()) | set(others.tolist())) == twin.taken + twin.coarse and (others.diff() > 0).all()
    # those are the twin's own, but for scores that are equal within rounding
    for found, expected, scores in zip((exact, others), twin.chosen(x), (exact_score, rough_score), strict=True):
        differ = torch.zeros(len(scores), dtype=torch.bool).index_fill(0, found, True) ^ expected
        if differ.any():
            least = scores[expected].min()
            near = 2 * most * max(scores.max(), (beside.square() * twin.columns).max())
            assert ((scores[differ] - least).abs() <= near).all()
            break  # the others are chosen among those that are left
    assert apart(out, twin.write(x, exact, others), size(x, *twin.values)) < most
