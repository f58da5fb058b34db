"""The claims that a paper's file tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dart_eval.results import metrics
from dart_eval.results.claims import ANY, Claim
from dart_eval.results.paper_layout import TableLayout
from dart_eval.util.errors import UserError, nearest
from dart_eval.util.text import Json
from dart_eval.util.yamls import known

SEE = "see docs/paper.md"
KEYS = ("claim", "source", "table", "column", "sparsity", "rows", "by", "times", "at_most", "shape", "method", "prompt")


def claims_of(given: Sequence[Any], layouts: Sequence[TableLayout]) -> tuple[Claim, ...]:
    """Return the claims of a file.

    Args:
        given: a list of mappings.
        layouts: the tables that claims may name.

    Raises:
        UserError: something in it is not understood, or names no row or column.
    """
    return tuple(_claim(known(one, KEYS, "a claim", SEE), {layout.name: layout for layout in layouts}) for one in given)


def _claim(one: dict[str, Any], tables: dict[str, TableLayout]) -> Claim:
    text = str(one.get("claim") or "")
    numbers: Json = {key: float(one[key]) for key in ("by", "times", "at_most", "sparsity") if key in one}
    if not text or (one.get("shape") is None) == (one.get("table") is None):
        raise UserError(f"claim {text!r} needs a text, and either a table or a shape", SEE)
    if one.get("shape") is not None:
        named: Json = {key: str(one[key]) for key in ("shape", "method", "column")}
        if not {"at_most", "sparsity"} <= numbers.keys():
            raise UserError(f"claim {text!r} needs a sparsity and at_most", SEE)
        return Claim(text, str(one.get("source", "")), prompt=int(one.get("prompt", 1024)), **named, **numbers)
    layout = tables.get(str(one["table"]))
    if layout is None:
        raise UserError(f"claim {text!r}: unknown table {one['table']!r}", nearest(str(one["table"]), tables))
    rows, column = [str(r) for r in one.get("rows") or ()], str(one.get("column"))
    for name, among in (*((row, [r.label for r in layout.rows]) for row in rows), (column, [*layout.parts, ANY])):
        if name not in among:
            raise UserError(f"claim {text!r}: table {layout.name!r} has no {name!r}", nearest(name, among))
    if len(rows) != (1 if "at_most" in numbers else 2) or "sparsity" not in numbers:
        raise UserError(f"claim {text!r} needs a sparsity, and two rows (one with at_most)", SEE)
    if numbers["sparsity"] not in layout.sparsity:
        remedy = f"give one of {', '.join(map('{:g}'.format, layout.sparsity))}"
        raise UserError(f"claim {text!r}: table {layout.name!r} has no sparsity {numbers['sparsity']:g}", remedy)
    costs = [c.head for c in layout.columns if c.field]
    if ("at_most" in numbers) != (column in costs):
        remedy = nearest(column, costs) if "at_most" in numbers else "give at_most"
        raise UserError(f"claim {text!r}: at_most is for costs, and {column!r} does not fit", remedy)
    kinds = {metrics.kind_of(c.metric).kind for c in layout.parts.get(column, layout.columns)}
    if "times" in numbers and kinds & {"log-perplexity", "bits"}:
        raise UserError(f"claim {text!r}: `times` is not for perplexities", "give `by`, in nats")
    return Claim(text, str(one.get("source", "")), table=layout.name, column=column, rows=tuple(rows), **numbers)
