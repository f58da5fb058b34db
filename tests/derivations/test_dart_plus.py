"""dart-plus (this project's own), token by token and neuron by neuron.

A decoded token x reads, of every row of gate and up, the image at the columns of its largest |x_i| (half of them): that
gives g and u, the preview p = act(g) u, and with e = ||x|| times what the image leaves out of a row (root mean square)

    E = (act(g + e_g)^2 + act(g - e_g)^2) / 2 * (u^2 + e_u^2)            what h^2 is to be expected

With n^2 the square of the norm of the neuron's column of down, the largest (E - p^2 + 0.2 p^2) n^2 are read exactly (8
bits of each weight): their own h goes through their own column. Of the others the largest E n^2 write p through the
image of their column. A plain FFN has up alone, and E its first factor. Doubts and norms are kept in 16 bits.
"""

import numpy as np
import pytest
import torch

from dart_eval.ffn import find_ffns
from dart_eval.pruning.parts.images import Plane
from dart_eval.pruning.planes import truncated
from dart_eval.rounding import Served
from tests.helpers.models import biased, random_tokens, tiny
from tests.helpers.sessions import generate, open_session

LAYER = 1
ACTS = {
    "llama": lambda z: z / (1 + np.exp(-z)),
    "gemma3": lambda z: 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))),
    "opt": lambda z: np.maximum(z, 0),
}


def bits_by_hand(ffn, read, others):
    """Bits of a gated FFN that one token reads. An exponent 7 or more below its row's largest takes 8 more."""
    gate, up, down = (m.weight.detach().bfloat16() for m in (ffn.gate, ffn.up, ffn.down))
    neurons, width = gate.shape
    exponents = [((w.view(torch.int16).int() >> 7) & 0xFF).numpy() for w in (gate, up, down)]
    escaped = [8 * (e.max(1, keepdims=True) - e >= 7) for e in exponents]
    thin = width // 2
    previews = 2 * neurons * (5 * thin + 8 + 16) + 16 * neurons  # the row's largest exponent, doubts; norms of columns
    rows = sum((5 * (width - thin) + 3 * width) * len(read) + e[read].sum() for e in escaped[:2])
    columns = 8 * width * len(read) + escaped[2][:, read].sum() + 5 * width * len(others)
    return previews + rows + columns + 8 * width, escaped  # the last are the largest exponents of down's rows


def kept16(values):
    return values.astype(np.float16).astype(np.float64)


def by_hand(ffn, act, x, taken, written):
    """What one token's FFN adds, [D], without down's bias; the neurons read exactly, and those that write so too."""
    modules = [m for m in (ffn.gate, ffn.up) if m is not None]
    weights = [m.weight.detach() for m in modules]
    biases = [0.0 if m.bias is None else m.bias.detach().double().numpy() for m in modules]
    down = ffn.down.weight.detach()
    image = [Plane().values(Served(w)).double().numpy() for w in (*weights, down)]
    fine = [truncated(w, 4).double().numpy() for w in (*weights, down)]  # a sign, 3 bits of the exponent, 4 below
    own = [w.double().numpy() for w in (*weights, down)]
    few = np.zeros_like(x)
    best = np.argsort(-np.abs(x))[: len(x) // 2]
    few[best] = x[best]
    seen = [i @ few + b for i, b in zip(image, biases, strict=False)]
    off = [np.linalg.norm(few) * kept16(np.sqrt(((w - i) ** 2).mean(1))) for w, i in zip(own, image, strict=False)]
    expected = (act(seen[0] + off[0]) ** 2 + act(seen[0] - off[0]) ** 2) / 2
    preview, exact = act(seen[0]), act(fine[0] @ x + biases[0])
    if len(modules) == 2:
        expected, preview = expected * (seen[1] ** 2 + off[1] ** 2), preview * seen[1]
        exact = exact * (fine[1] @ x + biases[1])
    norms = kept16(np.linalg.norm(own[-1], axis=0)) ** 2
    order = np.argsort(-np.maximum(expected - 0.8 * preview**2, 0) * norms, kind="stable")
    read, others = order[:taken], order[taken:]
    others = others[np.argsort(-(expected * norms)[others], kind="stable")][: written - taken]
    return fine[-1][:, read] @ exact[read] + image[-1][:, others] @ preview[others], read, others


@pytest.mark.parametrize("family", ACTS)
def test_a_token_reads_more_bits_of_what_matters_more(family):
    model = biased(family) if family != "gemma3" else tiny(family)
    model.bfloat16().float()  # weights of 16 bits, multiplied in more
    seen, ffn = {}, find_ffns(model)[LAYER]
    bias = 0.0 if ffn.down.bias is None else ffn.down.bias.detach().numpy()
    hooks = [
        ffn.block.register_forward_pre_hook(lambda _m, args: seen.update(x=args[0].detach().flatten())),
        ffn.down.register_forward_hook(lambda _m, _a, out: seen.update(out=out.detach().flatten())),
    ]
    with open_session(model, "dart-plus", 0.7, execution="masked") as session:
        # What stands in for the image of down is added behind the hooks of the session: ours come after these.
        hooks[1].remove()
        hooks[1] = ffn.down.register_forward_hook(lambda _m, _a, out: seen.update(out=out.detach().flatten()))
        generate(model, torch.tensor([random_tokens(14)]), 4)
        taken, written = int(session.state.taken[0, LAYER]), int(session.state.written[0, LAYER])
    for hook in hooks:
        hook.remove()
    assert 0 < taken < written < ffn.size
    wanted, read, others = by_hand(ffn, ACTS[family], seen["x"].double().numpy(), taken, written)
    wanted = wanted + bias
    if family == "llama":
        bits, escaped = bits_by_hand(ffn, read, others)
        # Counts go by mean rows, and of down's largest exponents count those of the columns that write so alone.
        more = sum(e[read].sum() - e.mean() * read.size * ffn.width for e in (*escaped[:2], escaped[2].T))
        more += 8 * ffn.width * (1 - len(others) / ffn.size)
        told = session.state.prepared.paid[LAYER] @ torch.tensor([ffn.size, ffn.size, taken, written]).double()
        assert float(told) * 16 * ffn.width == pytest.approx(bits - more)
    assert np.allclose(seen["out"].numpy(), wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())
