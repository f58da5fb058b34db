"""What a rounding loses on FFN weights: on a model's own, and on random ones.

    python scripts/format_errors.py FOLDER [FOLDER ...]

A folder has model.safetensors. Random weights have the size of the model's in each row. Errors are squared, in percent
of the squared weights.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributions import Laplace, StudentT

from dart_eval.util.bits import parse
from dart_eval.weights.rounding import rounded

WEIGHTS = "model.safetensors"
FFN = re.compile(r"layers?\.(\d+)\.(?:mlp\.(gate|up|down)_proj|(?:intermediate|output)\.dense)\.weight$")
FORMATS = ("8:row", "8:128", "6:128", "5:128", "4:128", "3:128", "8", "6", "5", "4", "3", "2", "q5_k", "q4_k", "q3_k")
FIRST = {"8:128": (6, 5, 4, 3, 2), "6:128": (4, 3), "5:128": (3, 2)}  # first bits that methods read of codes
SORTS: dict[str, tuple[Callable[[torch.Size], Tensor], float]] = {  # random weights, and their standard deviation
    "Gaussian": (torch.randn, 1.0),
    "Laplace": (Laplace(0.0, 1.0).sample, 2**0.5),
    "Student's t, 5": (StudentT(5.0).sample, (5 / 3) ** 0.5),
}


def matrices(folder: Path) -> Iterator[Tensor]:
    """Yield the FFN weights of a model, [out, in] fp32."""
    with safe_open(folder / WEIGHTS, framework="pt") as opened:
        for name in sorted(opened.keys()):
            if FFN.search(name):
                yield opened.get_tensor(name).float()


def lost(weight: Tensor) -> Iterator[tuple[str, float]]:
    """Yield each format with the squared error of the weights [out, in] in it, and "" with their squares."""
    yield "", float(weight.square().sum())
    for text in FORMATS:
        packed = rounded(weight, parse(text))  # type: ignore[arg-type]
        for first in (None, *FIRST.get(text, ())):
            error = (packed.decoded(torch.float32, first) - weight).square().sum()
            yield text if first is None else f"first {first} of {text}", float(error)


def measure(folder: Path, rows: int) -> dict[str, dict[str, float]]:
    """Return sort of weights -> format -> error. rows: of a matrix, evenly spaced."""
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for whole in matrices(folder):
        weight = whole[:: max(1, len(whole) // rows)]
        made = {"own": weight}
        made |= {sort: draw(weight.shape) * weight.std(1, keepdim=True) / std for sort, (draw, std) in SORTS.items()}
        for sort, weights in made.items():
            for label, error in lost(weights.bfloat16().float()):
                sums[sort][label] += error
    return {sort: {label: e / of[""] for label, e in of.items() if label} for sort, of in sums.items()}


def table(sorts: dict[str, dict[str, float]]) -> str:
    """Return a table in Markdown, with a factor between two errors of one format."""
    lines = [f"| format | {' | '.join(sorts)} | Gaussian / own |", "|---" * (len(sorts) + 2) + "|"]
    for label, own in sorts["own"].items():
        cells = [f"{100 * errors[label]:.3g}" for errors in sorts.values()]
        cells.append(f"{sorts['Gaussian'][label] / own:.3g}" if own else "-")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--rows", type=int, default=64, help="rows of a matrix that are measured (64)")
    options = parser.parse_args()
    torch.manual_seed(0)
    for folder in options.folders:
        print(f"{folder.name}\n\n{table(measure(folder, options.rows))}\n", flush=True)
