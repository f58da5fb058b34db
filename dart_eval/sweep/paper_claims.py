"""The claims that a paper's file tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dart_eval.pruning.registry import check_sparsity, make, parse
from dart_eval.results import metrics
from dart_eval.results.claims import ANY, SHAPED, Claim
from dart_eval.results.paper_layout import TableLayout
from dart_eval.util.errors import UserError, nearest
from dart_eval.util.text import Json
from dart_eval.util.yamls import known

SEE = "see docs/paper.md"
LONGEST = 1 << 20  # tokens of a prompt whose cost is counted
KEYS = (
    "claim", "source", "table", "column", "metric", "sparsity", "rows", "by", "times", "at_most", "shape", "method",
    "prompt",
)  # fmt: skip


def claims_of(given: Sequence[Any], layouts: Sequence[TableLayout]) -> tuple[Claim, ...]:
    """Return the claims of a file.

    Args:
        given: a list of mappings.
        layouts: the tables that claims may name.

    Raises:
        UserError: something in it is not understood, or names no row or column.
    """
    tables = {layout.name: layout for layout in layouts}
    found = (_claim(known(one, KEYS, "a claim", SEE), tables) for one in given)
    return tuple(claim for claim in found if claim is not None)


def _claim(one: dict[str, Any], tables: dict[str, TableLayout]) -> Claim | None:
    """Return a claim; None if it is about a row of another model."""
    text = str(one.get("claim") or "")
    numbers: Json = {key: float(one[key]) for key in ("by", "times", "at_most", "sparsity") if key in one}
    if not all(map(math.isfinite, numbers.values())) or {"by", "times"} <= numbers.keys():
        raise UserError(f"claim {text!r} needs finite numbers, and only one of `by` and `times`", SEE)
    if not text or (one.get("shape") is None) == (one.get("table") is None):
        raise UserError(f"claim {text!r} needs a text, and either a table or a shape", SEE)
    if one.get("shape") is not None:
        named: Json = {key: str(one[key]) for key in ("shape", "method", "column")}
        if not {"at_most", "sparsity"} <= numbers.keys():
            raise UserError(f"claim {text!r} needs a sparsity and at_most", SEE)
        if named["column"] not in SHAPED:
            raise UserError(f"claim {text!r}: unknown cost {named['column']!r}", nearest(named["column"], SHAPED))
        check_sparsity(numbers["sparsity"])
        if not 1 <= (prompt := int(one.get("prompt", 1024))) <= LONGEST:
            raise UserError(f"claim {text!r}: a prompt has 1 to {LONGEST:,} tokens, not {prompt}")
        make(*parse(named["method"]))
        return Claim(text, str(one.get("source", "")), prompt=prompt, **named, **numbers)
    layout = tables.get(str(one["table"]))
    if layout is None:
        raise UserError(f"claim {text!r}: unknown table {one['table']!r}", nearest(str(one["table"]), tables))
    rows, column = [str(r) for r in one.get("rows") or ()], str(one.get("column"))
    if set(rows) & set(layout.absent):
        return None
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
    metric = str(one.get("metric", ""))
    meant = [c for c in layout.parts.get(column, layout.columns) if column != ANY or c.metric == (metric or c.metric)]
    kinds = {metrics.kind_of(c.metric).kind for c in meant if c.metric}
    if "times" in numbers and kinds & {"log-perplexity", "bits"}:
        raise UserError(f"claim {text!r}: `times` is not for perplexities", "give `by`, in nats")
    several = {c.metric for c in layout.columns if c.metric}
    if column == ANY and (metric not in several if metric else len(several) > 1):
        raise UserError(f"claim {text!r}: `any` needs columns of one metric", f"give metric: {' or '.join(several)}")
    return Claim(
        text, str(one.get("source", "")), table=layout.name, column=column, metric=metric, rows=tuple(rows), **numbers
    )
