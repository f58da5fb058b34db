"""The documents of a cell as a data frame, for `dart_eval.samples` and all paired tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from dart_eval.util.text import Json

if TYPE_CHECKING:
    import pandas as pd

INDEX = ["task", "doc_id", "filter"]
BASIC = ("doc_hash", "prompt_hash", "cluster")  # columns of every frame, even without documents
APART = ("metrics", "drift", "kl_bins")  # fields of a sample that are not columns


def frame(samples: Iterable[Json]) -> pd.DataFrame:
    """Return one row per document and filter, in the order of the index, and a column per metric.

    Values stay as in the file: NaN is NaN, and None means that a document has no value for a metric. Of two lines on
    one document the last counts.

    Args:
        samples: lines of a cell's samples (`layout.Sample`).
    """
    import pandas as pd

    rows = {}
    for sample in samples:
        own = {k: v for k, v in sample.items() if k not in APART}
        rows[tuple(sample[k] for k in INDEX)] = {**own, **sample["metrics"], **own}  # no metric hides a hash
    columns = dict.fromkeys((*INDEX, *BASIC, *(name for row in rows.values() for name in row)))
    ordered = sorted(rows)
    return pd.DataFrame(
        {name: pd.Series([rows[key].get(name) for key in ordered], dtype=object) for name in columns}
    ).set_index(INDEX)
