"""`dart-eval ls`: lists that fit a terminal, and whole lines where there is none."""

import io

import pytest

from dart_eval.cli import view
from tests.helpers.commands import command

ROWS = [("mask=prompt", "a mask for each sequence, from the tokens of its context"), ("  score.norm=l2", "")]


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize(("width", "shown"), [
    (120, ["mask=prompt      a mask for each sequence, from the tokens of its context", "  score.norm=l2"]),
    (50, ["mask=prompt      a mask for each sequence, from",
          "                 the tokens of its context", "  score.norm=l2"]),
])  # fmt: skip
def test_a_list_goes_on_below_its_own_column_on_a_terminal(monkeypatch, width, shown):
    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("sys.stdout", terminal)
    view.listed(ROWS)
    assert terminal.getvalue().splitlines() == shown


def test_lines_are_whole_where_no_terminal_is(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    lines = command("ls", "methods", "dart").out.splitlines()
    assert lines[0].startswith("dart:  keeps the neurons most active in the prompt")
    assert "remask.window=10" in next(
        line for line in lines if line.endswith("tokens per window of the detector (at least 1)")
    )
    assert any(len(line) > 80 for line in lines)
