"""`make torture` notices what it is for: defects that are planted fall."""

import random
import time

import pytest

from dart_eval.util.errors import UserError
from scripts import torture
from tests.helpers.commands import Done


def _raises(draw):
    raise ValueError("what a user would see as a traceback")


def _refuses(draw, why="wrong"):
    raise UserError(why, "do it right")


@pytest.mark.parametrize(
    ("case", "beginning"),
    [
        (lambda draw: "read", "read"),
        (_refuses, "refused"),
        (lambda draw: _refuses(draw, "wrong " * 2000), "FELL: Wrong: a refusal is no line"),
        (_raises, "FELL: ValueError: what a user would see"),
    ],
)
def test_what_must_not_be_falls(case, beginning):
    assert torture.tried(case, random.Random(0)).startswith(beginning)


def fuzz(whole, monkeypatch, *answers):
    """A fuzz whose commands answer these, one after the other."""
    made, left = torture.Fuzz(whole), [*answers]
    monkeypatch.setattr(torture, "command", lambda *words: left.pop(0) if len(left) > 1 else left[0])
    return made


class Sweep:
    """A folder with two records, as `torture.Whole` leaves it."""

    def __init__(self, folder):
        self.folder, self.out = folder, folder / "whole" / "out"
        for kind in ("cells", "samples", "texts"):
            (self.out / kind).mkdir(parents=True)
            for number in range(2):
                (self.out / kind / f"{number}.json").write_text('{"value": 1}')


def test_a_changed_number_and_a_traceback_fall(tmp_path, monkeypatch):
    row = '[{"key": "k", "task": "t", "metric": "m", "value": %s, "stderr": null, "n": 4, "effective_sparsity": 0.5}]'
    right, wrong, trace = Done(0, row % 0.5, ""), Done(0, row % 0.75, ""), Done(1, "", "Traceback (most recent ...")
    sweep = Sweep(tmp_path)
    assert torture.tried(fuzz(sweep, monkeypatch, right).samples, random.Random(0)) == "shown"
    found = torture.tried(fuzz(sweep, monkeypatch, right, wrong).samples, random.Random(0))
    assert found.startswith("FELL: Wrong: tables shows other numbers: {('k', 't', 'm'): [0.75,")
    found = torture.tried(fuzz(sweep, monkeypatch, right, right, trace).samples, random.Random(0))
    assert found.startswith("FELL: Wrong: ") and "ends with 1" in found


def test_what_hangs_falls():
    assert torture.tried(lambda draw: time.sleep(60), random.Random(0), 1).startswith("FELL: Wrong: no end")
