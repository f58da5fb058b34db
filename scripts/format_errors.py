"""What a rounding loses on FFN weights: on a model's own, on the same off the grid of its file, and on random ones.

    python scripts/format_errors.py FOLDER [FOLDER ...]        tables for each model, by type in the file
    python scripts/format_errors.py FOLDER --fill TARGET       write the model with the grid filled in

A folder has model.safetensors; a converted GGUF file has its codes beside it. A code stands for an interval of weights,
one step wide. "Filled in" takes a random weight of that interval, so that no weight is on the file's grid. Random
weights have the size of the model's in each row. Errors are squared, in percent of the squared weights.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributions import Laplace, StudentT

from dart_eval.util.bits import Rounding, parse
from dart_eval.weights import codes, gguf, gguf_codes
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


def matrices(folder: Path) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """Yield name, type in the file, weights [out, in] fp32, and the step between codes at each weight; 0 without."""
    kinds = folder / gguf.KINDS
    types = json.loads(kinds.read_text(encoding="utf-8")) if kinds.is_file() else {}
    stored = load_file(folder / gguf.CODES) if types else {}
    with safe_open(folder / WEIGHTS, framework="pt") as opened:
        for name, match in {key: found for key in sorted(opened.keys()) if (found := FFN.search(key))}.items():
            (layer, side), weight = match.groups(), opened.get_tensor(name).float()
            kind, step = "all", torch.zeros_like(weight)
            if types:
                kind = types[layer][side][1]
                bits, group, unsigned = gguf_codes.GRIDS[kind]
                packed = codes.fitted(stored[f"{layer}.{side}"], weight, Rounding(bits, group), unsigned)
                assert packed is not None, f"{name}: the codes beside it are of other weights"
                step = packed.scales.abs().repeat_interleave(group, 1)[:, : weight.shape[1]]
            yield name, kind, weight, step


def filled(weight: Tensor, step: Tensor) -> Tensor:
    return weight + (torch.rand(weight.shape) - 0.5) * step


def lost(weight: Tensor) -> Iterator[tuple[str, float]]:
    """Yield each format with the squared error of the weights [out, in] in it, and "" with their squares."""
    yield "", float(weight.square().sum())
    for text in FORMATS:
        packed = rounded(weight, parse(text))  # type: ignore[arg-type]
        for first in (None, *FIRST.get(text, ())):
            error = (packed.decoded(torch.float32, first) - weight).square().sum()
            yield text if first is None else f"first {first} of {text}", float(error)


def measure(folder: Path, rows: int) -> dict[str, dict[str, dict[str, float]]]:
    """Return type in the file, or "all" -> sort of weights -> format -> error. rows: of a matrix, evenly spaced."""
    sums: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(float)))
    for _, kind, whole, step in matrices(folder):
        few = slice(None, None, max(1, len(whole) // rows))
        weight = whole[few]
        made = {"own": weight, "filled in": filled(weight, step[few])}
        made |= {sort: draw(weight.shape) * weight.std(1, keepdim=True) / std for sort, (draw, std) in SORTS.items()}
        for sort, weights in made.items():
            for label, error in lost(weights.bfloat16().float()):
                for key in {kind, "all"}:
                    sums[key][sort][label] += error
    return {key: {sort: {label: e / errors[""] for label, e in errors.items() if label}
                  for sort, errors in sorts.items()} for key, sorts in sums.items()}  # fmt: skip


def table(sorts: dict[str, dict[str, float]]) -> str:
    """Return a table in Markdown, with two factors between the errors of one format."""
    lines = [f"| format | {' | '.join(sorts)} | filled in / own | Gaussian / own |", "|---" * (len(sorts) + 3) + "|"]
    for label, own in sorts["own"].items():
        cells = [f"{100 * errors[label]:.3g}" for errors in sorts.values()]
        cells += [f"{sorts[sort][label] / own:.3g}" if own else "-" for sort in ("filled in", "Gaussian")]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def fill(folder: Path, target: Path) -> None:
    """Write a model whose FFN weights are those of `folder` with the grid of its file filled in."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(WEIGHTS, gguf.CODES, gguf.KINDS))
    weights = load_file(folder / WEIGHTS) | {name: filled(w, step) for name, _, w, step in matrices(folder)}
    save_file(weights, target / WEIGHTS, metadata={"format": "pt"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--rows", type=int, default=64, help="rows of a matrix that are measured (64)")
    parser.add_argument("--fill", type=Path, metavar="TARGET", help="write the first model, filled in")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.fill:
        fill(options.folders.pop(0), options.fill)
    for folder in options.folders:
        for kind, sorts in measure(folder, options.rows).items():
            print(f"{folder.name}, {kind}\n\n{table(sorts)}\n", flush=True)
