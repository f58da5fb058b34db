"""The report page: it is made of whatever is there, nothing in it escapes, and how it behaves in a browser."""

import dataclasses
import itertools
import math
import re

import pytest

from dart_eval.results.board import boards
from dart_eval.results.record import Metric
from dart_eval.results.report import build, charts
from dart_eval.results.store import Store
from dart_eval.util.errors import UserError
from tests.helpers.boards import choices
from tests.helpers.commands import command
from tests.helpers.pages import HOSTILE, folder, texts
from tests.helpers.records import cell, save, written


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page of a folder with everything in it, and one with hostile names and texts, as the command writes them."""
    path = tmp_path_factory.mktemp("report")
    for name, hostile in (("plain", ""), ("hostile", HOSTILE)):
        folder(path / name, hostile)
        done = command("report", path / name, "--output", path / f"{name}.html")
        assert done.code == 0 and f"{name}.html" in done.out
    return path / "plain.html", path / "hostile.html"


def test_equal_folders_give_equal_bytes_that_nothing_escapes(pages, tmp_path):
    plain, hostile = (page.read_text() for page in pages)
    assert build.build(folder(tmp_path)) == plain
    assert "http" not in plain.replace("http-equiv", "") and "{{7*7}}" in hostile
    assert hostile.count("<script") == plain.count("<script") == 1 and "<img src=x" not in hostile
    with pytest.raises(UserError, match="no results in"):
        build.build(Store(tmp_path / "empty"))


def scored(value, stderr=0.02):
    return [Metric("arc_easy", "acc", value, stderr, 400, True)]


def both(**more):
    return [cell(m, s, **more) for m, s in (("dense", 0.0), ("dart", 0.5))]


PARTS = {
    "dense only": [cell("dense", 0.0)], "no dense": [cell(), cell("griffin")],
    "several models": [*both(model="x"), *both(model="y")],
    "only perplexity": both(task="w", metrics=[Metric("w", "word_perplexity", 20.0, 1.0, 9, False)]),
    "no error": both(metrics=scored(0.5, None)), "nan": both(metrics=scored(math.nan, math.inf)),
    "infinite": [*both(), cell("griffin", metrics=scored(math.inf))], "zeros": both(metrics=scored(0.0, 0.0)),
    "no flops": [cell("dense", 0.0), dataclasses.replace(cell(), flops={}, settings={})],
    "no metrics": [cell(metrics=[])],
    "a group": [cell(metrics=[*scored(0.5), Metric("arc_law", "acc", 0.4, 0.1, 20, True, "arc_easy")])],
    "many": [cell("dense", 0.0), *(cell(f"method-{i}", s) for i in range(12) for s in (0.3, 0.5, 0.7))],
    "mixed": [cell("dense", 0.0, code="other"), cell(dtype="bfloat16"), cell("griffin", seed=1)],
}  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_a_page_is_made_of_whatever_is_there(tmp_path, part):
    html = build.build(Store(save(tmp_path, *PARTS[part])))
    assert ">nan" not in html


def test_damaged_or_missing_parts_are_named_and_documents_can_be_left_out(tmp_path, capsys):
    store = folder(tmp_path)
    next((tmp_path / "samples").glob("adart0.7*")).write_text("{}")
    next((tmp_path / "samples").glob("adart0.5*")).unlink()
    broken = next((tmp_path / "cells").glob("agriffin0.7*"))
    broken.write_text("{")
    for text in (tmp_path / "texts").iterdir():
        text.unlink()
    store.failed("boolq-cats-0.5", "k" * 64, "why")
    html = build.build(store)
    assert "dart on arc_easy" in html and "boolq-cats-0.5" in html and "dense wrote 0" in html
    assert broken.name in capsys.readouterr().err
    long = "word " * 5000
    store = Store(tmp_path / "long")
    store.save("c", cell(task="xsum", samples=[written(i, long) for i in range(5)]), texts("xsum", 5, prompt=long))
    assert [build.build(store, wanted).count("<tr data-row=") for wanted in (2, 0)] == [2, 0]
    assert len(build.build(store, 2)) < 100_000


def test_a_chart_of_one_read_is_not_drawn_nor_one_of_a_model_that_only_guesses(tmp_path):
    cells, weak = (choices(0.8, method="dense"), choices(0.5)), (choices(0.25, method="dense"), choices(0.3))
    one, two = (
        save(tmp_path / name, *some) for name, some in (("a", cells), ("b", (*cells, choices(0.7, sparsity=0.5))))
    )
    assert charts.charts(boards(Store(one), Store(one).load())[0]) == []
    for form, starts in (("svg", b"<?xml"), ("png", b"\x89PNG\r"), ("pdf", b"%PDF-")):
        assert command("tables", two, "--save", tmp_path / f"a.{form}").code == 0
        assert (tmp_path / f"a.{form}").read_bytes().startswith(starts)
    refused = command("tables", save(tmp_path / "weak", *weak), "--save", tmp_path / "b.svg")
    assert refused.code == 2 and "guessing" in refused.err


def test_a_picture_names_each_line_beside_it_and_what_is_beyond_at_the_edge(monkeypatch):
    """No point is moved, no name crosses a line or another name, and a row beyond the axis is an arrow."""
    texts, drawn, stock = [], {}, charts._name

    def name(axes, lines, taken, colors):
        drawn.update({line.get_color(): line.get_xydata().tolist() for line in axes.lines[1:]})
        before = [*axes.texts]
        stock(axes, lines, taken, colors)
        renderer = charts.FigureCanvasAgg(axes.figure).get_renderer()
        boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in axes.texts if t not in before]
        paths = [axes.transData.transform(line.get_xydata()) for line in axes.lines[1:]]
        texts.extend(boxes)
        assert not any(charts.Path(path).intersects_bbox(box, filled=False) for path in paths for _, box in boxes)
        assert not any(a.overlaps(b) for (_, a), (_, b) in itertools.combinations(boxes, 2))

    monkeypatch.setattr(charts, "_name", name)
    points = {"far": [(0.5, 8.46), (0.3, 29.9)], "a": [(0.5, 1.0), (0.3, 1.02), (0.16, 1.4)]}
    points |= {"b": [(0.5, 1.0), (0.3, 1.01), (0.16, 1.2), (0.1, 1.7)], "c": [(0.5, 1.4), (0.3, 5.8)]}
    lines = {label: [(x, y, y, y) for x, y in of_label] for label, of_label in points.items()}
    both = [charts.plot("", own, [*"abc", "far"], True, "svg") for own in (lines, {"far": lines["far"]})]
    assert sorted(t for t, _ in texts) == [*"abc"] and all(b">far 8.46x<" in p and b"29.9" not in p for p in both)
    assert sorted(drawn.values()) == sorted([[x, y] for x, y in points[label]] for label in "abc")


def test_the_page_in_a_browser(pages, browser, tmp_path):
    """A number leads to its documents, and nothing runs that should not."""
    expect = pytest.importorskip("playwright.sync_api").expect
    problems = []

    def visit(file, size=(1280, 900), **more):
        viewport = dict(zip(("width", "height"), size, strict=True))
        opened = browser.new_context(viewport=viewport, offline=True, **more).new_page()
        opened.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
        opened.on("pageerror", lambda e: problems.append(str(e)))
        opened.on("request", lambda r: problems.append(r.url) if r.url != file.as_uri() else None)
        opened.goto(file.as_uri())
        return opened

    def shows(opened, documents):  # waits: an address that changes is told to the page a moment later
        begins = [re.compile(rf"^\s*{document}:") for document in documents]
        expect(opened.locator(".document:visible > summary")).to_have_text(begins)

    def fits(opened):
        return opened.evaluate("document.scrollingElement.scrollWidth <= innerWidth")

    plain, hostile = pages
    for size in ((390, 844), (1280, 900)):
        opened = visit(plain, size)
        assert fits(opened)
        opened.locator("#board tr", has_text="griffin").first.locator("[data-head^=flips] a").click()
        shows(opened, [4, 5])
        answers = opened.locator(".document:visible").first.locator("tr:visible").all_inner_texts()
        assert len(answers) == 2 and "2. two" in answers[0] and "1. one" in answers[1]
        opened.locator("[name=differ]").uncheck()
        shows(opened, range(8))
        assert fits(opened)
        opened.locator("form button").click()
        opened.locator("[name=differ]").check()
        shows(opened, [2, 3, 4, 5, 0, 1, 2])  # where any row differs
    opened = visit(hostile)
    opened.locator(".task", has_text="xsum").locator("> summary").click()
    opened.locator(".task[open] .document > summary").first.click()
    assert "onerror" in opened.locator(".document[open]").inner_text()
    assert opened.evaluate("window.hit") is None and opened.locator("img:not([src^=data])").count() == 0
    assert not [text for text in problems if not text.startswith("data:")]
    broken = tmp_path / "broken.html"  # the policy stops what escaping would have missed
    markup = "<b onclick='window.hit=1' id='b'>b</b><script>window.hit=1</script><footer"
    broken.write_text(plain.read_text().replace("<footer", markup))
    opened = visit(broken)
    opened.evaluate("document.getElementById('b').click()")
    assert opened.evaluate("window.hit") is None
    assert sum("Content Security Policy" in text for text in problems) >= 2
