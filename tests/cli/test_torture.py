"""`make torture` notices what it is for: planted defects of every kind fall, and a stopped torture goes on."""

import os
import time
from pathlib import Path

import pytest

from dart_eval.util.errors import UserError
from scripts.torture import __main__, fuzz
from scripts.torture.kinds import Kind
from scripts.torture.ledger import Result, Unit


class Planted(Kind):
    """Cases one after the other, most of them wrong."""

    limit = 0.5

    def __init__(self, folder, place):
        super().__init__(folder, place)
        self.left = [*CASES]

    def case(self, random):
        return CASES[self.left.pop(0)](self)


def _raises(case):
    raise ValueError("what a user would see as a traceback")


def _refuses(case):
    raise UserError("wrong", "do it right")


def _strays(case):
    Path(case.folder, "stray").write_text("x")
    return "read"


def _starts(case):
    os.system("true")
    return "read"


CASES = {
    "reads": lambda case: "read", "refuses": _refuses, "raises": _raises, "hangs": lambda case: time.sleep(60),
    "strays": _strays, "starts": _starts, "dies": lambda case: os._exit(3),
}  # fmt: skip


@pytest.mark.process
@pytest.mark.slow
def test_what_must_not_be_falls(tmp_path, monkeypatch):
    for name in ("DART_EVAL_CACHE", "HF_DATASETS_CACHE", "TMPDIR", "PYTHONPATH", "PYTHONWARNINGS"):
        monkeypatch.setenv(name, "")  # what is set below is taken back
    __main__.settle(tmp_path)
    found = fuzz.watched(tmp_path, 0, "planted", fuzz.Of("tests.cli.test_torture.Planted", 7, 1), range(7))
    assert (found.tried, found.told["read"], found.told["refused"]) == (7, 1, 1)
    words = (
        "ValueError: what a user would see", "no end after", f"outside its folder: ['open {tmp_path}/stray'",
        "outside its folder: [\"os.system", "the process died (status 3)",
    )  # fmt: skip
    for line, beginning in zip(found.fell, words, strict=True):
        assert line.partition(": ")[2].startswith(beginning)


def test_a_stopped_torture_goes_on_and_says_what_fell(tmp_path, monkeypatch, capsys):
    ran = []

    def work(name, fell=()):
        ran.append(name)
        if name == "b" and len(ran) == 2:
            raise KeyboardInterrupt
        return Result(2, {"read": 2}, list(fell))

    units = [
        Unit("a", "fuzz: a", lambda: work("a", ["seed 0, case 1: wrong"])),
        Unit("b", "fuzz: b", lambda: work("b")),
    ]
    monkeypatch.setattr(__main__, "every", lambda folder, seed, short: units)
    monkeypatch.setattr(__main__, "settle", lambda folder: None)
    words, page = ["--output", str(tmp_path / "out")], tmp_path / "page.md"
    with pytest.raises(KeyboardInterrupt):
        __main__.main(words)
    assert __main__.main([*words, "--page", str(page)]) == 1
    assert ran == ["a", "b", "b"]
    assert (
        "| fuzz: a | 2 | 1 | 2 read |" in page.read_text() and "* fuzz: a: `seed 0, case 1: wrong`" in page.read_text()
    )
    assert __main__.main([*words, "--seed", "1"]) == 2
    assert "another seed" in capsys.readouterr().err
