"""Tables of densities by layer: those that DART's public code ships, and files of `trace --save-allocation`."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

from dart_eval.util.errors import UserError, nearest
from dart_eval.util.files import check_name, read_text, write

SHIPPED = Path(__file__).parents[1] / "data" / "keep-tables.json"
TOLERANCE = 0.005  # of the mean density: published tables are rounded to four digits


def find(name: str) -> tuple[list[float], list[int] | None]:
    """Return the densities of a table, [L], and the neurons of the layers that it was made for; None: all alike.

    Args:
        name: of a file or of a shipped table.

    Raises:
        UserError: there is none, or both.
    """
    if not name:
        raise UserError("allocation=table needs a file", "for example allocation=table:FILE")
    check_name(name, "allocation table")
    shipped, is_file = shipped_tables().get(name), Path(name).is_file()
    if shipped and is_file:
        raise UserError(
            f"{name} is a shipped allocation table, and a file in this folder",
            f"write ./{name} for the file, or rename it to take the shipped table",
        )
    if not shipped and not is_file:
        known = nearest(name, shipped_tables())
        remedy = "write one with `dart-eval trace --save-allocation FILE`"
        raise UserError(f"allocation table {name} is not a file", known or remedy)
    return (shipped, None) if shipped else read_table(name)


def content(name: str) -> bytes:
    """Return the content of a table, which can change numbers."""
    shipped = shipped_tables().get(name)
    return json.dumps(shipped).encode() if shipped else Path(name).read_bytes()


def check(name: str, sparsity: float, sizes: Sequence[int] | None = None) -> None:
    """Refuse a table for another sparsity or, if the neurons of the model's layers are known, for another model.

    Args:
        name: of a file or of a shipped table.
        sizes: [L] neurons of the model's layers; None: not known yet.
    """
    densities, own = find(name)
    if sizes is not None and len(densities) != len(sizes):
        raise UserError(
            f"the allocation table has {len(densities)} layers, the model {len(sizes)}", "make one for this model"
        )
    weights = sizes or own or [1] * len(densities)
    mean = sum(r * n for r, n in zip(densities, weights, strict=True)) / sum(weights)
    if abs(mean - (1 - sparsity)) > TOLERANCE:
        raise UserError(
            f"the allocation table keeps {mean:.3f} of the neurons, sparsity {sparsity:g} keeps {1 - sparsity:.3f}",
            f"run it at --sparsity {1 - mean:.3g}, or make a table for {sparsity:g}",
        )


@functools.cache
def shipped_tables() -> dict[str, list[float]]:
    """Return the tables that DART's public code ships, by name: model, sparsity in per cent, and ablation."""
    tables = json.loads(SHIPPED.read_text(encoding="utf-8"))["tables"]
    return {name: table["keep"] for name, table in tables.items()}


def read_table(path: str | Path) -> tuple[list[float], list[int] | None]:
    """Read the densities of a saved allocation (`write_table`), [L], and the neurons of its layers if it has them.

    Raises:
        UserError: the file cannot be read or holds no ratios.
    """
    remedy = "write one with `dart-eval trace --save-allocation FILE`"
    try:
        data = json.loads(read_text(path, "allocation table", remedy))
    except (ValueError, RecursionError) as error:
        raise UserError(f"allocation table {path} cannot be read ({error})", remedy) from None
    ratios = data.get("keep") if isinstance(data, dict) else None
    if not (isinstance(ratios, list) and ratios and all(isinstance(r, (int, float)) and 0 <= r <= 1 for r in ratios)):
        raise UserError(f"{path} is no allocation table: it needs `keep`, a list of ratios in [0, 1]", remedy)
    sizes = data.get("sizes")
    if sizes is not None and not (
        isinstance(sizes, list) and len(sizes) == len(ratios) and all(isinstance(n, int) and n > 0 for n in sizes)
    ):
        raise UserError(f"{path} is no allocation table: its `sizes` are not the neurons of its layers", remedy)
    return [float(r) for r in ratios], sizes


def write_table(path: str | Path, ratios: Sequence[float], **about: object) -> None:
    """Save densities and their origin, for `allocation=table:FILE`.

    Layers of different sizes need `sizes=`, their neurons: the densities' mean is over neurons.
    """
    text = json.dumps({**about, "keep": [round(float(r), 6) for r in ratios]}, indent=1) + "\n"
    write(path, text)
