"""The tables of results/measurements/scope.md, from the folder that `scripts/scopes.sh` fills.

python scripts/scope_tables.py OUTPUT

A method's rows are means over the tasks that all its scopes have finished; a scope without any is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from dart_eval.results import metrics, outcomes, writers
from dart_eval.results.blocks import CONTROL, BoardRow
from dart_eval.results.board import boards, main_metrics
from dart_eval.results.estimates import Estimate
from dart_eval.results.inputs import DENSE
from dart_eval.results.record import Record
from dart_eval.results.store import Store

ORDER = ("scored", "continuation", "last-99", "last-50", "last", "all", "decode")
HEADS = ["scope", "accuracy", "log-likelihood less dense's", "effective sparsity", "loss hidden: accuracy", "log-lik."]
NOTE = (
    "Mean over {tasks} (n = 100 each). Dense: accuracy {accuracy}, log-likelihood of the right answer {gold:.2f} nats. "
    "Accuracy in per cent ± standard error; log-likelihood in nats per answer [95 % interval, paired]. "
    "Loss hidden: 1 - the loss against dense in this scope / that under `scored`, where that one is more than noise."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables, one a method; the exit status."""
    (folder,) = sys.argv[1:] if arguments is None else arguments
    store = Store(Path(folder))
    records = store.load()
    for method in dict.fromkeys(r.inputs["method"] for r in records if r.inputs["method"] != DENSE):
        mine = [r for r in records if r.inputs["method"] in (method, DENSE)]
        print(writers.markdown(table(store, str(method), mine)))
    return 0


def table(store: Store, method: str, records: Sequence[Record]) -> writers.Table:
    """A method's scopes.

    Args:
        store: the folder. records: the method's cells and the dense ones.
    """
    finished: dict[str, set[str]] = {}
    for r in records:
        scope = DENSE if r.inputs["method"] == DENSE else str(r.inputs["scope"])
        finished.setdefault(scope, set()).add(str(r.inputs["task"]))
    most = max(map(len, finished.values()))
    scopes = [s for s in finished if 2 * len(finished[s]) > most or s == DENSE]
    tasks = set.intersection(*(finished[s] for s in scopes))
    used = [r for r in records if r.inputs["task"] in tasks and (r.inputs["scope"] in scopes or _dense(r))]
    (board,) = boards(store, used)
    rows = {row.scope: row for row in board.rows if row.scope}
    dense = next(row for row in board.rows if row.kind == CONTROL)  # the same in the block of every scope
    usual = rows.get("scored")
    by_key = {r.key: r for r in used}
    body = []
    for scope in (s for s in ORDER if s in rows):
        row = rows[scope]
        cells = [by_key[key] for key in row.keys]
        effective = sum(r.effective_sparsity for r in cells) / len(cells)
        hidden = ["", ""]
        if usual is not None and row is not usual and _loses(usual):
            losses = [_mean(one)[0] - _mean(dense)[0] for one in (row, usual)]
            hidden = [_share(*losses), _share(*(one.nats.value for one in (row, usual) if one.nats is not None))]
        body.append([f"`{scope}`", _accuracy(row), _nats(row.nats), f"{effective:.3f}", *hidden])
    gold = [_gold(store, r) for r in used if _dense(r)]
    note = NOTE.format(tasks=", ".join(sorted(tasks)), accuracy=_accuracy(dense), gold=sum(gold) / len(gold))
    return writers.Table(f"{method} at 50 %", HEADS, body, note)


def _loses(row: BoardRow) -> bool:
    """Whether a row's loss of log-likelihood is more than noise, so that a share of it means something."""
    return row.nats is not None and row.nats.interval is not None and row.nats.interval[1] < 0


def _dense(record: Record) -> bool:
    return record.inputs["method"] == DENSE


def _mean(row: BoardRow) -> tuple[float, float]:
    """The mean of a row's accuracies, and its standard error."""
    found = list(row.values.values())
    return sum(m.value for m in found) / len(found), sum((m.stderr or 0) ** 2 for m in found) ** 0.5 / len(found)


def _accuracy(row: BoardRow) -> str:
    value, error = _mean(row)
    return f"{100 * value:.1f} ± {100 * error:.1f}"


def _nats(found: Estimate | None) -> str:
    if found is None:
        return "-"
    ends = "" if found.interval is None else f" [{found.interval[0]:+.2f}, {found.interval[1]:+.2f}]"
    return f"{found.value:+.2f}{ends}"


def _share(loss: float, usual: float) -> str:
    """What of the usual loss is gone; nothing where there was none."""
    return "-" if usual >= 0 else f"{100 * (1 - loss / usual):.0f} %"


def _gold(store: Store, record: Record) -> float:
    """The mean log-likelihood of the right answer."""
    found = outcomes.cell_of(store, record).read()
    measure = next(m for m in found.measures if m.name == metrics.GOLD and m.task == main_metrics(record)[0].task)
    value = outcomes.value(measure, found.documents)
    assert value is not None
    return value


if __name__ == "__main__":
    sys.exit(main())
