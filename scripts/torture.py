"""Kill it and feed it rubbish: does dart-eval come through unharmed?

    python -m scripts.torture                                # all of it, some twenty minutes on two cores
    python -m scripts.torture --short --seed 202648          # two minutes
    python -m scripts.torture --only records                 # one kind

`kills` stops a sweep by signals at random moments, damages the journal of the cell that was under way, and gives the
same command again: in the end the folder holds what an unkilled sweep leaves, and a finished record has never changed.
The others damage what is read: configs and thresholds (YAML), data (JSON Lines), records and samples. There must be no
traceback, a refusal is one line, and a number is shown as it was or not at all.
Exit status: 0; 1 (something fell); 2 (wrong arguments).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import json
import logging
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

import datasets
import yaml

from dart_eval.util.errors import UserError
from tests.helpers.commands import command, program, results, started
from tests.helpers.models import save_tiny, word_tokenizer
from tests.helpers.records import sealed

RUN = (
    "run", "--model", "../model", "--tasks", "smoke_questions,smoke_summary", "--sparsity", "0.5", "--limit", "4",
    "--method", "dense,griffin,dart:remask.window=3:remask.min_windows=1:remask.ring=5,grinqh,flap", "--output", "out",
)  # fmt: skip
SIGNALS: dict[int, int] = {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}  # and the status then
CASES = {"kills": 20, "config": 1000, "thresholds": 1000, "data": 100, "records": 100, "samples": 100}  # in full
AFTER = 60  # seconds in which a process must end once it has its signal
LIMIT = 60  # seconds that a damaged file may take
CONFIG = """model: tiny
method:
  - dense
  - dart:allocation=uniform
  - dart:remask.window=8
sparsity: [0.5, 0.7]
ffn_bits: [16, "4:64"]
tasks: [smoke_questions, smoke_summary]
limit: 0.5
gen_kwargs: {temperature: 0.5, do_sample: true}
output: out
"""
THRESHOLDS = """recovery: 0.98
alpha: 0.05
tasks:
  smoke_questions: {recovery: 0.9}
"""
ROWS = [
    {"id": f"q{i}", "question": f"What is {i}?", "answerKey": "ABCD"[i % 4],
     "choices": {"text": ["one", "two", "three", "four"], "label": [*"ABCD"]}} for i in range(5)
]  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 0.5, -0.0, 1e308, 1e-320, math.inf, -math.inf, math.nan, 10**30, 2**31, 2**63, "",
    "x", "0.5", "nan", "a\0b", "\ud800", "../../etc/passwd", "/dev/zero", "\x1b[31mred", "\u202e", "::error::pwn",
    "=HYPERLINK(1)", "<script>alert(1)</script>", "a\nb", "x" * 5000, [], {}, [[]], [None], {"a": 1}, ["x", 1],
)  # fmt: skip
# Pieces of YAML and JSON: tags, anchors, kinds of values, keys twice, bombs.
PIECES = (
    "!!python/object/apply:os.system [touch escaped]", "!!timestamp x", "!!binary x", "!!set {a, b}", "&a [*a]", "*a",
    "<<: *a", "? [a]", "- ", ": ", "{", "}", "[", "]", "'", '"', "|", ">", "%YAML 1.1", "---", "...", "#", "\t", "\0",
    "2024-13-45", "2024-01-01", "0x" + "f" * 60, "1e400", ".nan", ".inf", "~", "yes", "1_000", "0o17", "12:30:45",
    "\ufeff", "\x07", "a: &a [x,x,x]\nb: &b [*a,*a,*a]\nc: [*b,*b,*b]", "[" * 3000, "{a: " * 500, "- " * 500,
    "x" * 5000, "é", "\n", "  ", "NaN", "\\ud800",
)  # fmt: skip


class Wrong(AssertionError):
    """What must not be."""


# -- damage ------------------------------------------------------------------------------------------------------------


def of_bytes(draw: random.Random, data: bytes) -> bytes:
    """Return data with up to three of: a bit flipped, a cut, a piece gone, twice, zeroed, or garbage."""
    for _ in range(draw.choice((1, 1, 2, 3))):
        if not data:
            return b"\0"
        at, size = draw.randrange(len(data)), draw.choice((1, 2, 4, 8, 64, 512))
        piece, rest = data[at : at + size], data[at + size :]
        flipped = bytes([data[at] ^ 1 << draw.randrange(8)]) + piece[1:]
        changed = flipped, b"", piece * 2, bytes(len(piece)), draw.randbytes(len(piece)), piece + draw.randbytes(size)
        data = data[:at] if draw.random() < 0.15 else data[:at] + draw.choice(changed) + rest
    return data


def of_text(draw: random.Random, text: str) -> bytes:
    """Return text with pieces set in, in place of words, or over its ends; or damaged as bytes."""
    if draw.random() < 0.3:
        return of_bytes(draw, text.encode())
    for _ in range(draw.choice((1, 1, 2, 3))):
        ends = [i for i, c in enumerate(text) if not c.isalnum()] or [0]
        a = draw.choice(ends) + 1
        b = a if draw.random() < 0.5 else min((i for i in ends if i > a), default=len(text))
        text = text[:a] + draw.choice(PIECES) + text[b:]
    return text.encode("utf-8", "surrogatepass")


def of_value(draw: random.Random, value: Any) -> Any:
    """Return JSON data in which one value is odd, gone, nested, doubled, or one too many."""
    value = copy.deepcopy(value)
    holder, key = draw.choice([*_places(value)])
    how = draw.random()
    if how < 0.6:
        holder[key] = draw.choice(ODD)
    elif how < 0.75:
        del holder[key]
    elif how < 0.9:
        holder[key] = [holder[key]] if draw.random() < 0.5 else {"more": holder[key]}
    elif isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    else:
        holder[draw.choice(("more", "", "schema", "part_of"))] = draw.choice(ODD)
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (holder, key) of everything below a value."""
    for key, below in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(below, (dict, list)):
            yield from _places(below)


