"""Texts of others reach no terminal, table, CSV, XML or page raw, and every output takes every text."""

import csv
import io
import json
import os
import re
import subprocess
import sys
import unicodedata
import xml.etree.ElementTree as ElementTree
from itertools import chain

import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dart_eval.cli import view
from dart_eval.results import check, compare, show
from dart_eval.results.report.build import build
from dart_eval.results.show import Table, data_text
from dart_eval.results.store import Store
from dart_eval.sweep.events import Event
from dart_eval.util.errors import UserError, summary
from dart_eval.util.text import json_text, printable
from tests.helpers.records import answered, render, save, table_body

EVIL = "evil<b>[a](b)\x1b[31m\x9b\u202e\n=1+1\0"
NASTY = [
    "\x1b[31mred", "\x1b]0;title\x07", "a\nb", "a\r\nb", "nul\0", "\x9b2J", "\u202egnp.exe", "\u2066x\u2069", "\ud800",
    "\udc9b", "\ufffe", "\x7f", "a\u2028b", "\u200bx", "=cmd|' /C calc'!A0", "+1+1", "-1+1", "@SUM(1)", "\t=1", "\r=1",
    " =1", "\uff1d1", "a,b;c\"d'e", "-0.5", "[/red]", "[bold]", "\\", ":x:", "a|b", "</script>", "]]>", "\u05d0b",
    "-", "%0A::error::x", "🏳️", "\U000e0041",
]  # fmt: skip
TEXTS = st.one_of(st.sampled_from(NASTY), st.text(st.characters()), st.lists(st.sampled_from(NASTY)).map("".join))


def raw(text, allowed="\n"):
    """The characters of a text that do something where they are shown."""
    hidden = {
        c for c in text
        if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")
        or unicodedata.bidirectional(c) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    }  # fmt: skip
    return hidden - set(allowed)


@given(TEXTS)
@settings(max_examples=200)
def test_what_is_printable_holds_nothing_that_acts_and_stays_as_it_is(text):
    shown = printable(text)
    assert raw(shown, "") == raw(str(UserError(text, text)), "") == raw(summary(ValueError(text)), "") == set()
    assert printable(shown) == shown
    shown.encode("utf-8")
    assert printable(text, lines=True).count("\n") == text.count("\n")


def test_a_text_without_controls_is_shown_as_it_is():
    for text in ("naïve café", "日本語", "שלום", "مرحبا", "👩‍👩‍👧", "±½∞", "x" * 1000):
        assert printable(text) == text


@given(st.recursive(TEXTS, lambda inner: st.dictionaries(TEXTS, inner) | st.lists(inner), max_leaves=5))
@settings(max_examples=150)
def test_json_loses_nothing_and_holds_nothing_raw(data):
    made = json_text(data)
    assert json.loads(made) == json.loads(json.dumps(data))
    assert raw(made) == set()
    made.encode("utf-8")


@given(st.lists(st.lists(TEXTS | st.floats() | st.integers() | st.none(), min_size=2, max_size=2), min_size=1))
@settings(max_examples=150)
def test_csv_has_its_cells_back(rows):
    made = data_text(pd.DataFrame(rows, dtype=object), "csv").partition("\n")[2]
    assert raw(made) == set()
    back = list(csv.reader(io.StringIO(made)))
    assert [len(row) for row in back] == [2] * len(rows)
    for cell, value in zip(chain(*back), chain(*rows), strict=True):
        if isinstance(value, (int, float)):
            assert cell == ("" if value != value else str(value))
        else:
            assert cell == printable(value or "")


@given(TEXTS, TEXTS, TEXTS)
@settings(max_examples=100)
def test_tables_hold_one_line_a_row_and_junit_is_well_formed(name, cell, note):
    table = Table(name, ["a", cell], [[cell, "1"], ["b", cell]], [note or "x"], bold=frozenset({(0, 0)}))
    for made, lines in ((show.markdown(table), 8), (show.latex(table), 13)):
        assert raw(made) == set()
        assert len(made.splitlines()) == lines
    assert {len(row) for row in table_body(show.markdown(table).replace(r"\|", "/"))} == {2}
    row = {"cell": name, "task": name, "metric": name, "recovery": None, "changed": None, "p_holm": None}
    about = {"headline": name, "thresholds": check.Thresholds().model_dump()}
    report = compare.Comparison(name, [row | {"verdict": check.MISSING, "why": note}], [note], about)
    made = check.junit(report)
    case = ElementTree.fromstring(made.encode("utf-8")).find("testsuite/testcase")
    assert case.get("classname") == printable(name)
    (line,) = check.workflow_commands(report)
    assert raw(made) == raw(line, "") == raw(report.to_json()) == set()
    assert line.startswith("::error title=") and "\n" not in line


@given(TEXTS)
@example("\\[")
@example("a\\\\[b] \\[1")
@settings(max_examples=50)
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


def test_no_name_in_a_record_reaches_a_table_a_comparison_or_a_page_raw(tmp_path):
    values, model = [{"acc": float(i % 2)} for i in range(20)], {"name": EVIL, "revision": None, "weights": "f00d"}
    records = [answered(EVIL, v, "dart", params={"x": EVIL}, model=model) for v in (values, values[::-1])]
    texts = [{"task": EVIL, "doc_id": 0, "prompt": EVIL, "choices": [EVIL, "\u202e"], "target": 0}]
    for name, record in zip("ab", records, strict=True):
        Store(tmp_path / name).save("cell", record, texts)
    found = compare.compare_folders(tmp_path / "a", tmp_path / "b")
    made = [render(records[:1], form) for form in ("md", "csv", "tex", "json")]
    made += [found.to_json(), *(show.render([compare.table(found)], form) for form in ("md", "csv", "tex"))]
    made.append(build(Store(tmp_path / "a")))
    assert not re.search(r"(?<!\\)<[a-z/!]|(?<!\\)\]\(", made[0] + made[5])  # tags and links, as Markdown has them
    assert [raw(text) for text in made] == [set()] * 9 and all("evil" in text for text in made)


ASCII = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.process
def test_pipes_and_files_are_utf8_under_an_ascii_locale(tmp_path):
    """A process takes its locale when it starts; all forms in one, for it is slow to start."""
    values = [{"acc": float(i % 2)} for i in range(20)]
    save(tmp_path / "out", answered("arc", values, "dart", params={"x": "ünï ±"}), answered("arc", values, "dart"))
    code = """
import contextlib, sys
from dart_eval.cli import main
for form in "md", "json", "csv":
    for more in [], ["--save", f"t.{form}"]:
        sys.argv = ["dart-eval", "compare", "out", "out", "--format", form, *more]
        with contextlib.suppress(SystemExit):
            main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, **ASCII}, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    files = [(tmp_path / f"t.{form}").read_bytes() for form in ("md", "json", "csv")]
    assert all("ünï ±" in text.decode("utf-8") for text in files)
    assert done.stdout.decode("utf-8").count("ünï ±") >= 3
