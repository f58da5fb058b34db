"""Time the kernels for CPUs on one FFN, beside torch's own products: CPU time of one thread, in interleaved rounds.

    OMP_NUM_THREADS=1 python scripts/time_kernels.py [--width 2048 --neurons 8192 --rounds 12]

Ratios are medians over rounds, with quartiles. Two layers take turns, so that nothing is found in a cache.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from dart_eval.kernels.cpu import packing
from dart_eval.kernels.cpu.ffns import CodedFFN
from dart_eval.kernels.mask_rows import RowsProduct
from dart_eval.util.bits import Rounding
from dart_eval.weights.codes import Packed

READ = 0.30
Runs = dict[str, tuple[Callable[[Tensor], Any], float]]


def codes(rows: int, width: int, rounding: Rounding) -> Packed:
    """Of random numbers: what they are takes no part in what a product takes."""
    half, groups = 2 ** (rounding.bits - 1), -(-width // (rounding.group or width))
    made = (torch.randn(rows, width) * half / 3.5).round().clamp(-half, half - 1).to(torch.int8)
    return Packed(made, torch.rand(rows, groups).mul(0.1 / half).add(0.05 / half).half(), rounding)


def layer(width: int, neurons: int, level: str | None) -> Runs:
    """What is timed, with the share of the bytes that it reads."""
    held = packing.allocate((neurons, width), (neurons, width), (width, neurons), dtype=torch.bfloat16)
    gate, up, down = (w.copy_(torch.randn(w.shape) * 0.02) for w in held)
    kept = int(READ * neurons)
    narrow, whole = down[:, :kept].contiguous(), 6 * neurons * width

    def ours(*matrices: Tensor) -> Callable[[Tensor], Tensor]:
        g, u, d = (RowsProduct(m, None, level) for m in matrices)
        return lambda x: d(silu(g(x)) * u(x))

    runs: Runs = {
        "torch": (lambda x: linear(silu(linear(x, gate)) * linear(x, up), down), 1),
        "dense": (ours(gate, up, down), 1),
        "torch, one mask": (lambda x: linear(silu(linear(x, gate[:kept])) * linear(x, up[:kept]), narrow), READ),
        "one mask": (ours(gate[:kept], up[:kept], narrow), READ),
    }
    for text, rounding in ((f"{b}:{g or 'row'}", Rounding(b, g)) for b in (4, 5, 6, 8) for g in (128, 0)):
        matrices = codes(neurons, width, rounding), codes(neurons, width, rounding), codes(width, neurons, rounding)
        coded = CodedFFN(*matrices, level=level)
        runs[f"coded {text}"] = coded, coded.bytes_read / whole
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for option, value in (("--width", 2048), ("--neurons", 8192), ("--rounds", 12)):
        parser.add_argument(option, type=int, default=value)
    parser.add_argument("--level", choices=("avx2", "avx512"))
    parser.add_argument("--only", default="", help="begins of names, by commas")
    given = parser.parse_args()
    layers = [layer(given.width, given.neurons, given.level) for _ in range(2)]
    names = [n for n in layers[0] if n in ("torch", "dense") or n.startswith(tuple(given.only.split(",")))]
    x, times = torch.randn(1, given.width).bfloat16(), {name: np.zeros(given.rounds) for name in names}
    for turn in range(-1, given.rounds):
        for i, name in enumerate(names[turn % len(names) :] + names[: turn % len(names)]):
            begin = time.thread_time()
            layers[(turn + i) % 2][name][0](x)
            times[name][turn] = time.thread_time() - begin
    print("| what | read | ms | GB/s | x torch | x dense |\n|---|---|---|---|---|---|")
    for name in names:
        share, ms = layers[0][name][1], 1e3 * float(np.median(times[name]))
        speed = share * 6 * given.width * given.neurons / ms / 1e6
        three = [np.percentile(times[of] / times[name], (50, 25, 75)) for of in ("torch", "dense")]
        gains = " | ".join("{:.2f} [{:.2f}, {:.2f}]".format(*of) for of in three)
        print(f"| {name} | {share:.3f} | {ms:.2f} | {speed:.1f} | {gains} |")


if __name__ == "__main__":
    main()
