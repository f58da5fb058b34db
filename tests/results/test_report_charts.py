"""The charts of the report: where everything stands, and what they show in words."""

import itertools
from types import SimpleNamespace

import pytest

from dart_eval.results.report import explorer
from dart_eval.results.report.charts import COLOURS, LINE, SIGNS, Chart, Line, Point, Scale, against_read, sign
from dart_eval.results.store import Store
from tests.helpers.records import answered, choosing

LINES = {
    "a": [Point(0.5, 1.0, 0.9, 1.1), Point(0.3, 2.0, 2.0, 2.0)], "b": [Point(0.51, 0.5, -4.5, 5.5)],
    "a name too long to stand": [Point(0.5, 2.0, 2.0, 2.0), Point(0.3, 2.0, 1.0, 3.0)],
}  # fmt: skip
LOOKS = {name: i for i, name in enumerate(LINES)}


def test_methods_stand_side_by_side_and_their_names_do_not_cover_each_other():
    chart = against_read("", "", LINES, LOOKS, [Point(1, 1.5, 1.3, 1.7)], 0.25, cap=(0.6, 2.5))
    laid = chart.laid()
    assert [text for _, text in laid["xticks"]] == ["30 %", "50 %"]  # .51 stands in the level of .50
    a, b, long = laid["lines"]
    assert a["points"][0].x < b["points"][0].x < long["points"][0].x  # of one level
    assert [line["name"] for line in laid["lines"]] == ["a", "b: 0.5", "a name too long to \u2026"]
    heights = sorted(line["at"] for line in laid["lines"])
    assert all(high - low >= 0.99 * LINE for low, high in itertools.pairwise(heights))
    assert laid["top"] <= heights[0] and heights[-1] <= laid["bottom"]
    assert [kind for kind, *_ in laid["across"]] == ["dense", "guessing"]
    places = [v for line in laid["lines"] for p in line["points"] for v in (*p[1:4], p.x)]
    assert all(0 <= v <= laid["height"] for v in places)
    assert b["points"][0].value == Scale(*_bounds(laid), 0, 1)(0.6)


def test_many_names_stand_within_the_chart():
    lines = {f"m{i}": [Point(0.5, value, value, value)] for i, value in enumerate([1.0] * 9 + [2.0] * 20)}
    laid = against_read("", "", lines, {label: i for i, label in enumerate(lines)}, []).laid()
    heights = sorted(line["at"] for line in laid["lines"])
    assert laid["top"] <= heights[0] and heights[-1] <= laid["bottom"]
    assert all(high - low >= 0.99 * LINE for low, high in itertools.pairwise(heights))


def test_each_of_seven_evenly_spaced_reads_has_its_tick():
    points = [Point(1 - tenths / 10, 0.5, 0.4, 0.6) for tenths in range(1, 8)]
    laid = against_read("", "", {"a": points}, {"a": 0}, []).laid()
    assert [text for _, text in laid["xticks"]] == [f"{percent} %" for percent in range(30, 100, 10)]


def _bounds(laid):
    """The values at the places 0 and 1, from two ticks."""
    (y, low), *_, (z, high) = laid["yticks"]
    slope = (float(high) - float(low)) / (z - y)
    return float(low) - slope * y, float(low) + slope * (1 - y)


@pytest.mark.parametrize(("low", "high", "log", "texts"), [
    (0.0, 1.0, False, ["0", "0.2", "0.4", "0.6", "0.8", "1"]), (-50, 150, False, ["-50", "0", "50", "100", "150"]),
    (900, 2100, False, ["1,000", "1,200", "1,400", "1,600", "1,800", "2,000"]),
    (0.9, 12, True, ["1", "2", "5", "10"]), (2.1, 4.2, True, ["2.5", "3", "3.5", "4"]),
    (0.001, 1e6, True, ["0.001", "0.1", "10", "1,000", "100,000"]),
])  # fmt: skip
def test_ticks_are_round_numbers_inside_the_axis(low, high, log, texts):
    scale = Scale(low, high, 100, 0, log)
    assert (scale(low), scale(high)) == (100, 0)
    ticks = scale.ticks()
    assert [text for _, text in ticks] == texts
    assert ticks == [(scale(float(text.replace(",", ""))), text) for text in texts]


def test_values_that_do_not_differ_have_an_axis():
    for log in (False, True):
        laid = Chart("", "", [Line("a", [Point(0.5, 2.0, 2.0, 2.0, x=1.0)], 0, "a")], (0.0, 2.0), (), log=log).laid()
        (point,) = laid["lines"][0]["points"]
        assert laid["top"] < point.value < laid["bottom"] and len(laid["yticks"]) > 1


def test_methods_differ_in_look():
    assert len({(COLOURS[i % len(COLOURS)], sign(i)) for i in range(40)}) == 40 and sign(1) == SIGNS["s"]


def test_points_say_in_words_what_they_show(page):
    html = page.read_text()
    assert 'aria-label="dart at 30 %: 10 % [' in html and html.count('<svg viewBox="0 0 ') == 1


def test_an_interval_that_reaches_below_all_logarithms_is_drawn_to_the_edge():
    """A perplexity of two documents, whose standard error is larger than half of it."""
    line = Line("griffin", [Point(0.3, 1000.0, 900.0, 1100.0, "", 0.3)], 0, "griffin")
    laid = Chart("t", "", [line], (0.0, 1.0), (), across=[("dense", 36.6, -6.5, 79.7)], log=True).laid()
    ((_, value, low, high),) = laid["across"]
    assert high < value < low <= laid["bottom"]


def test_choices_that_were_scored_twice_count_once(tmp_path):
    """With acc_mutual_info lm-eval adds each choice's score without its context."""
    made = choosing(answered("t", [{"acc": v, "acc_mutual_info": v} for v in (1.0, 0.0)], "dense", 0.0), 8)
    Store(tmp_path).save("cell", made, [{"task": "t", "doc_id": i, "target": "a"} for i in range(2)])
    made.samples[0]["responses"][6] = [0.0, False]  # the likeliest without the question
    assert explorer._answer(SimpleNamespace(), made.samples[0]).chosen == 0
