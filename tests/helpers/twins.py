"""FFNs of codes, as twins of the kernels: the product's own formulas, in double precision."""

import torch
from hypothesis import strategies as st
from torch.nn.functional import gelu, linear, relu, silu

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
