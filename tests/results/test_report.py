"""The report page: what it says, that it is made of whatever is there, and that nothing in it escapes."""

import dataclasses
import re

import pytest
import typer
from typer.testing import CliRunner

from dart_eval.cli.report import report
from dart_eval.results import store as reading
from dart_eval.results.blocks import Block, BoardRow, Level
from dart_eval.results.report import build, head
from dart_eval.results.store import Store
from dart_eval.util.errors import UserError
from dart_eval.util.files import read_regular
from tests.helpers.pages import FEW, HOSTILE, PARTS, Checked, folder, only, texts
from tests.helpers.records import cell, save, written
from tests.results.test_board import choices

# -- what it says --------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_wrote(tmp_path, capsys):
    folder(tmp_path / "out", methods=FEW)
    report(tmp_path / "out", tmp_path / "x" / "page.html", "A title", 2)
    size = f"{(tmp_path / 'x' / 'page.html').stat().st_size / 1e6:.1f}"
    assert capsys.readouterr().out == f"wrote {tmp_path / 'x' / 'page.html'} (6 cells, 8 samples, {size} MB)\n"
    assert "<h1>A title</h1>" in (tmp_path / "x" / "page.html").read_text()


def test_a_page_that_cannot_be_written_is_one_line(tmp_path):
    folder(tmp_path / "out", methods=FEW)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*choose another --output"):
        report(tmp_path / "out", tmp_path / "file" / "page.html", None, 0)


def test_a_folder_without_results_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no results in"):
        build(Store(tmp_path))


def test_every_section_is_there_and_the_html_is_well_formed(page):
    html = page.read_text()
    made = Checked(html)
    for section in ("answer", "board", "quality", "documents", "numbers"):
        assert section in made.ids
        assert f'href="#{section}"' in html
    assert len(made.ids) == len(set(made.ids))
    assert [t for t in made.tags if t in ("h1", "h2")] == ["h1"] + ["h2"] * 5


def test_the_page_needs_nothing_from_outside(page):
    html = page.read_text()
    attributes = Checked(html).attributes
    assert any(v and v.startswith("default-src 'none'; script-src 'sha256-") for k, v in attributes if k == "content")
    links = [v for k, v in attributes if k in ("src", "href", "srcset", "action", "data")]
    assert {v for v in links if not v.startswith("#")} == {"data:,"}
    assert "http" not in re.sub(r"http-equiv", "", html)


def test_the_answer_stands_on_top_and_says_what_the_tests_say(page):
    html = page.read_text()
    assert "<p>At 50 % and 30 % the tests find no winner; the table shows the first row.</p>" in html
    rows = re.findall(r'<tr><th scope="row">(.*?)</th><td data-head="FFN bytes read">(.*?)</td>', html)
    assert rows == [('dart <span class="tag">no winner</span>', read) for read in ("50 %", "30 %")]
    first = re.search(r'(?s)<table class="answer">.*?</tr>\s*</tbody>', html)[0]
    assert 'data-head="above guessing">70 % [' in first and 'data-head="costs">3.0 kB beside, &lt; 0.01 % work' in first
    assert html.index('id="answer"') < html.index('id="board"')


def test_rounding_that_wins_is_the_answer_and_a_method_alone_is_called_so(tmp_path):
    row = BoardRow("dart", "dart", 0.5, 0.5, "pruned")
    best = dataclasses.replace(row, label="dense on 4 bits", kind="rounding", read=0.3)
    levels = Level((row,)), Level((row,), take=row), Level((row, best), ("said",), True, best)
    sentence, heads, rows = head.answer(Block({}, "scored", levels))
    assert sentence == "Best for the FFN bytes it reads: dense on 4 bits at 30 %."
    assert [(r.label, remark) for r, remark, _ in rows] == [("dart", "only one"), ("dense on 4 bits", "best")]
    assert heads[0] == "FFN bytes read" and rows[1][2][0] == "30 %"


