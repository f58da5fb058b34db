"""Results in the formats of other projects: one module a format, and `facts.py` for their common facts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dart_eval.export.teller import Teller
from dart_eval.util.errors import UserError

if TYPE_CHECKING:
    from dart_eval.results.store import Store

# Each format, and its notes on the publisher of the results.
FORMATS: dict[str, tuple[str, ...]] = {
    "every-eval-ever": ("organisation", "relationship", "page"),
    "eval-results": ("page",),
    "lm-eval": (),
}


def export(
    store: Store, to: str, folder: Path, teller: Teller | None = None, model: str | None = None,
    datasets: Sequence[str] = (), force: bool = False,
) -> list[Path]:  # fmt: skip
    """Write a folder of results in another project's format.

    Args:
        store: the results.
        to: one of `FORMATS`.
        folder: the target.
        teller: the publisher.
        model: the model's name on the hub, in place of the one in the results.
        datasets: data sets of tasks on the hub, as `TASK=OWNER/NAME` or `TASK=OWNER/NAME:ID`.
        force: whether to replace existing files.

    Returns:
        The files. A cell that cannot be exported is named on stderr and left out.

    Raises:
        UserError: the input is wrong, nothing can be exported, or a file is in the way; nothing is then written.
    """
    from dart_eval.export import eval_results, every_eval_ever, lm_eval
    from dart_eval.export.datasets import datasets_of, parsed
    from dart_eval.export.facts import check_model, facts
    from dart_eval.export.writing import write_pieces

    named, publisher = parsed(datasets), teller or Teller()
    records = store.load()
    if model is not None:
        check_model(model, records)
    cells = facts(store, records, model)
    tasks = [task for cell in cells for task in cell.leaves()]
    if strange := named.keys() - {*tasks, *(cell.task for cell in cells)}:
        raise UserError(
            f"--dataset names {min(strange)}, a task without results", f"there are {', '.join(dict.fromkeys(tasks))}"
        )
    found = datasets_of(tasks, named)
    if to == "every-eval-ever":
        pieces = every_eval_ever.pieces(cells, found, publisher)
    elif to == "eval-results":
        pieces = eval_results.pieces(cells, found, publisher.page)
    else:
        pieces = lm_eval.pieces(cells, found)
    return write_pieces(folder, pieces, force)
