"""What is fuzzed: results, and the baseline that they are held against."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import zlib
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from scripts.torture.damage import as_json, of_bytes, of_value
from scripts.torture.fuzz import Wrong, one_line
from scripts.torture.kinds import Kind
from scripts.torture.sweep import RUN, tree
from tests.helpers.commands import Done, Watch, command, results, run_local
from tests.helpers.records import sealed

SAME = (
    "value", "stderr", "n", "tokens", "effective_sparsity", "weights_read", "mask_sparsity", "remasks", "memory_state",
)  # fmt: skip


class Shown(Kind):
    """A folder of results with damage, and the commands that show it."""

    limit = 60.0

    def __init__(self, folder: Path, place: Path) -> None:
        super().__init__(folder, place)
        self.out, self.baseline = folder / "whole" / "out", folder / "whole" / "own.json"
        self.told = "undamaged"
        rows = json.loads(self.asked("tables", self.out, "--format", "json").out)
        self.rows = {_of(row): {name: row[name] for name in SAME} for row in rows}
        now = json.loads(self.asked("check", self.out, "--baseline", self.baseline, "--all", "--format", "json").out)
        self.now = {(r["cell"], r["task"], r["metric"]): r["now"] for r in now["rows"]}

    def asked(self, *words: Any) -> Done:
        """Run a command in this process; what it wrote must be fit for people and programs."""
        done = command(*words)
        if done.code not in (0, 1, 2) or "Traceback" in done.err + done.out:
            raise Wrong(f"{words} ends with {done.code}: {done.err[-300:]!r}, {self.told}")
        if "\x1b" in done.out + done.err:
            raise Wrong(f"{words} writes a raw escape: {self.told}")
        if done.code == 2:
            one_line(done.err.rstrip("\n").splitlines()[-1] if done.err else "no word\n")
        return done

    def checked(self, *words: Any) -> Done:
        """Of a check the numbers of the results themselves must be theirs, whatever it is held against."""
        done = self.asked("check", *words, "--all", "--format", "json")
        for row in json.loads(done.out)["rows"] if done.out else ():
            told = self.now.get((row["cell"], row["task"], row["metric"]))
            if None not in (row.get("now"), told) and row["now"] != told:
                raise Wrong(f"check says {row['now']} where {told} is right: {row['cell']} {row['task']}, {self.told}")
        return done


class Baselines(Shown):
    """`check --baseline`."""

    def case(self, random: Random) -> str:
        data = self.baseline.read_bytes()
        forged = random.random() < 0.5
        self.put("case.json", as_json(of_value(random, json.loads(data))) if forged else of_bytes(random, data))
        self.words = ["check", str(self.out), "--baseline", "case.json"]
        done = self.checked(self.out, "--baseline", "case.json", "--junit", "junit.xml")
        return {0: "held", 1: "fell in the check", 2: "refused"}[done.code]


class Records(Shown):
    """`tables`, `compare`, `check`, `report` and `export` of a folder in which records are damaged or forged."""

    files: tuple[str, ...] = ("cells",)

    def case(self, random: Random) -> str:
        shutil.rmtree(self.place / "out", ignore_errors=True)
        shutil.copytree(self.out, self.place / "out")
        forged, told = random.random() < 0.6, []
        for path in random.sample(sorted(f for kind in self.files for f in (self.place / "out" / kind).iterdir()), 2):
            (self._forge if forged else self._damage)(random, path)
            told.append(path.name)
        self.told = f"{'forged' if forged else 'damaged'}: {', '.join(told)}"
        before = tree(self.place / "out")
        done = self.asked("tables", "out", "--format", "json")
        for row in json.loads(done.out) if done.out and not forged else ():
            wrong = [n for n in SAME if row[n] is not None and row[n] != self.rows.get(_of(row), row)[n]]
            if wrong:
                raise Wrong(f"tables shows another {wrong[0]} of {_of(row)}: {row[wrong[0]]}, {self.told}")
        self.asked("tables", "out", *random.choice([(), ("--view", "long"), ("--format", "csv")]))
        self.asked("compare", "out", "--method", "griffin,grinqh", "--format", "json")
        check = ("out", "--baseline", self.baseline, "--junit", "junit.xml")
        self.asked("check", *check, "--github") if forged else self.checked(*check)
        report, export = ("report", "out", "--output", "report.html"), ("export", "out", "--output", "to")
        self.asked(*random.choice([report, export]))
        shutil.rmtree(self.place / "to", ignore_errors=True)
        if tree(self.place / "out") != before:
            raise Wrong(f"a file of the results has changed: {self.told}")
        self.words = random.choice([["tables", "out"], ["report", "out", "--output", "real.html"]])
        return {0: "shown", 1: "shown", 2: "refused"}[done.code]

    def _damage(self, random: Random, path: Path) -> None:
        path.write_bytes(of_bytes(random, path.read_bytes()))

    def _forge(self, random: Random, path: Path) -> None:
        path.write_bytes(as_json(_sealed(of_value(random, json.loads(path.read_bytes())))))


class Samples(Records):
    """The same of samples and texts; forged ones have digests that fit."""

    files = ("samples", "texts")

    def _forge(self, random: Random, path: Path) -> None:
        old, lines = path.read_bytes(), [json.loads(line) for line in path.read_bytes().splitlines()]
        place = random.randrange(len(lines))
        lines[place] = of_value(random, lines[place])
        path.write_bytes(b"".join(as_json(line) + b"\n" for line in lines))
        was, now = (hashlib.sha256(data).hexdigest() for data in (old, path.read_bytes()))
        for record in (self.place / "out" / "cells").iterdir():
            if was in record.read_text():
                record.write_bytes(as_json(_sealed(json.loads(record.read_text().replace(was, now)))))


class Journals(Kind):
    """A cell that was stopped in the middle, whose answers so far are damaged, goes on: its record is the right one."""

    limit = 60.0

    def __init__(self, folder: Path, place: Path) -> None:
        super().__init__(folder, place)
        from dart_eval.results.journal import Journal
        from dart_eval.sweep.config import config_from

        given = dict(zip((word.strip("-").replace("-", "_") for word in RUN[1::2]), RUN[2::2], strict=True))
        given |= {"model": str(folder / "model"), "method": "dart:remask.window=3:remask.min_windows=1:remask.ring=5"}
        self.configs, self.halves, self.whole = [], [], []
        for task in ("smoke_questions", "smoke_summary"):
            changes = {"tasks": task, "batch_size": "1", "limit": 6}
            config = config_from(None, {**given, **changes, "output": str(place / task)})
            run_local(config, Watch())
            self.whole.append(results(place / task))
            shutil.rmtree(place / task)
            stock, batches = Journal.add, iter(range(2))

            def add(self: Journal, *batch: Any, stock: Any = stock, batches: Any = batches) -> None:
                if next(batches, None) is None:
                    raise KeyboardInterrupt
                stock(self, *batch)

            try:
                with mock.patch.object(Journal, "add", add):
                    run_local(config, Watch())
            except KeyboardInterrupt:
                self.halves.append(next((place / task / "partial").iterdir()))
            self.configs.append(config)
        self.data = [half.read_bytes() for half in self.halves]

    def case(self, random: Random) -> str:
        which, forged = random.randrange(2), random.random() < 0.5
        config, half, data = self.configs[which], self.halves[which], self.data[which]
        shutil.rmtree(config.output)
        half.parent.mkdir(parents=True)
        damaged = self._forged(random, data) if forged else of_bytes(random, data)
        half.write_bytes(damaged)
        first = next((a for a, b in _lines(damaged, data) if a != b), b"")
        self.told = f"{'forged' if forged else 'damaged'} {first[:300]!r}"
        view = Watch()
        run_local(config, view)
        if view.broken:
            raise Wrong(f"the cell failed: {view.broken[0][1]}, {self.told}")
        found, whole = results(config.output), self.whole[which]
        if found == whole:
            return "record as undisturbed"
        names = [name for name in {*found, *whole} if found.get(name) != whole.get(name)]
        if forged and _alike(found, whole):
            return "forged number believed"  # its checksum fits, and it is one: nobody can tell
        raise Wrong(f"{names} differ from an undisturbed run's, {self.told}")

    def _forged(self, random: Random, data: bytes) -> bytes:
        lines = data.splitlines()
        at = random.randrange(len(lines))
        batch = json.loads(lines[at].partition(b" ")[2])
        answers = [answer for answer in batch[0].values() if isinstance(answer, (dict, list))] or [batch[0]]
        target = random.choice(answers)
        damaged = of_value(random, batch) if random.random() < 0.3 else None
        if damaged is None:
            changed = of_value(random, target)
            damaged = json.loads(json.dumps(batch).replace(json.dumps(target), json.dumps(changed), 1))
        text = as_json(damaged)
        lines[at] = b"%08x %s" % (zlib.crc32(text), text)
        return b"\n".join([*lines, b""])


def _lines(a: bytes, b: bytes) -> Any:
    return zip(a.splitlines(), [*b.splitlines(), *[b""] * 50], strict=False)


def _alike(a: Any, b: Any) -> bool:
    """Whether two values are of one kind all the way down, and numbers are finite."""
    if isinstance(a, bytes) and isinstance(b, bytes):
        a, b = ([json.loads(line) for line in data.splitlines()] for data in (a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_alike(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return all(_alike(x, y) for x, y in zip(a, b, strict=False))
    if isinstance(a, bool) or isinstance(b, bool) or not isinstance(a, (int, float)):
        return type(a) is type(b)
    return isinstance(b, (int, float)) and math.isfinite(a)


def _of(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["key"], row["task"], row["metric"]


def _sealed(data: Any) -> Any:
    return sealed(data) if isinstance(data, dict) else data