def test_the_board_says_what_the_tests_say(page):
    html = page.read_text()
    rows = re.findall(r'<tr class=""(.*?)><th scope="row">(.*?)</th>', html)[:6]
    reads = [f' data-method="{name}" data-read="{read}"' for read in ("0.500", "0.300") for name in ("dart", "griffin")]
    assert rows == [
        ("", 'dense <span class="tag">control</span>'), ("", "guessing"), (reads[0], "dart"), (reads[1], "griffin"),
        (reads[2], "dart"), (reads[3], "griffin"),
    ]  # fmt: skip
    assert "<li>At 50 % no row is told apart from dart, which has " in html
    assert html.count("~ no significant difference from it") == 1
    assert html.index('id="board"') < html.index('id="quality"')


def test_machines_are_named(tmp_path):
    store = Store(tmp_path)
    for method, environment in {"dense": {"gpu": "Card A"}, "griffin": {"threads": "2"}, "random": {}}.items():
        made = cell(method, 0.5 * (method != "dense"))
        environment = {"machine": "x86_64", **environment}
        store.save(f"t-{method}", dataclasses.replace(made, environment=environment), [])
    html = build(store).html
    assert "x86_64, x86_64 with 2 threads and x86_64 with Card A" in html


def test_every_cell_has_its_command(page):
    html = page.read_text()
    assert html.count("<td>dart-eval run --method") == 15
    assert '<th scope="row">griffin 70 % on xsum</th><td>dart-eval run --method griffin --tasks xsum</td>' in html


def test_every_file_is_read_once(tmp_path, monkeypatch):
    store, files = folder(tmp_path), []
    monkeypatch.setattr(reading, "read_regular", lambda path: (files.append(path), read_regular(path))[1])
    build(store)
    assert len(files) == len(set(files)) == 15 + 15 + 2  # records, samples, and texts of two tasks


def test_equal_folders_give_equal_bytes(tmp_path):
    first, second = (folder(tmp_path / name, methods=FEW) for name in "ab")
    assert build(first).html == build(second).html


def test_boards_of_several_models_share_a_legend(tmp_path):
    html = build(PARTS["several models"](tmp_path)).html
    assert re.findall("<h3>(.)</h3>", html)[:2] == ["x", "y"] and html.count('<table class="board sortable">') == 2
    assert html.count("[95 % interval, Fieller]") == 1


# -- missing parts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
def test_a_page_is_made_of_whatever_is_there(tmp_path, part):
    store = PARTS[part](tmp_path)
    made = build(store)
    Checked(made.html)
    assert made.cells == len(store.load())
    assert "nan" not in re.findall(r'(?: d|x|y|transform)="[^"]*nan', made.html)


def test_damaged_or_missing_samples_are_said(tmp_path):
    store = folder(tmp_path)
    file = next((tmp_path / "samples").glob("adart0.7*"))
    file.write_text("{}")
    next((tmp_path / "samples").glob("adart0.5*")).unlink()
    for text in (tmp_path / "texts").iterdir():
        text.unlink()
    html = build(store).html
    assert "Samples could not be read for dart 50 % on arc_easy and dart 70 % on arc_easy" in html
    assert "Prompts could not be read for dense on arc_easy, dense on xsum, " in html
    assert "<h4>Prompt</h4>" not in html and "dense wrote 0" in html


def test_a_record_that_cannot_be_read_is_named_and_the_others_are_shown(tmp_path, capsys):
    store = folder(tmp_path)
    file = next((tmp_path / "cells").glob("adart0.7*"))
    file.write_text("{")
    made = build(store)
    assert made.cells == 14
    assert f"The page leaves out 1 record that could not be read: {file.name}." in made.html
    assert f"left out: {file} cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(("part", "text"), [
    ("mixed", "Cells differ in code: c0de and other."), ("mixed", "Computed in bfloat16"),
    ("mixed", "There is no dense cell for arc_easy"), ("nan", "There is no finite value for dense on arc_easy"),
    ("only perplexity", "w had 9 documents: with more, the order may change."),
])  # fmt: skip
def test_warnings(tmp_path, part, text):
    assert text in build(PARTS[part](tmp_path)).html


