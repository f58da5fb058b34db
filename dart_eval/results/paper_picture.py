"""The picture of a paper's table: its first column, or its mean, over the sparsities."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dart_eval.results import metrics
from dart_eval.results.inputs import DENSE
from dart_eval.results.paper_layout import MEAN, TableLayout

if TYPE_CHECKING:
    import pandas as pd

NORMAL = 1.96  # standard errors of half an interval


def picture(layout: TableLayout, numbers: pd.DataFrame) -> bytes | None:
    """Return the picture as SVG; None if no pruned row was measured.

    Args:
        numbers: of the table, one a row.
    """
    from dart_eval.results.report import charts

    head = MEAN if layout.mean else layout.columns[0].head
    shown = numbers[(numbers["column"] == head) & np.isfinite(numbers["value"])]
    if shown.empty:
        return None
    scale = 100.0 if metrics.kind_of(str(shown["metric"].iloc[0])).percent else 1.0

    def points(rows: pd.DataFrame) -> list[charts.Point]:
        found = []
        for row in rows.itertuples():
            half = 0.0 if row.stderr != row.stderr else NORMAL * row.stderr
            ends = (scale * v for v in (row.value, row.value - half, row.value + half))
            found.append(charts.Point(1 - row.sparsity, *ends))
        return found

    of_label = shown[shown["prunes"]].groupby("row", sort=False)
    pruned = {str(label): points(rows.sort_values("sparsity")) for label, rows in of_label}
    if not pruned:
        return None
    unrounded = [row.label for row in layout.rows if row.method == DENSE and not row.asked.get("ffn_bits")]
    dense = points(shown[(shown["block"] == 0) & shown["row"].isin(unrounded)])
    chance = shown["chance"][shown["chance"] > 0]  # 0 stands for a metric without a level of guessing
    chart = charts.against_read(
        head, f"{metrics.title_of(str(shown['metric'].iloc[0]))}, 95 % intervals", pruned,
        {label: i for i, label in enumerate(pruned)}, dense[:1], scale * float(chance.iloc[0]) if len(chance) else None,
    )  # fmt: skip
    return charts.drawn(chart, layout.title, "svg")