# -- kills -------------------------------------------------------------------------------------------------------------


class Whole:
    """An undisturbed sweep in `folder`/whole with its baseline; `folder`/model is its model."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "whole" / "out"
        self.out.parent.mkdir(parents=True)
        save_tiny(folder / "model", word_tokenizer())
        seconds = []
        for words in (("--version",), RUN, ("check", "out", "--baseline", "own.json", "--update")):
            begun, done = time.monotonic(), program(*words, cwd=self.out.parent)
            seconds.append(time.monotonic() - begun)
            if done.returncode:
                raise RuntimeError(f"undisturbed, {words} ends with {done.returncode}: {done.stderr[-2000:]}")
        self.seconds, self.files = seconds[1], results(self.out)

    def killed(self, draw: random.Random) -> str:
        """Kill a sweep again and again, up to its end; how often it was."""
        place, finished, kills = self.folder / "killed", dict[Path, bytes](), 0
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for last in (*[False] * 20, True):
            process, number = started(*RUN, cwd=place), 0
            try:
                process.wait(10 * AFTER if last else self.seconds * draw.random() / 6)
            except subprocess.TimeoutExpired:
                number, kills = draw.choice([*SIGNALS]), kills + 1
                process.send_signal(number)
            try:
                status = process.wait(AFTER)
            except subprocess.TimeoutExpired:
                process.kill()
                raise Wrong(f"no end {AFTER} s after {number}") from None
            # It was done before the signal came, or its handlers were not there yet.
            ends = {0, SIGNALS[number], -number} if number else {0}
            if status not in ends or ("Traceback" in process.stderr and "KeyboardInterrupt" not in process.stderr):
                raise Wrong(f"status {status} after {number}: {process.stderr[-600:]!r}")
            for file in (place / "out" / "cells").glob("*.json"):
                if finished.setdefault(file, file.read_bytes()) != file.read_bytes():
                    raise Wrong(f"{file.name} was finished, and has changed")
            if not number:
                break
            for journal in (place / "out" / "partial").glob("*"):
                if draw.random() < 0.3:
                    journal.write_bytes(of_bytes(draw, journal.read_bytes()))
        found = results(place / "out")
        if names := [name for name in {*found, *self.files} if found.get(name) != self.files.get(name)]:
            raise Wrong(f"{names} are not those of an undisturbed sweep")
        files = filter(Path.is_file, (place / "out").rglob("*"))
        left = [str(file) for file in files if file.parent.name in ("partial", "failed") or file.name[0] == "."]
        if left:
            raise Wrong(f"{left} are left over")
        return f"{kills} kills"


# -- fuzz --------------------------------------------------------------------------------------------------------------


class Fuzz:
    """Damaged files in `place`, beside an undisturbed sweep. told: the last damage, for people."""

    def __init__(self, whole: Whole) -> None:
        self.whole, self.place, self.told = whole, whole.folder / "fuzz", ""
        self.place.mkdir(exist_ok=True)

    def asked(self, *words: Any) -> Any:
        """Give a command in this process; what it wrote must be fit for people and programs."""
        done = command(*words)
        if done.code not in (0, 1, 2) or "Traceback" in done.err + done.out or "\x1b" in done.err + done.out:
            raise Wrong(f"{words} ends with {done.code}: {done.err[-300:]!r}")
        if done.code == 2:
            _one_line(done.err.rstrip("\n").splitlines()[-1])
        return done

    def _yaml(self, draw: random.Random, text: str) -> Path:
        file, data = self.place / "case.yaml", of_text(draw, text)
        if draw.random() < 0.5:
            with contextlib.suppress(yaml.YAMLError):
                data = yaml.safe_dump(of_value(draw, yaml.safe_load(text))).encode("utf-8", "surrogatepass")
        file.write_bytes(data)
        self.told = repr(data[:160])
        return file

    def config(self, draw: random.Random) -> str:
        """`run --config`: what is understood is a share of weights."""
        from dart_eval.sweep.options import config_from

        config = config_from(self._yaml(draw, CONFIG), {})
        if not all(type(s) is float and 0 <= s < 1 for s in config.sparsity):
            raise Wrong(f"sparsity is {config.sparsity}")
        return "read"

    def thresholds(self, draw: random.Random) -> str:
        """`check --thresholds`: a limit that is none would let everything pass."""
        from dart_eval.results.check import thresholds_from

        found = thresholds_from(self._yaml(draw, THRESHOLDS))
        given = [found.alpha, found.recovery, *(limit.recovery for limit in found.tasks.values())]
        if not all(type(x) in (int, float) and 0 < x <= 1 for x in given):
            raise Wrong(f"{found}")
        return "read"

    def data(self, draw: random.Random) -> str:
        """`--data-dir`: as many documents are asked as stand in the file, or their folder is named."""
        from dart_eval.evaluation.documents import check_documents
        from dart_eval.evaluation.tasks import Tasks, leaves

        lines, at = [json.dumps(row) for row in ROWS], draw.randrange(len(ROWS))
        if draw.random() < 0.6:
            lines[at] = json.dumps(of_value(draw, ROWS[at]))
            data = "\n".join(lines).encode()
        else:
            data = of_text(draw, "\n".join(lines))
        self.told = repr(data[:300])
        folder = self.place / "data" / "allenai__ai2_arc" / "ARC-Easy"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
        for split in ("validation", "test"):
            (folder / f"{split}.jsonl").write_bytes(data)
        (task,) = leaves(Tasks(self.place / "data").load("arc_easy"))
        check_documents(task, None)
        if len(task.eval_docs) != len([*_objects(data.decode())]):
            raise Wrong(f"{len(task.eval_docs)} documents are asked")
        return "read"

    @functools.cached_property
    def shown(self) -> dict[tuple[str, str, str], Any]:
        """What `tables` shows of the undamaged folder."""
        return _values(self.asked("tables", self.whole.out, "--format", "json").out)

    def records(self, draw: random.Random, kinds: Sequence[str] = ("cells",)) -> str:
        """The commands that read results of which two files are damaged, or forged with a fitting digest."""
        shown, out = self.shown, self.place / "out"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(self.whole.out, out)
        forged = kinds == ("cells",) and draw.random() < 0.5
        paths = draw.sample(sorted(file for kind in kinds for file in (out / kind).iterdir()), 2)
        self.told = f"{'forged' if forged else 'damaged'}: {', '.join(path.name for path in paths)}"
        for path in paths:
            data = path.read_bytes()
            changed = sealed(of_value(draw, json.loads(data))) if forged else None
            path.write_bytes(json.dumps(changed).encode() if forged else of_bytes(draw, data))
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        done = self.asked("tables", out, "--format", "json")
        others = {key: v for key, v in _values(done.out).items() if v != shown.get(key)}
        if others and not forged:
            raise Wrong(f"tables shows other numbers: {others}")
        self.asked("tables", out, *draw.choice([(), ("--view", "long"), ("--format", "csv")]))
        self.asked("compare", out, "--row", "griffin,grinqh", "--format", "json")
        self.asked("check", out, "--baseline", self.whole.out.parent / "own.json")
        self.asked("report", out, "--output", self.place / "report.html")
        if before != {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}:
            raise Wrong("a file of the results has changed")
        return "refused" if done.code == 2 else "shown"

    def samples(self, draw: random.Random) -> str:
        """The same of samples and texts."""
        return self.records(draw, ("samples", "texts"))


def _objects(text: str) -> Iterator[Any]:
    """Yield the JSON values of a file, one behind the other."""
    while text := text.lstrip():
        value, end = json.JSONDecoder().raw_decode(text)
        text = text[end:]
        yield value


def _values(text: str) -> dict[tuple[str, str, str], Any]:
    """Return what must not change, of each row of `tables --format json`."""
    names = "value", "stderr", "n", "effective_sparsity"
    rows = json.loads(text) if text else []
    return {(row["key"], row["task"], row["metric"]): [row[name] for name in names] for row in rows}


def _one_line(said: str) -> None:
    """Raise where a refusal is no line for people."""
    if "\n" in said or len(said) > 6000 or any(ord(c) < 32 or c == "\u202e" for c in said):
        raise Wrong(f"a refusal is no line: {said[:300]!r}")


def _late(*_: object) -> None:
    raise Wrong(f"no end after {LIMIT} s")


def tried(case: Callable[[random.Random], str], draw: random.Random, limit: int = 0) -> str:
    """Run a case for some seconds at most; how it went, beginning with FELL where something is not as it must be."""
    signal.signal(signal.SIGALRM, _late)
    signal.alarm(limit)
    try:
        try:
            return case(draw)
        except UserError as error:
            _one_line(str(error))
            return "refused"
    except Exception as error:
        return f"FELL: {type(error).__name__}: {str(error)[:600]}"
    finally:
        signal.alarm(0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked, and print a line for each kind; the exit status."""
    parser = argparse.ArgumentParser(prog="torture", description=__doc__.split("\n\n")[0])
    parser.add_argument("--short", action="store_true", help="a twentieth of everything")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument("--only", choices=CASES, help="one kind")
    given = parser.parse_args(arguments)
    logging.disable(logging.ERROR)
    datasets.disable_progress_bars()
    fell = 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = datasets.config.HF_DATASETS_CACHE = f"{folder}/datasets"
        whole = Whole(Path(folder))
        fuzz = Fuzz(whole)
        for name in [given.only] if given.only else CASES:
            case, limit, went = (whole.killed, 0, list[str]()) if name == "kills" else (getattr(fuzz, name), LIMIT, [])
            for number in range(CASES[name] // (20 if given.short else 1)):
                went.append(tried(case, random.Random(f"{given.seed} {name} {number}"), limit))
                if went[-1].startswith("FELL"):
                    print(f"{name}, seed {given.seed}, case {number}: {went[-1]}; {fuzz.told}", flush=True)
                    fell += 1
            print(f"{name}: {', '.join(f'{went.count(w)} {w[:200]}' for w in sorted({*went}))}", flush=True)
    return int(fell > 0)


if __name__ == "__main__":
    sys.exit(main())
