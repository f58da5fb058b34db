"""Which of the planned cells a model can run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dart_eval.layers.find import describe
from dart_eval.models.loading import Resolved
from dart_eval.results.store import Store
from dart_eval.sweep.plan import Cell
from dart_eval.util.bits import bits_text
from dart_eval.util.errors import UserError
from dart_eval.weights.rounding import refuse_fixed


def drop_infeasible(
    cells: Sequence[Cell], model: Resolved, store: Store, status: Callable[[str], None], note: Callable[[str], None]
) -> list[Cell]:
    """Return the cells whose method fits this model and its weights, and whose sparsity it can meet; note the others.

    Only the model's modules count. What shows when it runs (a layer that runs several times for a token, or does more
    than add its FFN's output) fails a cell.

    Args:
        status, note: of the view.

    Raises:
        UserError: there are cells, and none of them can run.
    """

    def fits(cell: Cell) -> bool:  # so does what has run before
        known = store.file("cells", cell.name, cell.key).is_file()
        return known or (cell.method.fits_all and cell.rounding is None)

    if all(map(fits, cells)):
        return list(cells)
    status("looking at the model's layers")
    ffns = describe(model.outline())
    fixed: UserError | None = None  # why no weights can be rounded
    try:
        if any(cell.rounding for cell in cells):
            refuse_fixed(ffns)
    except UserError as error:
        fixed = error
    kept: list[Cell] = []
    reasons: dict[str, UserError] = {}
    for cell in cells:
        if cell.rounding is not None and fixed is not None:
            reasons[f"--ffn-bits {cell.rounding.text}"] = fixed
            continue
        try:
            bits = None if cell.rounding is None else cell.rounding.stored(ffns[0].width)
            if cell.method.prunes:
                cell.method.check(ffns, cell.sparsity, bits)
            kept.append(cell)
        except UserError as error:
            on = "" if cell.rounding is None else f" on {bits_text(cell.rounding.text)}"
            reasons[f"{cell.method.spec}{on} at sparsity {cell.sparsity:g}"] = error
    if not kept:
        title, reason = next(iter(reasons.items()))
        raise UserError(f"{title}: {reason.problem}", reason.remedy)
    for title, reason in reasons.items():
        note(f"{title} is left out: {reason}")
    return kept
