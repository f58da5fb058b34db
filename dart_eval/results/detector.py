"""Detection rates of drift detectors, on the traces of a drift task and of its control.

Task `X` switches topics where decoding begins, its control `X_same` never does: an alarm in the first is a detection,
in the second a false alarm. Other margins than the one that ran are judged from the recorded signals, up to the first
alarm of a document (it may move the reference): run with `remask.act=off` to keep all of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

from dart_eval.results.format import number, sparsity
from dart_eval.results.inputs import question
from dart_eval.results.record import Record
from dart_eval.results.rows import cells_frame
from dart_eval.results.writers import Column, Table, from_frame
from dart_eval.util.errors import UserError
from dart_eval.util.text import Json

CONTROL = "_same"
SIGMAS = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0)  # margins, in standard deviations of the prompt's windows
FLOORS = (0.02, 0.05, 0.1)  # margins, in cosine
MARGINS: list[tuple[str, float | None, str]] = [
    ("as run", None, ""), *((f"{m:g} sigma", m, "sigma") for m in SIGMAS), *((f"{m:g}", m, "cosine") for m in FLOORS),
]  # fmt: skip
COLUMNS = (
    Column("method", "label"), Column("sparsity", text=sparsity), Column("margin"), Column("detected"),
    Column("delay", text="{:g}".format), Column("false / 1000", "false", partial(number, digits=2)), Column("watched"),
)  # fmt: skip


class Rate(NamedTuple):
    """Rates of a detector on documents with a switch and on their controls.

    Attributes:
        documents: documents with a switch.
        detected: of them, documents with an alarm.
        delay: median tokens until the alarm, or None.
        watched: control tokens until an alarm or the end.
        false_alarms: controls with an alarm.
    """

    documents: int
    detected: int
    delay: float | None
    watched: int
    false_alarms: int

    @property
    def false_per_1000(self) -> float:
        """False alarms per 1000 tokens watched."""
        return 1000 * self.false_alarms / self.watched if self.watched else 0.0


def first_alarm(signal: Sequence[float | None], threshold: float, patience: int) -> int | None:
    """Return the windows until the counter (up below the threshold, else down) reaches `patience`; None: never."""
    pressure = 0
    for i, value in enumerate(signal):
        pressure = pressure + 1 if value is not None and value < threshold else max(0, pressure - 1)
        if pressure >= patience:
            return i + 1
    return None


def judged(
    switched: Iterable[dict[str, object]],
    same: Iterable[dict[str, object]],
    margin: float | None,
    unit: str,
    patience: int,
    remasks: bool = True,
) -> Rate:
    """Return the rates of a margin on traces: `unit` is `sigma` or `cosine`; margin None takes the recorded alarms.

    remasks: whether alarms led to new masks, so that a margin is judged only up to the first one.
    """

    def alarm(trace: Json) -> tuple[int | None, int]:
        """Return the tokens until the first alarm (None: never), and the tokens watched."""
        window, signal, raised = trace["window"], trace["signal"], trace.get("alarms") or [None]
        at = raised[0]
        if margin is not None:
            if remasks and at is not None:
                signal = signal[: at // window]
            spread = trace.get("deviation", 0.0) if unit == "sigma" else 1.0
            found = first_alarm(signal, trace["mean"] - margin * spread, patience)
            at = None if found is None else found * window
        return at, window * len(signal) if at is None else at

    usable = [t for t in switched if "mean" in t]
    delays = [found for t in usable if (found := alarm(t)[0]) is not None]
    controls = [alarm(t) for t in same if "mean" in t]
    return Rate(
        len(usable), len(delays), statistics.median(delays) if delays else None,
        sum(watched for _, watched in controls), sum(found is not None for found, _ in controls),
    )  # fmt: skip


def tables(traces: Callable[[Record], list[Json]], records: Sequence[Record]) -> list[Table]:
    """Return a table per drift task whose control was run under the same method with a detector.

    traces: returns those of a record's documents (`Reader.traces`).
    """
    import pandas as pd

    watched = [r for r in records if isinstance(r.inputs["params"].get("remask.patience"), int)]
    by_place = {_place(r, str(r.inputs["task"])): r for r in watched}
    found = []
    for r in watched:
        control = by_place.get(_place(r, r.inputs["task"] + CONTROL))
        params = r.inputs["params"]
        if control is None:
            continue
        try:
            switched, same = traces(r), traces(control)
        except UserError:
            continue  # damaged samples: `report` and `compare` say so
        remasks = bool(params.get("remask.act", True))
        for name, margin, unit in MARGINS if switched and same else ():
            rate = judged(switched, same, margin, unit, params["remask.patience"], remasks)
            said = {"detected": f"{rate.detected} of {rate.documents}", "false": rate.false_per_1000}
            found.append({"key": r.key, "margin": name, "delay": rate.delay, "watched": rate.watched, **said})
    if not found:
        return []
    rates = pd.DataFrame(found).merge(cells_frame(records)[["key", "model", "task", "label", "sparsity"]], on="key")
    columns = [Column("model"), *COLUMNS] if rates["model"].nunique() > 1 else COLUMNS
    return [from_frame(f"Drift detector on {task}", own, columns, _note(task)) for task, own in rates.groupby("task")]


def _place(record: Record, task: str) -> str:
    """Return the inputs that a task and its control share; their numbers of documents may differ."""
    return f"{task} {question(record.inputs, ('task', 'limit'))}"


def _note(task: str) -> str:
    return (
        f"detected: documents of {task} (a switch of topic where decoding begins) with an alarm; delay: median of the "
        f"tokens until it; false: alarms in {task}{CONTROL} (no switch) per 1000 tokens watched until an alarm or the "
        "end. Margin: how far below the mean of the prompt's windows a window must be; as run: with all settings of "
        "the method. Other margins are judged from recorded signals up to a document's first alarm, with the method's "
        "patience, no floor."
    )
