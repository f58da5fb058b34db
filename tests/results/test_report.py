"""The report page: what it says, that it is made of whatever is there, and that nothing in it escapes."""

import re

import pytest
from matplotlib.figure import Figure

from dart_eval.cli.report import report
from dart_eval.results.board import boards
from dart_eval.results.report import build, charts
from dart_eval.results.store import Store
from dart_eval.util.errors import UserError
from tests.helpers.pages import FEW, HOSTILE, PARTS, Checked, choices, folder, texts
from tests.helpers.records import answered, cell, choosing, save, written


def test_the_command_writes_the_page_where_it_may(tmp_path, capsys):
    folder(tmp_path / "out", methods=FEW)
    page = tmp_path / "x" / "page.html"
    report(tmp_path / "out", page, 2)
    assert str(page) in capsys.readouterr().out
    assert "<h1>Pruning evaluation of " in page.read_text()
    with pytest.raises(UserError, match="--output"):
        report(tmp_path / "out", page / "page.html", 0)
    with pytest.raises(UserError, match="no results in"):
        build.build(Store(tmp_path))


def test_the_page_needs_nothing_from_outside_and_is_well_formed(page):
    html = page.read_text()
    attributes = Checked(html).attributes
    assert any(v and v.startswith("default-src 'none'; script-src 'sha256-") for k, v in attributes if k == "content")
    links = {v for k, v in attributes if k in ("src", "href", "srcset", "action", "data")}
    assert {v.partition(",")[0] for v in links if not v.startswith("#")} == {"data:", "data:image/svg+xml;base64"}
    assert "http" not in html.replace("http-equiv", "")


def test_equal_folders_give_equal_bytes(tmp_path):
    assert len({build.build(folder(tmp_path / name)) for name in "ab"}) == 1


def test_hostile_names_and_texts_are_escaped(tmp_path):
    html = build.build(folder(tmp_path, HOSTILE))
    checked = Checked(html)
    assert (
        checked.tags.count("script") == 1 and checked.tags.count("img") == 1 and ("src", "x") not in checked.attributes
    )
    assert not [k for k, _ in checked.attributes if k.startswith("on")]
    assert "{{7*7}}" in html


def test_the_verdict_stands_on_top_with_the_row_to_take(tmp_path):
    best = choices(0.78, method="dense", read=0.3, ffn_bits="4")
    html = build.build(Store(save(tmp_path, choices(0.8, method="dense"), best, choices(0.5))))
    top = html[: html.index('id="board"')]
    assert "At 30 %" in top and "Take <b>dense on 4 bits</b>." in top


def test_every_number_of_the_board_leads_to_its_documents(page):
    html = page.read_text()
    head = r'<th scope="row">(\w+) </th><td data-head="FFN bytes read">([\d %]*)</td>'
    rows = re.findall(rf"(?s)<tr>{head}(.*?)</tr>", html)
    reads = [("dense", "100 %"), ("guessing", ""), *((m, r) for r in ("50 %", "30 %") for m in ("dart", "griffin"))]
    assert [row[:2] for row in rows] == reads
    links = [re.findall(r'data-head="([^"]*)"[^>]*><a href="#([^"]*)"', row[2]) for row in rows]
    assert dict(links[0])["accuracy"] == "task=arc_easy" and links[1] == []
    assert dict(links[2])["flips"] == "task=arc_easy&amp;row=1&amp;differ=1"
    assert dict(links[2])["ROUGE-L"] == "task=xsum&amp;row=1&amp;differ=1"


def test_every_cells_answers_are_on_the_page_beside_dense(page):
    html = page.read_text()
    assert html.count("<tr data-row=") == 5 * (8 + 3)
    assert html.count('class="differs"') == 4 * 3 + 1 + 2 + 3 + 4  # all texts, and the answers that dense had right
    document = re.findall(r'(?s)<details class="document"><summary>0: Text.*?</details>', html)[0]
    assert "The reference" in document and "rougeL 0.25" in document
    for method in ("dense", "dart", "griffin"):
        assert f"{method} wrote 0" in document
    assert '<li class="right">two</li>' in html and '<td class="right">2. two</td>' in html


