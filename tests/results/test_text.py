"""Texts of others reach no terminal, table, CSV, XML or page raw, and every output takes every text."""

import csv
import io
import itertools
import json
import os
import subprocess
import sys
import unicodedata
import xml.etree.ElementTree as ElementTree
from itertools import chain
from types import SimpleNamespace

import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dart_eval.cli import view
from dart_eval.results import check, compare, show, stats
from dart_eval.results.report.build import build
from dart_eval.results.show import Table, data_text
from dart_eval.results.store import Store
from dart_eval.sweep.events import Event
from dart_eval.util.errors import UserError, summary
from dart_eval.util.text import json_text, printable
from tests.helpers.commands import command
from tests.helpers.records import answered, record, render, save

NASTY = [
    "\x1b[31mred", "\x1b]0;title\x07", "a\nb", "a\r\nb", "nul\0", "\x9b2J", "\u202egnp.exe", "\u2066x\u2069", "\ud800",
    "\udc9b", "\ufffe", "\x7f", "a\u2028b", "\u200bx", "=cmd|' /C calc'!A0", "+1+1", "-1+1", "@SUM(1)", "\t=1", "\r=1",
    " =1", "\uff1d1", "a,b;c\"d'e", "-0.5", "[/red]", "[bold]", "\\", ":x:", "a|b", "</script>", "]]>", "\u05d0b",
    "-", "%0A::error::x", "🏳️", "\U000e0041",
]  # fmt: skip
TEXTS = st.one_of(st.sampled_from(NASTY), st.text(st.characters()), st.lists(st.sampled_from(NASTY)).map("".join))
MANY = settings(max_examples=200, deadline=None)


def raw(text, allowed="\n"):
    """The characters of a text that do something where they are shown."""
    hidden = {
        c for c in text
        if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")
        or unicodedata.bidirectional(c) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    }  # fmt: skip
    return hidden - set(allowed)


@given(TEXTS)
@MANY
def test_what_is_printable_holds_nothing_that_acts_and_stays_as_it_is(text):
    shown = printable(text)
    assert raw(shown, "") == set()
    assert printable(shown) == shown
    shown.encode("utf-8")
    assert printable(text, lines=True).count("\n") == text.count("\n")


@pytest.mark.parametrize("text", ["naïve café", "日本語", "שלום", "مرحبا", "👩‍👩‍👧", "±½∞", "x" * 1000])
def test_a_text_without_controls_is_shown_as_it_is(text):
    assert printable(text) == text


def test_escapes_say_what_was_there():
    assert printable("\x1b[2J\0\u202e\ud800") == r"\x1b[2J\x00\u202e\ud800"
    assert printable("one\ntwo\tthree\x85four") == "one two three four"


@given(st.recursive(TEXTS, lambda inner: st.dictionaries(TEXTS, inner) | st.lists(inner), max_leaves=5))
@MANY
def test_json_loses_nothing_and_holds_nothing_raw(data):
    made = json_text(data)
    assert json.loads(made) == json.loads(json.dumps(data))
    assert raw(made) == set()
    made.encode("utf-8")


def csv_of(rows):
    """Rows as CSV, without the heads."""
    return data_text(pd.DataFrame(rows, dtype=object), "csv").partition("\n")[2]


@given(st.lists(st.lists(TEXTS | st.floats() | st.integers() | st.none(), min_size=2, max_size=2), min_size=1))
@MANY
def test_csv_has_its_cells_back(rows):
    made = csv_of(rows)
    assert raw(made) == set()
    back = list(csv.reader(io.StringIO(made)))
    assert [len(row) for row in back] == [2] * len(rows)
    for cell, value in zip(chain(*back), chain(*rows), strict=True):
        if isinstance(value, (int, float)):
            assert cell == ("" if value != value else str(value))
        else:
            assert cell == printable(value or "")


def test_a_gap_is_empty_and_a_mapping_is_json():
    assert csv_of([[-0.5, None, {"a": "\x9b"}]]) == '-0.5,,"{""a"": ""\\u009b""}"\n'


@given(TEXTS, TEXTS, TEXTS)
@MANY
def test_tables_hold_one_line_a_row(title, cell, note):
    table = Table(title, ["a", cell], [[cell, "1"], ["b", cell]], [note or "x"], bold=frozenset({(0, 0)}))
    for made, lines in ((show.markdown(table), 8), (show.latex(table), 13)):
        assert raw(made) == set()
        assert len(made.splitlines()) == lines


@given(TEXTS, TEXTS)
@MANY
def test_junit_is_well_formed_and_annotations_are_one_line(name, why):
    row = {"cell": name, "task": name, "metric": name, "recovery": None, "changed": None, "p_holm": None}
    about = {"headline": name, "thresholds": check.Thresholds().model_dump()}
    report = compare.Comparison(name, [row | {"verdict": check.MISSING, "why": why}], [why], about)
    made = check.junit(report)
    case = ElementTree.fromstring(made.encode("utf-8")).find("testsuite/testcase")
    assert case.get("classname") == printable(name)
    assert raw(made) == set()
    (line,) = check.workflow_commands(report)
    assert raw(line, "") == set()
    assert line.startswith("::error title=") and line.count("\n") == 0
    assert raw(show.render([check.table(report)], "md")) == raw(report.to_json()) == set()


@given(TEXTS)
@MANY
def test_errors_are_one_line(text):
    assert raw(str(UserError(text, text)), "") == set()
    assert raw(summary(ValueError(text)), "") == set()


