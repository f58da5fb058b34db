"""Long answers by position, for results/long-answers.md: KL to dense on dense's own answers, and what a re-mask gains.

    python scripts/long_page.py FOLDER --model MODEL --data-dir DIR --dtype DTYPE [--save KL.svg]

FOLDER is that of `dart-eval paper long`. Every method in it reads dense's answers there, token by token, in the scope
`continuation`: the prompt runs dense, as it does before a text. An answer ends where it begins to repeat itself: there
any model knows the next token from those before. What is measured is kept in FOLDER/positions, a line an answer, so the
same command goes on where it stopped. Without --model the page is made of what is there.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dart_eval.results import metrics, sums
from dart_eval.results.documents import loop_at
from dart_eval.results.inputs import DENSE
from dart_eval.results.record import Record
from dart_eval.results.stats import Estimate
from dart_eval.results.store import Store
from dart_eval.util.files import write

GSM8K = "gsm8k_cot_zeroshot"
TASKS = (GSM8K, "cnn_dailymail", "xsum_continued")
BIN, AFTER = 64, 64  # tokens of a bin, and after a re-mask
PREFIX = 256  # tokens of an answer of GSM8K that are read again
FEWEST = 16  # answers that a bin must have
CHUNK = 8  # answers between two writes


def rows_of(records: Sequence[Record], task: str) -> dict[str, Record]:
    """Return the cells of a task by the names of their rows, dense first."""
    of_task = [r for r in records if r.inputs["task"] == task]
    rows = {}
    for record in sorted(of_task, key=lambda r: (bool(r.inputs["sparsity"]), r.settings["method"])):
        asked, bits = record.inputs["sparsity"], record.inputs.get("ffn_bits")
        name = record.settings["method"] + (f" on {bits}" if bits else "")
        rows[name + (f" at {metrics.asked(asked)}" if asked else "")] = record
    return rows


def answers_of(store: Store, record: Record) -> dict[int, tuple[str, list[int]]]:
    """Return document -> prompt, and tokens of the answer."""
    prompts = {number: text["prompt"] for (_, number), text in store.texts(record).items()}
    return {s["doc_id"]: (prompts[s["doc_id"]], s["token_ids"]) for s in store.samples(record) if s["token_ids"]}


def measured(folder: Path, task: str, row: str) -> dict[int, dict[str, Any]]:
    """Return document -> what was measured of it so far: `kl` by position, and tokens before each re-mask and alarm."""
    file = folder / "positions" / f"{task}, {row}.jsonl".replace(":", "-")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return {line["doc_id"]: line for line in map(json.loads, lines)}


def keep(folder: Path, task: str, row: str, lines: Mapping[int, dict[str, Any]]) -> None:
    """Keep what was measured of a row."""
    text = "".join(json.dumps(line) + "\n" for line in lines.values())
    write(
        folder / "positions" / f"{task}, {row}.jsonl".replace(":", "-"),
        text,
        "free disk space; the same command goes on",
    )


def measure(folder: Path, store: Store, records: Sequence[Record], model: dict[str, Any]) -> None:
    """Measure what is missing. model: arguments of `DartLM`."""
    from dart_eval.evaluation.forwards import Forwards
    from dart_eval.evaluation.logits import Answers
    from dart_eval.evaluation.requests import Request
    from dart_eval.evaluation.scoring import Scorer
    from dart_eval.evaluation.states import States
    from dart_eval.sweep.dart_lm import DartLM

    class ByPosition(Forwards):
        """Forwards whose answers keep the KL of every position."""

        def answers(self, states: States | None = None) -> Answers:
            kept = self.kept = {}  # type: ignore[var-annotated]

            class Kept(Answers):
                def distance(self, path: Sequence[int], continuation: Sequence[int]) -> Any:
                    kept[tuple(path)] = [self._apart[node][0] for node in path if node in self._apart]
                    return super().distance(path, continuation)

            return Kept(self.head, self.model.config.get_text_config().vocab_size, states)

    (folder / "positions").mkdir(exist_ok=True)
    by_task = {task: rows for task in TASKS if DENSE in (rows := rows_of(records, task))}
    answers = {task: answers_of(store, rows[DENSE]) for task, rows in by_task.items()}
    todo: dict[str, dict[str, list[int]]] = {}  # row -> task -> documents
    for task, rows in by_task.items():
        for row, record in rows.items():
            missing = [number for number in answers[task] if number not in measured(folder, task, row)]
            if row != DENSE and record.inputs["method"] != "sirius" and missing:  # sirius reads no given text
                todo.setdefault(row, {})[task] = missing
    if not todo:
        return
    lm = DartLM(**model, method=DENSE, sparsity=0.0)
    requests: dict[str, dict[int, Request]] = {}
    dense: dict[str, States] = {}
    for task in dict.fromkeys(task for tasks in todo.values() for task in tasks):
        requests[task] = {
            number: Request(tuple(lm.tok_batch_encode([prompt])[0][0].tolist()), tuple(tokens[: loop_at(tokens)]))
            for number, (prompt, tokens) in answers[task].items()
        }
        states = States(1 << 40)
        Scorer(Forwards(lm.model, lm._head), lm.session, lm.budget, "continuation", False, states).score(
            list(requests[task].values())
        )
        dense[task] = States(1 << 40, states.tensors())
    for row, tasks in todo.items():
        record = by_task[next(iter(tasks))][row]
        bits = {"ffn_bits": record.inputs["ffn_bits"]} if record.inputs.get("ffn_bits") else {}
        lm = DartLM(**model, **bits, method=record.settings["method"], sparsity=record.inputs["sparsity"])
        forwards = ByPosition(lm.model, lm._head)
        for task, numbers in tasks.items():
            scorer = Scorer(forwards, lm.session, lm.budget, "continuation", False, dense[task])
            known = measured(folder, task, row)
            for place, number in enumerate(numbers, 1):
                (score,) = scorer.score([requests[task][number]])
                (kl,) = forwards.kept.values()
                assert math.isclose(math.fsum(kl), score.cost.distance.kl)
                trace = score.cost.trace or {}
                events = {name: [*map(int, trace.get(name, ()))] for name in ("remasks", "alarms")}
                known[number] = {"doc_id": number, "kl": [round(x, 7) for x in kl], **events}
                if place % CHUNK == 0 or number == numbers[-1]:
                    keep(folder, task, row, known)
            print(f"{task}: {row}: {len(numbers)} answers", flush=True)


def right_at_prefix(store: Store, records: Sequence[Record], data: Path, tokenizer: Any) -> dict[str, list[float]]:
    """Return row -> whether each answer of GSM8K is right if it is cut after `PREFIX` tokens, by the lenient filter."""
    from lm_eval.api.instance import Instance

    from dart_eval.evaluation.tasks import Tasks, leaves

    (task,) = leaves(Tasks(data).load(GSM8K))
    (extract,) = (f for f in task._filters if f.name == "flexible-extract")
    stop = task.config.generation_kwargs["until"]
    found = {}
    for row, record in rows_of(records, GSM8K).items():
        targets = {number: text["target"] for (_, number), text in store.texts(record).items()}
        answers = {s["doc_id"]: s["token_ids"] for s in store.samples(record)}
        right = []
        for number, tokens in sorted(answers.items()):
            text = tokenizer.decode(tokens[:PREFIX], skip_special_tokens=True)
            for end in stop:
                text = text.split(end)[0]
            doc = {"answer": targets[number]}
            asked = Instance("generate_until", doc, ("", {}), 0, ("", number, 1))
            asked.resps = [text]
            extract.apply([asked])
            right.append(float(task.process_results(doc, [asked.filtered_resps[extract.name]])["exact_match"]))
        found[row] = right
    return found


# -- the page ----------------------------------------------------------------------------------------------------------


def positions(folder: Path, records: Sequence[Record], task: str) -> pd.DataFrame:
    """Return the KL of every position of every answer, with `row`, `doc` and `at`: tokens of the answer before it."""
    parts = [
        pd.DataFrame({"row": row, "doc": number, "at": range(len(line["kl"])), "kl": line["kl"]})
        for row in rows_of(records, task) for number, line in measured(folder, task, row).items()
    ]  # fmt: skip
    return pd.concat(parts) if parts else pd.DataFrame(columns=["row", "doc", "at", "kl"])


def by_bin(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the mean KL of each row in each bin that has `FEWEST` answers: rows, and first tokens of bins."""
    bins = frame.assign(bin=frame["at"] // BIN * BIN).groupby(["row", "bin"], sort=False)
    means = bins.agg(kl=("kl", "mean"), n=("doc", "nunique")).query(f"n >= {FEWEST}")
    return means["kl"].unstack("bin")


def estimate(pairs: Mapping[int, tuple[float, float]]) -> Estimate:
    """Return sum x / sum w over documents. pairs: document -> x and w."""
    value, slopes = sums.linearised("ratio", np.array([*pairs.values()], float))
    return Estimate(value, dict(zip(map(str, pairs), slopes.tolist(), strict=True)))


def gain(dart: Mapping[int, Any], never: Mapping[int, Any], after: int) -> tuple[Estimate, int] | None:
    """Return by how much re-masks lower the KL of the tokens after them, and how many there were.

    Args:
        dart, never: what was measured with re-masks, and without.
        after: tokens after a re-mask that count, each once.
    """
    pairs, count = {}, 0
    for number, line in dart.items():
        far = np.array(never[number]["kl"]) - np.array(line["kl"])
        at = np.arange(len(far))
        near = np.zeros(len(far), bool)
        for start in line["remasks"]:
            near |= (at >= start) & (at < start + after)
        if near.any():
            pairs[number], count = (float(far[near].sum()), float(near.sum())), count + len(line["remasks"])
    return (estimate(pairs), count) if len(pairs) > 1 else None


def told(estimated: Estimate, digits: int = 4) -> str:
    """Return a value with its interval."""
    ends = ", ".join(f"{end:+.{digits}f}" for end in estimated.interval or ())
    return f"{estimated.value:+.{digits}f}" + f" [{ends}]" * bool(ends)


def page(folder: Path, records: Sequence[Record]) -> list[str]:
    """Return the tables, in Markdown."""
    lines = []
    for task in TASKS:
        frame = positions(folder, records, task)
        if frame.empty:
            continue
        table = by_bin(frame)
        heads = [f"{start} to {start + BIN - 1}" for start in table]
        lines += [f"**{task}: KL to dense on dense's own answer, nats a token, by tokens before it**", ""]
        lines += [f"| row | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
        for row, values in table.iterrows():
            lines.append(f"| {row} | {' | '.join('' if np.isnan(v) else f'{v:.4f}' for v in values)} |")
        watched = {row: measured(folder, task, row) for row in rows_of(records, task) if row.startswith("dart")}
        rows = {row: of_row for row, of_row in watched.items() if any(line["alarms"] for line in of_row.values())}
        for row, of_row in rows.items():
            lengths = pd.Series([len(line["kl"]) for line in of_row.values()])
            parts = []
            for start in table:
                tokens = (lengths - start).clip(0, BIN).sum()
                happened = (
                    sum(start <= at < start + BIN for line in of_row.values() for at in line[name])
                    for name in ("alarms", "remasks")
                )
                parts.append(" and ".join(f"{1000 * count / tokens:.1f}" for count in happened))
            lines.append(f"| {row}: alarms and re-masks in 1,000 tokens | {' | '.join(parts)} |")
        lines.append("")
        for row, of_row in rows.items():
            name = next((other for other in watched if other.startswith("dart:remask=never")), None)
            for after, words in ((AFTER, f"the {AFTER} tokens after"), (1 << 30, "all tokens after the first")):
                if name and name != row and (gained := gain(of_row, watched[name], after)):
                    value, count = gained
                    p = metrics.chance(value.p)
                    lines.append(
                        f"{row} against {name}, {words}: KL lower by {told(value)} nats a token, p {p}; {count} "
                        f"re-masks in {len(value.units)} of {len(of_row)} answers."
                    )
        lines.append("")
    file = folder / "positions" / "prefix.json"
    if file.is_file():
        lines += [f"**GSM8K, answers cut after {PREFIX} tokens**", "", "| row | right, % |", "|---|---|"]
        for row, right in json.loads(file.read_text(encoding="utf-8")).items():
            share, error = sums.as_recorded("mean", [[x, 1] for x in right])
            lines.append(f"| {row} | {metrics.short('acc', share, error)} |")
    return lines


def draw(folder: Path, records: Sequence[Record], file: Path) -> None:
    """Draw KL by position, a panel a task and a line a row, with names at the ends."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    tables = {task: by_bin(positions(folder, records, task)) for task in TASKS}
    tables = {task: table for task, table in tables.items() if not table.empty}
    looks = {row: f"C{i}" for i, row in enumerate(dict.fromkeys(row for t in tables.values() for row in t.index))}
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "long", "font.size": 9}):
        figure = Figure(figsize=(3.4 * len(tables) + 0.4, 3.4), layout="constrained")
        for axes, (task, table) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True):
            axes.set(yscale="log", xlabel="tokens of the answer")
            axes.set_title(f"{task}\nKL to dense, nats a token", fontsize=9, loc="left")
            axes.spines[["top", "right"]].set_visible(False)
            ends = {}
            for row, values in table.iterrows():
                known = values.dropna()
                axes.plot(known.index + BIN / 2, known, "o-", color=looks[row], ms=3, linewidth=1.2)
                ends[row] = (known.index[-1] + BIN / 2, known.iloc[-1])
            place = 0.0  # names stand in the order of their lines' ends, a line of text apart
            low, high = np.log(axes.get_ylim())
            for row, (x, y) in sorted(ends.items(), key=lambda item: item[1][1]):
                place = max(place + 0.06, (np.log(y) - low) / (high - low))
                axes.annotate(
                    row,
                    (x, y),
                    (1.02, place),
                    "data",
                    "axes fraction",
                    color=looks[row],
                    fontsize=8,
                    va="center",
                )
        figure.savefig(
            file, metadata={"Creator": "dart-eval", "Date": None} if file.suffix == ".svg" else None, dpi=120
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    store = Store(given.folder)
    records = store.load()
    if given.model:
        measure(given.folder, store, records, {"pretrained": given.model, "dtype": given.dtype})
        from dart_eval.models.loading import ModelSpec, resolve

        tokenizer = resolve(ModelSpec(given.model)).load_tokenizer()
        right = right_at_prefix(store, records, given.data_dir, tokenizer)
        write(given.folder / "positions" / "prefix.json", json.dumps(right), "free disk space")
    print("\n".join(page(given.folder, records)))
    if given.save:
        draw(given.folder, records, given.save)