# -- missing parts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
def test_a_page_is_made_of_whatever_is_there(tmp_path, part):
    html = build.build(PARTS[part](tmp_path))
    Checked(html)
    assert ">nan" not in html


def test_damaged_or_missing_parts_are_named(tmp_path, capsys):
    store = folder(tmp_path)
    next((tmp_path / "samples").glob("adart0.7*")).write_text("{}")
    next((tmp_path / "samples").glob("adart0.5*")).unlink()
    broken = next((tmp_path / "cells").glob("agriffin0.7*"))
    broken.write_text("{")
    for text in (tmp_path / "texts").iterdir():
        text.unlink()
    store.failed("boolq-cats-0.5", "k" * 64, "why")
    html = build.build(store)
    assert re.search(r"Samples or prompts .*: dense on arc_easy, .*dart on arc_easy", html)
    assert "boolq-cats-0.5" in html and "dense wrote 0" in html
    assert broken.name in capsys.readouterr().err


@pytest.mark.parametrize(("part", "text"), [
    ("mixed", "There is no dense cell for arc_easy"),
    ("only perplexity", "Fewer than 100 documents"),
])  # fmt: skip
def test_warnings(tmp_path, part, text):
    assert text in build.build(PARTS[part](tmp_path))


def test_documents_are_left_out_where_asked_and_long_texts_are_cut(tmp_path):
    store, long = Store(tmp_path), "word " * 5000
    store.save("c", cell(task="xsum", samples=[written(i, long) for i in range(5)]), texts("xsum", 5, prompt=long))
    html = build.build(store, wanted=2)
    assert html.count("<tr data-row=") == 2 and "characters left out" in html and len(html) < 100_000
    assert "<tr data-row=" not in build.build(store, wanted=0)


def test_choices_that_were_scored_twice_count_once():
    """With acc_mutual_info lm-eval adds each choice's score without its context."""
    made = choosing(answered("t", [{"acc": v, "acc_mutual_info": v} for v in (1.0, 0.0)], "dense", 0.0), 8)
    made.samples[0]["responses"][6] = [0.0, False]  # the likeliest without the question
    assert build._answer(made.samples[0], ["a", "b", "c", "d"])[0] == "1. a"


# -- charts --------------------------------------------------------------------------------------------------------


def test_a_chart_of_one_read_is_not_drawn(tmp_path):
    cells = choices(0.8, method="dense"), choices(0.5), choices(0.6, method="dart")
    one = Store(save(tmp_path / "a", *cells))
    two = Store(save(tmp_path / "b", *cells, choices(0.7, sparsity=0.5)))
    assert "<img" not in build.build(one) and build.build(two).count("<img") == 1
    assert charts.charts(boards(one, one.load())[0]) == []
    starts = {form: charts.draw(boards(two, two.load()), form)[:5] for form in ("svg", "png", "pdf")}
    assert starts == {"svg": b"<?xml", "png": b"\x89PNG\r", "pdf": b"%PDF-"}


def test_names_fit_and_that_of_a_point_beyond_the_axis_says_its_value(monkeypatch):
    figures, save_figure = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save_figure(self, *a, **k)))
    lines = {f"m{i}": [(0.5, 1.1, 1.0, 1.2), (0.3, 1.1, 1.0, 1.2)] for i in range(20)}
    lines["far"] = [(0.3, 378.0, 300, 400)]
    charts.plot("t", lines, [*lines], times=True, form="png")
    figures[0].draw_without_rendering()
    (axes,) = figures[0].axes
    names = axes.get_legend().get_texts()
    assert [names[0].get_text(), names[-1].get_text(), len(names)] == ["far: 378x", "dense", 22]
    assert all(figures[0].bbox.contains(*corner) for name in names for corner in name.get_window_extent().get_points())
