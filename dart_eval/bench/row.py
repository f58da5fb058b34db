"""The row of `dart-eval bench decode`: one method at one sparsity on one model, timed or counted; and the table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dart_eval.results.format import sparsity as percent
from dart_eval.results.speeds import Ratio

if TYPE_CHECKING:
    from dart_eval.results.show import Table

BYTES_ONLY = "bytes only"  # stands in place of times


@dataclass(frozen=True)
class Row:
    """What was measured of one method. Times are ratios to the dense model's; None where `why` gives the reason.

    Attributes:
        bits: the rounding of the FFN weights, as a user types it; None: none.
        weights_read: FFN bytes that a decoded token reads / the model's own; on rounded weights / those of 16 bits.
        ceiling: the largest speed-up that the bytes of this model allow at that read.
        memory: bytes beside the dense model while one sequence decodes. state: those that each sequence adds.
        why: the reason why no kernel turns these bytes into time; None: the row is timed.
        weights_executed: FFN weights that this execution multiplies / all (a token's choice inside its mask saves reads
            only where a kernel skips them).
        speedup: dense step / the method's step. control: dense step / dense step.
        over_kernel: step of the dense model in our own product / the method's step; None where there is none.
        achieved_over_ceiling: over_kernel / ceiling, or speedup / ceiling where there is no kernel.
        first_token: prompt's time with scoring, masks and the first copies / dense prompt's time.
        remask_masks_dense_steps: the first half of a re-mask, in dense steps: new scores and masks are made from the
            inputs in the ring. None where the method keeps no ring.
        remask_moves_dense_steps: the second half, in dense steps: in every layer a fifth of the kept neurons gives way
            to others, whose weights are copied.
        begin_dense_steps: once for the first prompt of a `prune()`, in dense steps: copying the kept neurons' weights.
        overhead: what hooks, detector and ring buffer add to a pruned step, as a share of it.
        dense_tokens_per_second, tokens_per_second: for orientation; they hold for this machine at this moment.
        twin_bytes: of the FFN weights that the dense side has once more; the benchmark's alone, in no other number.
    """

    method: str
    sparsity: float
    bits: str | None
    weights_read: float
    ceiling: float
    memory: int
    state: int
    why: str | None = None
    weights_executed: float | None = None
    speedup: Ratio | None = None
    control: Ratio | None = None
    over_kernel: Ratio | None = None
    achieved_over_ceiling: float | None = None
    first_token: Ratio | None = None
    remask_masks_dense_steps: Ratio | None = None
    remask_moves_dense_steps: Ratio | None = None
    begin_dense_steps: Ratio | None = None
    overhead: Ratio | None = None
    dense_tokens_per_second: float | None = None
    tokens_per_second: float | None = None
    twin_bytes: int | None = None

    @property
    def title(self) -> str:
        """The method, and the bits of the weights it ran on."""
        return self.method + (f" on {self.bits} bits" if self.bits else "")

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers: of a ratio its median, with `NAME_quartiles` and `NAME_n`."""
        plain: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            plain[field.name] = value.median if isinstance(value, Ratio) else value
            if isinstance(value, Ratio):
                plain |= {f"{field.name}_quartiles": [value.low, value.high], f"{field.name}_n": value.n}
        return plain


def _times(ratio: Ratio | None) -> str:
    return "-" if ratio is None else f"{ratio.median:.2f}x"


def _with_quartiles(ratio: Ratio | None) -> str:
    return "-" if ratio is None else f"{ratio.median:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"


def _steps(ratio: Ratio | None) -> str:
    return "-" if ratio is None else f"{ratio.median:.2f}"


def _read(row: Row) -> str:
    executed = row.weights_executed
    return f"{row.weights_read:.2f}" + (f" ({executed:.2f})" if executed not in (None, row.weights_read) else "")


COLUMNS: dict[str, Callable[[Row], str]] = {
    "method": lambda r: r.title,
    "read": _read,
    "speed-up": lambda r: BYTES_ONLY if r.why else _with_quartiles(r.speedup),
    "over kernel": lambda r: _times(r.over_kernel),
    "ceiling": lambda r: f"{r.ceiling:.2f}x",
    "share": lambda r: "-" if r.achieved_over_ceiling is None else f"{r.achieved_over_ceiling:.2f}",
    "control": lambda r: _with_quartiles(r.control),
    "prompt": lambda r: _times(r.first_token),
    "masks": lambda r: _steps(r.remask_masks_dense_steps),
    "changes": lambda r: _steps(r.remask_moves_dense_steps),
    "copies": lambda r: _steps(r.begin_dense_steps),
    "overhead": lambda r: "-" if r.overhead is None else f"{100 * r.overhead.median:.1f} %",
    "tokens/s": lambda r: "-" if r.tokens_per_second is None else f"{r.tokens_per_second:.1f}",
    "memory MB": lambda r: f"{r.memory / 10**6:.2f}",
    "state MB": lambda r: f"{r.state / 10**6:.2f}",
}
BYTES = (
    "Read: share of the FFN weight bytes that a token reads, in brackets what is multiplied where it is another; on "
    "rounded weights of the bytes of 16-bit ones. Ceiling: the largest speed-up that the bytes of this model allow. "
    "Memory: bytes beside the dense model while one sequence decodes, copies and codes of weights included; state: "
    "those that each sequence adds."
)
TIMES = (
    "Speed-up: speed / the untouched model's, median [quartiles] of neighbouring steps. Over kernel: speed / dense in "
    "our own bfloat16 kernel, which reads memory as fast as it can. Share: over kernel / ceiling, or speed-up / "
    "ceiling without a kernel. Control: the untouched model over itself. Prompt: time with scores, masks and copies of "
    "the kept neurons' weights, over a dense prompt. In dense steps: masks, new ones from recent tokens; changes, "
    "copies of a fifth of the kept neurons; copies, those of all of them, once. Overhead: share that hooks add to a "
    "pruned step. Untouched weights lie beside the pruned ones, in memory that no column counts."
)


def table(rows: Sequence[Row], where: str) -> Table:
    """Return the table of decode speeds; columns that no row fills are left out.

    Args:
        where: the model and the hardware.
    """
    from dart_eval.results.show import Table  # needs rich and pandas, which a plain image for a GPU may lack

    texts = {head: [text(row) for row in rows] for head, text in COLUMNS.items()}
    filled = {head: column for head, column in texts.items() if set(column) != {"-"}}
    timed = [row for row in rows if row.speedup is not None]
    sparse = [row for row in rows if row.sparsity]
    notes = [f"{where}; one sequence" + (f", sparsity {percent(sparse[0].sparsity)}." if sparse else "."), BYTES]
    if timed and (ratio := timed[0].speedup):
        notes += [TIMES, f"{ratio.n} steps a row."]
    else:
        notes.append("No method here can be timed.")
    if any(row.bits and row.method == "dense" for row in rows):
        notes.append("Dense on rounded weights is the control that a pruner must beat at equal bytes.")
    if "float32" in where:
        notes.append("float32 weights count as 16 bits: ceilings of rows that read codes are too low.")
    if why := list(dict.fromkeys(row.why for row in rows if row.why)):
        notes.append(f"{BYTES_ONLY.capitalize()}: no kernel turns the saved bytes into time ({'; '.join(why)}).")
    return Table("Decoding", [*filled], [list(cells) for cells in zip(*filled.values(), strict=True)], notes)
