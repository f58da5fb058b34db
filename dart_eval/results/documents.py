"""The documents of a cell as a data frame: what `dart_eval.samples` shows, and what all paired tests are made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

INDEX = ["task", "doc_id", "filter"]
TOLD = ("doc_hash", "prompt_hash", "cluster")  # columns that stand there even where there are no documents
APART = ("metrics", "drift", "kl_bins")  # of a sample: what has columns of its own, and what no table shows


def frame(samples: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """One row a document and filter, in the order of the index, a column a metric.

    Values stay as the file has them: NaN is NaN, and None stands where a document has no value for a metric. Of two
    lines on one document the last counts.

    Args:
        samples: lines of a cell's samples (`layout.Sample`).
    """
    import pandas as pd

    rows = {}
    for sample in samples:
        told = {k: v for k, v in sample.items() if k not in APART}
        rows[tuple(sample[k] for k in INDEX)] = {**told, **sample["metrics"], **told}  # no metric hides a hash
    columns = dict.fromkeys((*INDEX, *TOLD, *(name for row in rows.values() for name in row)))
    ordered = sorted(rows)
    return pd.DataFrame(
        {name: pd.Series([rows[key].get(name) for key in ordered], dtype=object) for name in columns}
    ).set_index(INDEX)