@given(TEXTS)
@example("\\[")
@example("a\\\\[b] \\[1")
@settings(max_examples=100, deadline=None)
def test_the_terminal_shows_every_text_and_obeys_none(text):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    before = sys.stdout, sys.stderr
    sys.stdout = sys.stderr = stream
    try:
        show.show(Table(text, ["a", text], [[text, "1"]], [text], bold=frozenset({(0, 0)})))
        show.show(Table(text, ["a"], [], [text]))
        terminal = view.TerminalView()
        terminal(Event("wait", text))
        terminal(Event("note", text))
        view.say(text)
        view.put(text)
    finally:
        sys.stdout, sys.stderr = before
    stream.flush()
    shown = stream.buffer.getvalue().decode("utf-8")
    assert raw(shown) == set()
    if printable(text).strip() == text and len(text) < 40:
        assert shown.count(text) >= 8


EVIL = "evil\x1b[31m\x9b\u202e\n=1+1\0"


@pytest.mark.parametrize(("answers", "said"), [
    ([0, 1, 2], "3 of 6 requests, about 90 s left in it"), ([4, 1], "5 of 6 requests, about 60 s left in it"),
    ([3], "3 of 6 requests"),
])  # fmt: skip
def test_a_line_of_a_log_says_how_far_a_cell_is(capsys, monkeypatch, answers, said):
    """Answers of an earlier run come first, and are no speed."""
    cell, clock = SimpleNamespace(key="k", title="arc dense"), itertools.count(0.0, 60.0)
    now = [next(clock)]
    with view.TerminalView() as shown:
        shown.live = False
        shown.progress.get_time = lambda: now[0]
        shown(Event("planned", n=1, of=3))
        shown(Event("started", cell=cell))
        monkeypatch.setattr(view, "EVERY", -1.0)
        for n in answers:
            shown(Event("answered", cell=cell, n=n, of=6))
            now[0] = next(clock)
    assert capsys.readouterr().err.splitlines()[-1] == f"cell 2 of 3, arc dense: {said}"


def test_cells_side_by_side_have_places_of_their_own(capsys, monkeypatch):
    monkeypatch.setattr(view, "EVERY", -1.0)
    with view.TerminalView() as shown:
        shown.live = False
        shown(Event("planned", n=1, of=3))
        cells = [SimpleNamespace(key=i, title=f"cell {i}") for i in range(2)]
        for cell in cells:
            shown(Event("started", cell=cell))
        for cell in cells:
            shown(Event("answered", cell=cell, n=4, of=8))
    said = [line.partition(",")[0] for line in capsys.readouterr().err.splitlines() if "of 8 requests" in line]
    assert said == ["cell 2 of 3", "cell 3 of 3"]


def test_no_name_in_a_record_reaches_a_table_raw():
    made = record(EVIL, model=EVIL, key="k2")
    made.inputs["task"] = EVIL
    for form in ("md", "csv", "tex", "json"):
        assert raw(render([made, record()], form)) == set(), form


def test_no_name_in_a_record_reaches_a_comparison_raw(tmp_path):
    values = [{"acc": float(i % 2)} for i in range(20)]
    save(tmp_path / "a", answered("arc", values, "dart", params={"x": EVIL}))
    save(tmp_path / "b", answered("arc", values[::-1], "dart", params={"x": EVIL}))
    found = compare.compare_folders(tmp_path / "a", tmp_path / "b")
    found.notes.append(EVIL)
    for text in (found.to_json(), *(show.render([compare.table(found)], form) for form in ("md", "csv", "tex"))):
        assert raw(text) == set()
    assert stats.ALPHA < 1


@pytest.mark.parametrize("words", [
    ("tables", "no\x1b[31m\u202e\x9b"), ("run", "--tasks", "\x1b[31m"), ("run", "--method", "\x1b[31m"),
    ("run", "--tasks", "smoke", "--model", "./\x1b[31m\x9b"), ("compare", "\x1b[31m", "b"), ("paper", "\x1b[31m"),
])  # fmt: skip
def test_no_error_reaches_the_terminal_raw(words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shown = command(*words)
    assert (shown.code, shown.out) == (2, "")
    assert raw(shown.err) == set()
    assert r"\x1b[31m" in shown.err or r"\x1b\[31m" in shown.err


def test_a_page_holds_nothing_raw(tmp_path):
    texts = [{"task": "arc", "doc_id": 0, "prompt": EVIL, "choices": [EVIL, "\u202e"], "target": 0}]
    Store(tmp_path).save("cell", answered("arc", [{"acc": 1.0}], "dart", params={"x": EVIL}), texts)
    made = build(Store(tmp_path))
    assert raw(made) == set() and made.count(r"evil\x1b[31m\x9b\u202e") > 2


# -- locales -------------------------------------------------------------------------------------------------------


ASCII = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


# A process takes its locale when it starts; two commands in one, for it is slow to start.
COMMANDS = """
import contextlib, sys
from dart_eval.cli import main
for more in [], sys.argv[1:]:
    sys.argv = ["dart-eval", "compare", "out", "out", "--format", "FORM", *more]
    with contextlib.suppress(SystemExit):
        main()
"""


@pytest.mark.process
@pytest.mark.parametrize("form", ["md", "json", "csv"])
def test_pipes_and_files_are_utf8_under_an_ascii_locale(tmp_path, form):
    values = [{"acc": float(i % 2)} for i in range(20)]
    save(tmp_path / "out", answered("arc", values, "dart", params={"x": "ünï ±"}), answered("arc", values, "dart"))
    code = COMMANDS.replace("FORM", form)
    done = subprocess.run(
        [sys.executable, "-c", code, "--save", f"t.{form}"], cwd=tmp_path, env={**os.environ, **ASCII},
        capture_output=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    for text in (done.stdout, (tmp_path / f"t.{form}").read_bytes()):
        assert "ünï ±" in text.decode("utf-8")
