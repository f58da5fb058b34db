"""The charts of the report: what they show, in words too, in the page's colours; equal data give equal text."""

import re

from dart_eval.results.report.charts import Level, Line, Point, against_sparsity, cost_quality, trace
from tests.helpers.pages import Checked

LINES = (Line(0, (Point(0.5, 1.0, 0.1), Point(0.7, 2.0, None))), Line(9, (Point(0.5, 0.0, 0.1),)))


def drawn():
    yield against_sparsity(LINES, (Level(1.5, 0.2), Level(0.25, kind="chance")))
    yield against_sparsity((Line(0, (Point(0.5, 0.0), Point(0.7, 3.0, 5.0), Point(0.9, 300.0, 500.0))),), (), log=True)
    yield against_sparsity((), ())
    yield cost_quality(LINES, ((0.5, "50 %"), (0.501, "60 %")))
    yield trace([0.5, None, 0.6], 10, None, [], 0)
    yield trace([0.5], 10, 0.4, [10], 3)


def test_charts_use_the_colours_of_the_page_and_keep_their_text():
    for svg in drawn():
        assert svg.startswith("<svg")
        assert not re.search(r"#0[12]0[12]\w\w|font: |xmlns|<style|<metadata|clip-path: url\(#(?!c-)", svg)
        assert "currentColor" in svg
        assert "<text" in svg


def test_the_same_chart_is_the_same_text():
    assert list(drawn()) == list(drawn())


# -- in the page ----------------------------------------------------------------------------------------------------


def test_references_inside_charts_lead_to_their_own_chart(page):
    html = page.read_text()
    used = set(re.findall(r"url\(#([\w-]+)\)", html)) | set(re.findall(r'<use href="#([\w-]+)"', html))
    assert used
    assert used <= set(Checked(html).ids)


def test_charts_say_in_words_what_they_show(page):
    html = page.read_text()
    assert 'aria-label="arc_easy, acc, n = 400: dense 0.6000 ± 0.0200; dart at 50\u202f% 0.4500 ± 0.0200;' in html
    assert "no intervals: no standard error" in html  # acc_norm
    assert html.count('role="img"') == html.count('class="drawing"') == 3 + 1 + 3 + 4


def test_perplexity_is_drawn_once_and_logarithmic(page):
    html = page.read_text()
    assert "word_perplexity, lower is better, n = 50, logarithmic" in html
    assert '<p class="note">bits_per_byte' not in html
