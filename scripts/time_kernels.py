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
from dart_eval.kernels.cpu.ffns import CodedFFN, GradedFFN
from dart_eval.kernels.cpu.rows import RowsProduct
from dart_eval.kernels.products import product
from dart_eval.util.bits import Rounding
from dart_eval.weights.codes import Packed

READ = 0.30
Runs = dict[str, tuple[Callable[[Tensor], Any], float]]


def codes(rows: int, width: int, rounding: Rounding) -> Packed:
    """Of random numbers: what they are takes no part in what a product takes."""
    half, groups = 2 ** (rounding.bits - 1), -(-width // (rounding.group or width))
    made = (torch.randn(rows, width) * half / 3.5).round().clamp(-half, half - 1).to(torch.int8)
    return Packed(made, torch.rand(rows, groups).mul(0.1 / half).add(0.05 / half).half(), rounding)


def columns(neurons: int, run: int) -> Tensor:
    """[F], by which the neurons that dart-plus takes lie in runs of so many neighbours."""
    order = torch.randperm(-(-neurons // run)).repeat_interleave(run)[:neurons]
    return 10.0 ** (-60.0 * order / order.max()) if run > 1 else torch.rand(neurons)


def layer(width: int, neurons: int, level: str | None, run: int) -> Runs:
    """What is timed, with the share of the bytes that it reads."""
    held = packing.empty((neurons, width), (neurons, width), (width, neurons), dtype=torch.bfloat16)
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
        if rounding == Rounding(4, 128):
            g, u, d = (product(m, None, torch.bfloat16) for m in matrices)
            packed: Any = lambda x, g=g, u=u, d=d: d(silu(g(x)) * u(x))  # noqa: E731
            runs["torch int4pack"] = packed, coded.bytes_read / whole
        if rounding.bits in (6, 8):
            first, ffn = (
                GradedFFN(*matrices, torch.rand(2, neurons) * 0.004, columns(neurons, run), 1, 1, level=level)
                for _ in range(2)
            )
            one = ffn.bytes_read
            for each in (first, ffn):
                each.grade(0, 0)
            runs[f"dart-plus {text}, first bits alone"] = first, first.bytes_read / whole
            count = int((READ * whole - ffn.bytes_read) / (one - ffn.bytes_read))  # as many exactly as coarsely
            ffn.grade(count, count)
            runs[f"dart-plus {text}"] = ffn, ffn.bytes_read / whole
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for option, value in (("--width", 2048), ("--neurons", 8192), ("--rounds", 12)):
        parser.add_argument(option, type=int, default=value)
    parser.add_argument("--level", choices=("avx2", "avx512"))
    parser.add_argument("--only", default="", help="begins of names, by commas")
    parser.add_argument("--run", type=int, default=1, help="neighbours that dart-plus takes together")
    given = parser.parse_args()
    layers = [layer(given.width, given.neurons, given.level, given.run) for _ in range(2)]
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