def test_no_documents_where_none_are_wanted(tmp_path):
    made = build(folder(tmp_path, methods=FEW), wanted=0)
    assert made.samples == 0
    assert 'id="documents"' not in made.html
    assert "griffin wrote" not in made.html


def test_what_is_left_out_is_said(tmp_path):
    store = Store(tmp_path)
    long = "word " * 5000
    store.save("c", cell(task="xsum", samples=[written(i, long) for i in range(5)]), texts("xsum", 5, prompt=long))
    made = build(store, wanted=2)
    assert made.samples == 2
    assert "3 more are not on this\npage" in made.html
    assert "characters left out" in made.html
    assert len(made.html) < 300_000


def test_a_title_that_is_no_unicode_can_be_written(tmp_path):
    assert r"a\udc00b" in build(only(cell())(tmp_path), title="a\udc00b").html


def test_failed_cells_are_named(tmp_path):
    store = folder(tmp_path, methods=FEW)
    store.failed("boolq-cats-0.5", "k" * 64, "why")
    assert "Failed, see the folder failed: boolq-cats-0.5." in build(store).html


# -- safety --------------------------------------------------------------------------------------------------------


def test_hostile_names_and_texts_are_escaped(tmp_path):
    html = build(folder(tmp_path, HOSTILE, FEW), title=HOSTILE).html
    made = Checked(html)
    assert made.tags.count("script") == 1
    assert "img" not in made.tags
    assert not [k for k, _ in made.attributes if k.startswith("on")]
    assert "{{7*7}}" in html  # is not evaluated


# -- the command line ----------------------------------------------------------------------------------------------


def test_options_of_the_command(tmp_path):
    app = typer.Typer()
    app.command()(report)
    folder(tmp_path, methods=FEW)
    run = CliRunner().invoke(app, [str(tmp_path), "--samples", "1", "--title", "A & B"])
    assert run.exit_code == 0, run.output
    assert "6 cells, 4 samples" in run.output
    assert "<title>A &amp; B</title>" in (tmp_path / "report.html").read_text()
    assert CliRunner().invoke(app, [str(tmp_path), "--samples", "-1"]).exit_code == 2


def answer_of(folder):
    """The section that says which method to take, and the levels that the filter offers."""
    html = build(Store(folder), None, 0).html
    top, _, rest = html.partition('<form id="filter"')
    return top[top.index('id="answer"') :], re.findall(r'<option value="[^"]+">(.*?)</option>', rest)


def test_rounding_that_wins_twice_is_one_answer_and_hides_no_level(tmp_path):
    cells = [choices(0.5, sparsity=s) for s in (0.3, 0.5)]
    best = choices(0.78, method="dense", read=0.3, ffn_bits="4")
    said, levels = answer_of(save(tmp_path, choices(0.8, method="dense"), best, *cells))
    assert "Best for the FFN bytes it reads: dense on 4 bits at 30 %.</p>" in said
    assert said.count('<th scope="row">dense on 4 bits') == 1
    assert levels == ["70 %", "50 %", "30 %"]


def test_a_method_alone_that_beats_rounding_is_no_open_question(tmp_path):
    worse = choices(0.4, method="dense", read=0.28, ffn_bits="4")
    said, _ = answer_of(save(tmp_path, choices(0.8, method="dense"), choices(0.75), worse))
    assert "no winner" not in said and '<span class="tag">only one</span>' in said
    equal = choices(0.75, method="dense", read=0.28, ffn_bits="4")
    said, _ = answer_of(save(tmp_path / "b", choices(0.8, method="dense"), choices(0.75), equal))
    assert "At 30 % the tests find no winner" in said


def test_the_answer_is_of_the_first_block_that_has_one(tmp_path):
    """Rounding ran on two tasks, and a method on one of them so far."""
    cells = [choices(0.8, task, "dense") for task in ("arc", "piqa")]
    cells += [choices(0.7, task, "dense", read=b / 16, ffn_bits=str(b)) for task in ("arc", "piqa") for b in (4, 8)]
    said, _ = answer_of(save(tmp_path, *cells, choices(0.7)))
    assert "There is no pruned method" not in said and '<th scope="row">griffin' in said
    assert "On these tasks alone: arc x 200." in said
