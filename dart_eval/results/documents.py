"""The documents of a cell in columns, for `dart_eval.samples` and all paired tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dart_eval.util.text import Json

INDEX = ["task", "doc_id", "filter"]
BASIC = ("doc_hash", "prompt_hash", "cluster")  # columns of all documents, even of none
APART = ("metrics", "drift", "kl_bins")  # fields of a sample that are not columns


@dataclass(frozen=True)
class Documents:
    """One row per document and filter, and a column per metric.

    Lists, as pandas takes longer to slice the hundred documents of a cell than Python takes to walk through them.

    Attributes:
        index: (task, doc_id, filter) of each row, sorted.
        columns: name -> the rows' values; None means that a document has no value.
    """

    index: list[tuple[Any, ...]]
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.index)

    def only(self, rows: Sequence[int]) -> Documents:
        """Return the rows with these numbers."""
        columns = {name: [values[i] for i in rows] for name, values in self.columns.items()}
        return Documents([self.index[i] for i in rows], columns)

    def assign(self, **columns: list[Any]) -> Documents:
        """Return the documents with new or other columns."""
        return Documents(self.index, {**self.columns, **columns})


def answers(sample: Mapping[str, Any]) -> list[Any]:
    """Return a sample's responses, without the scores of its choices without their context (of acc_mutual_info)."""
    found: list[Any] = sample["responses"]
    return found[: len(found) // 2] if "acc_mutual_info" in sample["metrics"] else found


def written(sample: Mapping[str, Any]) -> list[Any]:
    """Return what the model answered, before a filter."""
    return sample.get("written") or answers(sample)


def documents(samples: Iterable[Json]) -> Documents:
    """Return samples (`layout.Sample`) as documents.

    Values stay as in the file: NaN is NaN. Of two lines on one document the last counts.
    """
    rows = {}
    for sample in samples:
        own = {k: v for k, v in sample.items() if k not in APART}
        rows[tuple(sample[k] for k in INDEX)] = {**own, **sample["metrics"], **own}  # no metric hides a hash
    columns = dict.fromkeys((*BASIC, *(name for row in rows.values() for name in row if name not in INDEX)))
    index = sorted(rows)
    ordered = [rows[key] for key in index]
    return Documents(index, {name: [row.get(name) for row in ordered] for name in columns})
