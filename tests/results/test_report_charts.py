"""The charts of the report: what they show, in words too; equal charts are equal text, and each has ids of its own."""

import itertools
import re

from matplotlib.figure import Figure

from dart_eval.results.report.charts import LINE, Chart, Point, draw, trace
from tests.helpers.pages import Checked

LINES = {
    "a": [Point(0.5, 1.0, 0.9, 1.1), Point(0.3, 2.0, 2.0, 2.0)], "b": [Point(0.51, 0.5, -4.5, 5.5)],
    "a name too long to stand": [Point(0.5, 2.0, 2.0, 2.0), Point(0.3, 2.0, 1.0, 3.0)],
}  # fmt: skip
LOOKS = {name: i for i, name in enumerate(LINES)}
DRAWS = (
    lambda axes: draw(axes, LINES, LOOKS, [Point(1, 1.5, 1.3, 1.7)], 0.25),
    lambda axes: draw(axes, LINES, LOOKS, [], None, True),
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


def test_methods_stand_side_by_side_and_their_names_do_not_cover_each_other():
    axes = Figure().add_subplot()
    draw(axes, LINES, LOOKS, [])
    assert [t.get_text() for t in axes.get_xticklabels()] == ["30 %", "50 %"]  # .51 stands in the level of .50
    first = [container.lines[0].get_xdata()[0] for container in axes.containers]
    assert first[0] > first[2] and len({round(x, 3) for x in first}) == 3
    names = {t.get_text(): t.xyann[1] for t in axes.texts}
    assert list(names) == ["b at 51 %", "a name too long to \u2026", "a"]
    heights = list(names.values())
    assert all(low >= 0 and high - low >= 0.99 * LINE for low, high in itertools.pairwise(heights))


def test_each_chart_refers_to_ids_of_its_own(page):
    html = page.read_text()
    used = set(re.findall(r"url\(#([\w-]+)\)", html)) | set(re.findall(r'<use xlink:href="#([\w-]+)"', html))
    assert used and used <= set(Checked(html).ids)
    first, second = (Chart("", "", "", DRAWS[0]).svg(i) for i in (1, 2))
    assert not set(Checked(first).ids) & set(Checked(second).ids)


def test_charts_say_in_words_what_they_show(page):
    html = page.read_text()
    assert 'aria-label="arc_easy, acc, n 8: dense 0.7500 ± 0.1700; dart at read 0.50 0.6250 ± 0.1700;' in html
    assert "griffin at read 0.30 0.2500 ± 0.1700; guessing 0.3333" in html
    assert "dart 70 % at read 0.50; dart 10 % at read 0.30; griffin 40 % at read 0.50; griffin -20 % at read" in html
    assert html.count('role="img"') == html.count("<svg") == 1 + 3 + 4


def test_perplexity_is_drawn_logarithmic(page):
    assert "word_perplexity, lower is better, logarithmic, n 50" in page.read_text()
