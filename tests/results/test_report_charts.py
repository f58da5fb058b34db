"""The charts of the report: what they show, in words too; equal charts are equal text, and each has ids of its own."""

import re

from dart_eval.results.report.charts import Chart, Point, against_sparsity, trace
from tests.helpers.pages import Checked

LINES = {0: [Point(0.5, 1.0, 0.1), Point(0.7, 2.0)], 9: [Point(0.5, 0.5, 5.0)]}
DRAWS = (
    lambda axes: against_sparsity(axes, LINES, [Point(0.0, 1.5, 0.2)], 0.25, False),
    lambda axes: against_sparsity(axes, LINES, [], None, True),
    lambda axes: trace(axes, [0.5, float("nan"), 0.6], 10, None, [], [], 0),
    lambda axes: trace(axes, [0.5, 0.3], 10, 0.4, [10], [20], 3),
)


def drawn():
    return [Chart("", "", "", draw).svg(i) for i, draw in enumerate(DRAWS)]


def test_a_chart_is_the_same_text_each_time_and_keeps_it_as_text_in_the_colours_of_the_page():
    assert drawn() == drawn()
    for svg in drawn():
        assert svg.startswith("<svg viewBox=")
        assert "currentColor" in svg and "<text" in svg
        assert not re.search("#000000|xmlns|<style|<metadata", svg)


def test_each_chart_refers_to_ids_of_its_own(page):
    html = page.read_text()
    used = set(re.findall(r"url\(#([\w-]+)\)", html)) | set(re.findall(r'<use xlink:href="#([\w-]+)"', html))
    assert used and used <= set(Checked(html).ids)
    first, second = (Chart("", "", "", DRAWS[0]).svg(i) for i in (1, 2))
    assert not set(Checked(first).ids) & set(Checked(second).ids)


def test_charts_say_in_words_what_they_show(page):
    html = page.read_text()
    assert 'aria-label="arc_easy, acc, n 8: dense 0.7500 ± 0.1700; dart at 50 % 0.6250 ± 0.1700;' in html
    assert "griffin at 70 % 0.2500 ± 0.1700; guessing 0.3333" in html
    assert "dart keeps 83 % at read 0.50; dart keeps 50 % at read 0.30; griffin keeps 67 % at read 0.50" in html
    assert "acc_norm, n 8, 5 without a standard error" in html
    assert html.count('role="img"') == html.count("<svg") == 1 + 4 + 4


def test_perplexity_is_drawn_once_and_logarithmic(page):
    html = page.read_text()
    assert "word_perplexity, lower is better, logarithmic, n 50" in html
    assert 'aria-label="wikitext, bits_per_byte' not in html
