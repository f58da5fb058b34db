"""A small sweep on a tiny random model, undisturbed: what all others are held against."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from tests.helpers.commands import program, results
from tests.helpers.models import save_tiny, word_tokenizer

METHODS = "dense,griffin,dart:remask.window=3:remask.min_windows=1:remask.ring=5,grinqh,flap"
RUN = (
    "run", "--model", "../model", "--output", "out", "--tasks", "smoke_questions,smoke_summary", "--method", METHODS,
    "--sparsity", "0.5", "--limit", "4", "--batch-size", "2",
)  # fmt: skip
UPDATE = ("check", "out", "--baseline", "own.json", "--update")
CHECK = ("check", "out", "--baseline", "../whole/own.json", "--junit", "junit.xml")
EXPORT = ("export", "out", "--to", "lm-eval", "--output", "exported", "--force")


class Whole:
    """The undisturbed sweep in `folder`/whole, made once; `folder`/model is its model.

    Attributes:
        seconds: the first word of a command -> how long it took.
    """

    def __init__(self, folder: Path) -> None:
        self.place, told = folder / "whole", folder / "whole.json"
        if not told.exists():
            for old in (self.place, folder / "model"):
                shutil.rmtree(old, ignore_errors=True)
            self.place.mkdir()
            save_tiny(folder / "model", word_tokenizer())
            self._time(RUN)  # what is imported, calibrated and indexed by the first run counts in no other
            shutil.rmtree(self.place / "out")
            told.write_text(json.dumps({words[0]: self._time(words) for words in (RUN, UPDATE, CHECK, EXPORT)}))
        self.seconds: dict[str, float] = json.loads(told.read_text())

    def _time(self, words: tuple[str, ...]) -> float:
        begun = time.monotonic()
        _done(words, self.place)
        return time.monotonic() - begun

    def differences(self, place: Path, words: tuple[str, ...]) -> list[str]:
        """What a command has left in another sweep's folder that it would not have left there undisturbed."""
        if not (place / "out").exists():
            return []
        a, b = results(place / "out"), results(self.place / "out")
        if words is UPDATE:
            a, b = ({"own.json": (at / "own.json").read_bytes()} for at in (place, self.place))
        if words is EXPORT:  # of the same records: each names its own moment
            _done((*EXPORT[:-2], "clean", "--force"), place)
            a, b = tree(place / "exported"), tree(place / "clean")
        names = [f"{name} differs" for name in sorted({*a, *b}) if a.get(name) != b.get(name)]
        for path in filter(Path.is_file, [*(place / "out").rglob("*"), *(place / "exported").rglob("*")]):
            if path.parent.name in ("partial", "failed") or path.name[0] == ".":
                names.append(f"{path.relative_to(place)} is left over")
        return names


def tree(folder: Path) -> dict[str, bytes]:
    """The files below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _done(words: tuple[str, ...], place: Path) -> None:
    done = program(*words, cwd=place)
    if done.returncode:
        raise RuntimeError(f"undisturbed, {' '.join(words)} ends with {done.returncode}: {done.stderr[-2000:]}")
