"""Tables of densities by layer: those that DART's public code ships, and a user's files."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, PositiveInt, ValidationError

from dart_eval.util.errors import UserError, nearest
from dart_eval.util.files import read_text

SHIPPED = Path(__file__).parents[1] / "data" / "keep-tables.json"
TOLERANCE = 0.005  # of the mean density: published tables are rounded to four digits
REMEDY = 'give a JSON file such as {"keep": [0.6, 0.4]}, with the share of neurons that each layer keeps'


class Table(BaseModel):
    """A file's densities by layer, and the neurons of these layers."""

    keep: list[Annotated[float, Field(ge=0, le=1)]] = Field(min_length=1)
    sizes: list[PositiveInt] | None = None


def find(name: str) -> tuple[list[float], list[int] | None]:
    """Return the densities of a table, [L], and the neurons of the layers that it was made for; None: all alike.

    Args:
        name: of a shipped table, or of a file; `./NAME` is a file of the same name.

    Raises:
        UserError: there is none.
    """
    if not name:
        raise UserError("allocation=table needs a file", "for example allocation=table:FILE")
    if shipped := shipped_tables().get(name):
        return shipped, None
    if not os.path.isfile(name):
        raise UserError(f"allocation table {name} is not a file", nearest(name, shipped_tables()) or REMEDY)
    return read_table(name)


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
    """Read the densities of a user's table, [L], and the neurons of its layers if it has them.

    Raises:
        UserError: the file cannot be read or holds no ratios.
    """
    try:
        table = Table.model_validate_json(read_text(path, "allocation table", REMEDY), strict=True)
    except ValidationError as error:
        why = f"`keep` is a list of ratios in [0, 1], `sizes` the neurons of its layers: {error.errors()[0]['msg']}"
        raise UserError(f"{path} is no allocation table ({why})", REMEDY) from None
    if table.sizes is not None and len(table.sizes) != len(table.keep):
        raise UserError(f"{path} is no allocation table: `sizes` are not the neurons of its layers", REMEDY)
    return table.keep, table.sizes
