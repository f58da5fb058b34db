"""Results as data frames: one row per metric of a cell, or one row per document.

Example:
    frame = dart_eval.records("out")
    frame[frame.metric == "acc"].pivot_table("value", ["label", "sparsity"], "task")
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dart_eval.results import documents
from dart_eval.results import frame as comparisons
from dart_eval.results.labels import labels
from dart_eval.results.rows import metrics_frame, of_tasks, typed
from dart_eval.results.store import Store

if TYPE_CHECKING:
    import pandas as pd


def records(folder: str | Path, subtasks: bool = False) -> pd.DataFrame:
    """Every metric of every finished cell, with what the cell was asked, what it read and what it cost.

    The columns are those of `dart-eval tables --format csv`, which is made of the same rows.

    Args:
        folder: that `dart-eval run --output` wrote.
        subtasks: also the members of groups, mmlu's subjects for example.

    Returns:
        One row a metric: `model`, `label`, `method`, `params`, `sparsity`, `task`, `metric`, `value`, `stderr`, `n` ...
        and beside dense on the same documents `dense`, `chance`, `recovery`, `difference`, `p`, `p_holm` ...

    Raises:
        UserError: there are no results in the folder.
    """
    store = Store(Path(folder).expanduser())
    return metrics_frame(comparisons.lines(store, store.load(), subtasks))


def samples(folder: str | Path, task: str | None = None) -> pd.DataFrame:
    """Every document of every finished cell, with the values of its metrics.

    Two cells that were asked the same share `doc_hash` and `prompt_hash`: merge on `task`, `doc_id` and `filter`, and
    compare pairs.

    Args:
        folder: that `dart-eval run --output` wrote.
        task: of this task's cells alone.

    Returns:
        One row a document and filter: `model`, `label`, `method`, `sparsity`, `task`, `doc_id`, `filter`, a column for
        each metric (a perplexity's holds log-likelihood and words), `tokens`, `remasks`, `effective_sparsity`,
        `responses`, `doc_hash`, `prompt_hash`, `cluster` and the cell's `key`.

    Raises:
        UserError: there are no results in the folder, or a cell's samples are missing or damaged.
    """
    import pandas as pd

    store = Store(Path(folder).expanduser())
    records = store.load()
    names = labels(records)
    made = []
    for record in of_tasks(records, None if task is None else [task], {}):
        found = documents.documents(store.samples(record))
        index = {name: [key[i] for key in found.index] for i, name in enumerate(documents.INDEX)}
        columns = {name: pd.Series(values, dtype=object) for name, values in found.columns.items()}
        cell = {"model": record.inputs["model"]["name"], "label": names[record.key]}
        cell |= {name: record.inputs[name] for name in ("method", "sparsity")}
        made.append(pd.DataFrame({**cell, **index, **columns, "key": record.key}))
    return typed(pd.concat(made, ignore_index=True)) if made else pd.DataFrame()
