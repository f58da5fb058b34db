"""The report page: what it says, that nothing in it escapes, and how it behaves in a browser."""

import dataclasses
import json
import math
import random
import re
import shutil
from html.parser import HTMLParser

import pytest
import typer
from typer.testing import CliRunner

from dart_eval.cli.report import report
from dart_eval.errors import UserError
from dart_eval.results.outcomes import outcome
from dart_eval.results.record import Metric
from dart_eval.results.report import build
from dart_eval.results.report.cells import Cells
from dart_eval.results.report.charts import Level, Line, Point, against_sparsity, cost_quality, trace
from dart_eval.results.report.findings import Findings
from dart_eval.results.report.page import script_json
from dart_eval.results.store import Store
from tests.helpers.records import cell, written

HOSTILE = '<img src=x onerror="window.hit=1"></script><script>window.hit=1</script>\'$x_y$&amp;\u2028{{7*7}}'


def choice(doc, scores, gold, task="arc_easy", **more):
    return {
        "task": task, "doc_id": doc, "filter": "none", "doc_hash": f"d{doc}", "prompt_hash": f"p{doc}",
        "target_hash": "t", "cluster": None,
        "metrics": {"acc": float(scores.index(max(scores)) == gold), "gold_ll": scores[gold]},
        "responses": [[s, False] for s in scores], "tokens": 4, "remasks": 0, "effective_sparsity": 0.5, **more,
    }  # fmt: skip


def texts(task, n, choices=None, prompt="Question {}?", target=1):
    return [{"task": task, "doc_id": i, "prompt": prompt.format(i), "choices": choices, "target": target}
            for i in range(n)]  # fmt: skip


DRIFT = {"window": 10, "threshold": 0.7, "signal": [0.9, 0.8, 0.6, 0.65, 0.9], "remasks": [40]}


def folder(path, hostile=""):
    """Dense, griffin and dart on a choice task and a summary, with texts and drift; `hostile` is put into all names."""
    store = Store(path)
    questions = texts("arc_easy", 3, [f" one{hostile}", " two", " three"], "Question {}?" + hostile)
    stories = texts("xsum", 3, None, "Text {}" + hostile, f"The reference {hostile}")
    for method, s in (("dense", 0.0), ("griffin", 0.5), ("griffin", 0.7), ("dart", 0.5), ("dart", 0.7)):
        shift = 2.5 if method == "dart" else 0.0
        asked = [choice(i, [-1.0 - i - shift, -2.0, -3.0], 1) for i in range(3)]
        name = method if method == "dense" else method + hostile
        model = "tiny" + hostile
        store.save(f"a{method}{s}", cell(name, s, model=model, samples=asked), questions)
        summaries = [written(i, f"{method} wrote {i} {hostile}", **({"drift": DRIFT} if method == "dart" else {}))
                     for i in range(3)]  # fmt: skip
        quality = [Metric("xsum", "rougeL", 0.2 - 0.1 * s, 0.01, 50, True), Metric("xsum", "empty", 0, 0, 50, None)]
        store.save(f"b{method}{s}", cell(name, s, "xsum", quality, model, summaries), stories)
        perplexity = [Metric("wikitext", "word_perplexity", 20 * math.exp(5 * s), 1.0, 50, False),
                      Metric("wikitext", "bits_per_byte", 1.0, 0.1, 50, False)]  # fmt: skip
        store.save(f"c{method}{s}", cell(name, s, "wikitext", perplexity, model))
    return store


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("report")
    folder(path / "out")
    report(path / "out", None, None, 50)
    return path / "out" / "report.html"


class Checked(HTMLParser):
    """Every element that is opened is closed; ids and texts are kept."""

    VOID = {"meta", "link", "input", "br", "img"}  # noqa: RUF012

    def __init__(self, html):
        super().__init__()
        self.open, self.ids, self.tags, self.attributes = [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [v for k, v in attrs if k == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


# -- what it says --------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_wrote(tmp_path, capsys):
    folder(tmp_path / "out")
    report(tmp_path / "out", tmp_path / "x" / "page.html", "A title", 2)
    size = f"{(tmp_path / 'x' / 'page.html').stat().st_size / 1e6:.1f}"
    assert capsys.readouterr().out == f"wrote {tmp_path / 'x' / 'page.html'} (15 cells, 20 samples, {size} MB)\n"
    assert "<h1>A title</h1>" in (tmp_path / "x" / "page.html").read_text()


def test_a_page_that_cannot_be_written_is_one_line(tmp_path):
    folder(tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*choose another --output"):
        report(tmp_path / "out", tmp_path / "file" / "page.html", None, 0)


def test_a_folder_without_results_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no results in"):
        build(Store(tmp_path))


def test_every_section_is_there_and_the_html_is_well_formed(page):
    html = page.read_text()
    made = Checked(html)
    for section in ("findings", "quality", "cost", "memory", "drift", "numbers", "documents"):
        assert section in made.ids
        assert f'href="#{section}"' in html
    assert len(made.ids) == len(set(made.ids))
    assert [t for t in made.tags if t in ("h1", "h2")] == ["h1"] + ["h2"] * 7


def test_references_inside_charts_lead_to_their_own_chart(page):
    html = page.read_text()
    used = set(re.findall(r"url\(#([\w-]+)\)", html)) | set(re.findall(r'<use href="#([\w-]+)"', html))
    assert used
    assert used <= set(Checked(html).ids)


def test_the_page_needs_nothing_from_outside(page):
    html = page.read_text()
    attributes = Checked(html).attributes
    assert any(v and v.startswith("default-src 'none'; script-src 'sha256-") for k, v in attributes if k == "content")
    links = [v for k, v in attributes if k in ("src", "href", "srcset", "action", "data")]
    assert {v for v in links if not v.startswith("#")} == {"data:,"}
    assert "http" not in re.sub(r"http-equiv", "", html)


def test_charts_say_in_words_what_they_show(page):
    html = page.read_text()
    assert 'aria-label="arc_easy, acc, n = 400: dense 0.6000 ± 0.0200; dart at 50\u202f% 0.4500 ± 0.0200;' in html
    assert "no intervals: no standard error" in html  # acc_norm
    assert html.count('role="img"') == html.count('class="drawing"') == 3 + 1 + 3 + 4


def test_perplexity_is_drawn_once_and_logarithmic(page):
    html = page.read_text()
    assert "word_perplexity, lower is better, n = 50, logarithmic" in html
    assert '<p class="note">bits_per_byte' not in html


def test_cost_is_a_ceiling_and_no_measurement(page):
    html = " ".join(page.read_text().split())
    assert "Nothing here is a measured speed." in html
    assert "saves no time at all" in html
    assert "1.33×" in html  # 200 000 / 150 000
    assert "0.250" in html


def test_machines_are_named(tmp_path):
    store = Store(tmp_path)
    for method, environment in {"dense": {"gpu": "Card A"}, "griffin": {"threads": "2"}, "random": {}}.items():
        made = cell(method, 0.5 * (method != "dense"))
        environment = {"machine": "x86_64", **environment}
        store.save(f"t-{method}", dataclasses.replace(made, environment=environment), [])
    html = build(store).html
    assert "x86_64, x86_64 with 2 threads and x86_64 with Card A" in html


def test_every_row_has_its_command(page):
    html = page.read_text()
    assert html.count("<summary>show</summary>") == 5 * (2 + 2 + 2)
    assert "<code>dart-eval run --method griffin --tasks xsum</code>" in html


def test_drift_is_summed_up_over_documents(page):
    html = re.sub("[ \n]+", " ", page.read_text())  # split() would also take thin spaces away
    assert "4 of 6 traced documents" in html
    assert '<td class="n">3 of 3</td><td class="n">15</td><td class="n">40.0\u202f%</td>' in html
    assert f"{1000 * 3 / 1234:.2f}" in html


def test_equal_folders_give_equal_bytes(tmp_path):
    first, second = folder(tmp_path / "a"), folder(tmp_path / "b")
    assert build(first).html == build(second).html == build(first).html


def scored(value, stderr=0.02, n=400, metric="acc", better=True):
    return [Metric("arc_easy", metric, value, stderr, n, better)]


# -- findings ------------------------------------------------------------------------------------------------------


def asked(right, task="arc_easy", lean=0.0):
    """Samples of a choice task; `right` says which documents were answered right, `lean` moves the right answers."""
    return [choice(i, [-1.0 + lean, -2.0] if ok else [-2.0 + lean, -1.0], 0, task) for i, ok in enumerate(right)]


def answered(method, sparsity, right, task="arc_easy", **inputs):
    value = sum(right) / len(right)
    metrics = [Metric(task, "acc", value, (value * (1 - value) / len(right)) ** 0.5, len(right), True)]
    return cell(method, sparsity, task, metrics, samples=asked(right, task), **inputs)


def rolled(method, sparsity, lls):
    """A perplexity task of documents of ten words."""
    metrics = [Metric("wikitext", "word_perplexity", math.exp(-sum(lls) / (10 * len(lls))), 1.0, len(lls), False)]
    samples = [{**written(i, "", "wikitext"), "metrics": {"word_perplexity": [v, 10]}, "responses": [v]}
               for i, v in enumerate(lls)]  # fmt: skip
    return cell(method, sparsity, "wikitext", metrics, samples=samples)


def found(*records):
    """The findings of these cells."""
    tests = Findings(Cells.of(records))
    tests.add(list(records), {r.key: outcome(r, r.samples) for r in records if r.samples})
    return tests.made()


def said(*records):
    """All sentences of the one finding of these cells, then its notes."""
    (one,) = found(*records)
    return [f"{who} {what}" for _, sentences in one.groups for who, what in sentences] + one.notes


def right(n, of=100):
    return [i < n for i in range(of)]


def test_a_clear_loss_is_said_with_its_numbers():
    text = said(answered("dense", 0.0, right(60)), answered("dart", 0.5, right(30)))
    assert text == [
        "dart against dense: worse on arc_easy (acc 0.300 against 0.600: −0.300 [−0.396, −0.219])."
    ]  # fmt: skip


def test_what_the_same_documents_show_is_said_though_the_intervals_overlap():
    """0.60 and 0.52 on 100 documents are within each other's error, but all eight that changed were lost."""
    text = said(answered("dense", 0.0, right(60)), answered("dart", 0.5, right(52)))
    assert text[0].startswith("dart against dense: worse on arc_easy (acc 0.520 against 0.600")


def test_a_difference_inside_noise_is_not_said():
    changed = [*right(58), *[i < 5 for i in range(42)]]  # not nested: five gained, seven lost
    other = [*[i >= 7 for i in range(58)], *[i < 10 for i in range(42)]]
    text = said(answered("dense", 0.0, changed[:100]), answered("dart", 0.5, other[:100]))
    assert text[0].startswith("dart against dense: no difference shown on arc_easy (acc 0.610 against")


def test_lower_perplexity_is_better():
    dense = [-30.0 - (i % 5) for i in range(20)]
    text = said(rolled("dense", 0.0, dense), rolled("dart", 0.5, [v - 10 - (i % 3) for i, v in enumerate(dense)]))
    assert text[0].startswith("dart against dense: worse on wikitext (word_perplexity 73.")
    assert "×\u202f2.9" in text[0] or "×\u202f3.0" in text[0]


def test_nothing_is_said_from_too_little():
    text = said(answered("dense", 0.0, right(5, 5)), answered("dart", 0.5, right(0, 5)))
    assert text == ["1 comparison not made (dart against dense on arc_easy): 5 independent units, fewer than 6."]


def test_cells_without_samples_are_not_tested_and_it_is_said():
    (text,) = said(cell("dense", 0.0), cell("dart", 0.5))
    assert "samples are missing or damaged" in text


def test_more_comparisons_ask_for_smaller_p():
    """Seven documents lost and none gained: p = .016. Enough for one comparison, not for one of four."""
    dense, dart = answered("dense", 0.0, right(60)), answered("dart", 0.5, right(53))
    assert "worse" in said(dense, dart)[0]
    others = [answered(name, 0.5, right(60)) for name in ("griffin", "random")]
    assert said(dense, dart, *others)[0] == "dart, griffin and random against dense: no difference shown on arc_easy."


def test_the_best_is_held_against_each_other_method():
    records = [answered("dense", 0.0, right(90)), answered("dart", 0.5, right(80)), answered("griffin", 0.5, right(78)),
               answered("random", 0.5, right(30))]  # fmt: skip
    (one,) = found(*records)
    (head, sentences) = one.groups[1]
    assert head == "The best pruned method of each task, against the others"
    ((who, what),) = sentences
    assert who == "arc_easy:"
    assert what.startswith("dart (acc 0.800), better than random (0.300: +0.500 [")
    assert what.endswith("; not shown for griffin.")
    assert one.rule == "All 5 comparisons"
    assert [row[:4] for row in one.comparisons] == [
        ["dart", "dense", "arc_easy", "acc"], ["griffin", "dense", "arc_easy", "acc"],
        ["random", "dense", "arc_easy", "acc"], ["dart", "griffin", "arc_easy", "acc"],
        ["dart", "random", "arc_easy", "acc"],
    ]  # fmt: skip
    assert [row[-1] for row in one.comparisons] == ["worse", "worse", "worse", "not shown", "better"]


def test_choosing_the_best_by_the_tested_numbers_is_paid_for():
    """Many equal methods: the luckiest of them is seldom called better than another (nominal: in .05 of the cases)."""
    draw, alarms = random.Random(1), 0
    for _ in range(60):
        records = [answered(f"m{k}", 0.5, [draw.random() < 0.5 for _ in range(60)]) for k in range(6)]
        (one,) = found(*records)
        alarms += any(row[-1] == "better" for row in one.comparisons)
    assert alarms <= 6  # P(> 6 of 60 at .05) = .03; without the correction it is about .2 of them


def test_methods_without_a_shown_difference_share_a_sentence():
    records = [answered("dense", 0.0, right(60)), *(answered(f"m{k}", 0.5, right(60)) for k in range(4))]
    assert said(*records)[0] == "m0, m1, m2 and m3 against dense: no difference shown on arc_easy."


def test_other_settings_are_not_compared():
    text = said(answered("dense", 0.0, right(60), num_fewshot=5), answered("dart", 0.5, right(30), num_fewshot=0))
    assert text == ["There is no dense cell and no second method to compare with."]


def test_other_prompts_are_not_compared():
    dense, dart = answered("dense", 0.0, right(60)), answered("dart", 0.5, right(30))
    dart.samples[3]["prompt_hash"] = "another"
    (text,) = said(dense, dart)
    assert "not paired, 1 of 100 prompts differ" in text


def test_sparsities_with_nothing_to_say_share_a_heading():
    (one,) = found(answered("dart", 0.5, right(3)), answered("dart", 0.7, right(3)))
    assert one.sparsity == "50\u202f%, 70\u202f%"


# -- missing parts -------------------------------------------------------------------------------------------------


def only(*records):
    def make(path):
        store = Store(path)
        for i, record in enumerate(records):
            store.save(f"cell{i}", record)
        return store

    return make


NO_FLOPS = dataclasses.replace(cell(), flops={})
PARTS = {
    "dense only": only(cell("dense", 0.0)),
    "no dense": only(cell(), cell("griffin")),
    "one cell": only(cell()),
    "several models": only(*(cell(m, s, model=n) for m, s in (("dense", 0.0), ("dart", 0.5)) for n in ("x", "y"))),
    "only perplexity": only(*(cell(m, s, "w", [Metric("w", "word_perplexity", 20 + s, 1.0, 9, False)])
                              for m, s in (("dense", 0.0), ("dart", 0.5)))),
    "no error": only(*(cell(m, s, metrics=scored(0.5, None)) for m, s in (("dense", 0.0), ("dart", 0.5)))),
    "nan": only(*(cell(m, s, metrics=scored(math.nan, math.inf)) for m, s in (("dense", 0.0), ("dart", 0.5)))),
    "infinite beside finite": only(cell("dense", 0.0), cell(), cell("griffin", metrics=scored(math.inf))),
    "zeros": only(*(cell(m, s, metrics=scored(0.0, 0.0)) for m, s in (("dense", 0.0), ("dart", 0.5)))),
    "no flops": only(cell("dense", 0.0), NO_FLOPS),
    "no metrics": only(cell(metrics=[])),
    "no command": only(dataclasses.replace(cell(), settings={})),
    "a group": only(cell(metrics=[*scored(0.5), Metric("arc_law", "acc", 0.4, 0.1, 20, True, "arc_easy")])),
    "many methods": only(cell("dense", 0.0), *(cell(f"method-{i}", s) for i in range(12) for s in (0.3, 0.5, 0.7))),
    "mixed": only(cell("dense", 0.0, code="other"), cell(dtype="bfloat16"), cell("griffin", seed=1)),
}  # fmt: skip


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
    assert "Samples could not be read for dart 50\u202f% on arc_easy and dart 70\u202f% on arc_easy" in html
    assert "Prompts could not be read for dense on arc_easy, griffin 50\u202f% on arc_easy" in html
    assert "No prompts are at hand" in html


def test_a_record_that_cannot_be_read_is_named_and_the_others_are_shown(tmp_path, capsys):
    store = folder(tmp_path)
    file = next((tmp_path / "cells").glob("adart0.7*"))
    file.write_text("{")
    made = build(store)
    assert made.cells == 14
    assert f"1 record could not be read and is left out: {file.name}." in made.html
    assert f"left out: {file} cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(("part", "text"), [
    ("mixed", "Cells from different versions of this program"), ("mixed", "Computed in bfloat16"),
    ("mixed", "No dense cell for arc_easy"), ("nan", "No finite value for"),
    ("only perplexity", "Few documents: n = 9"),
])  # fmt: skip
def test_warnings(tmp_path, part, text):
    assert text in build(PARTS[part](tmp_path)).html


def test_no_documents_where_none_are_wanted(tmp_path):
    made = build(folder(tmp_path), documents=0)
    assert made.samples == 0
    assert 'id="explorer"' not in made.html
    assert "wrote" not in made.html


def test_what_is_left_out_is_said(tmp_path):
    store = Store(tmp_path)
    long = "word " * 5000
    store.save("c", cell(task="xsum", samples=[written(i, long) for i in range(5)]), texts("xsum", 5, prompt=long))
    made = build(store, documents=2)
    assert made.samples == 2
    assert "3 more are not on this page" in made.html
    assert "characters left out" in made.html
    assert len(made.html) < 300_000


def test_a_title_that_is_no_unicode_can_be_written(tmp_path):
    assert r"a\udc00b" in build(only(cell())(tmp_path), title="a\udc00b").html


# -- charts --------------------------------------------------------------------------------------------------------


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


# -- safety --------------------------------------------------------------------------------------------------------


def test_json_inside_a_script_cannot_leave_it():
    data = {"a": "</script><!--\u2028\u2029&", "b": math.nan, "c": [math.inf, 1.5]}
    text = script_json(data)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == {"a": data["a"], "b": None, "c": [None, 1.5]}


def test_hostile_names_and_texts_are_escaped(tmp_path):
    html = build(folder(tmp_path, HOSTILE), title=HOSTILE).html
    made = Checked(html)
    assert made.tags.count("script") == 2
    assert "img" not in made.tags
    assert not [k for k, _ in made.attributes if k.startswith("on")]
    assert "{{7*7}}" in html  # is not evaluated


# -- in a browser --------------------------------------------------------------------------------------------------


SIZES = [(390, 844), (1280, 900)]


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no chromium on this machine")
    with sync.sync_playwright() as playwright:
        try:
            made = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except sync.Error as error:
            pytest.skip(f"chromium does not start: {str(error).splitlines()[0]}")
        yield made
        made.close()


@pytest.fixture
def visit(browser):
    """Opens a file; afterwards nothing may have gone wrong and nothing asked of the network."""
    contexts, problems = [], []

    def go(file, size=(1280, 900), scheme="light", **more):
        context = browser.new_context(viewport=dict(zip(("width", "height"), size, strict=True)), color_scheme=scheme,
                                      offline=True, **more)  # fmt: skip
        contexts.append(context)
        opened = context.new_page()
        opened.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
        opened.on("pageerror", lambda e: problems.append(str(e)))

        def route(request):
            if request.request.url == file.as_uri():
                request.continue_()
            else:
                problems.append(request.request.url)
                request.abort()

        opened.route("**/*", route)
        opened.goto(file.as_uri())
        return opened

    go.problems = problems
    yield go
    for context in contexts:
        context.close()
    assert problems == []


@pytest.mark.parametrize("size", [*SIZES, (360, 700)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_and_its_charts_are_drawn(page, visit, size, scheme):
    opened = visit(page, size, scheme)
    assert opened.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    charts = opened.locator(".drawing svg")
    assert charts.count() == 11
    for i in range(charts.count()):
        box = charts.nth(i).bounding_box()
        assert box["width"] > 250 and box["height"] > 120
    ink, paper = opened.evaluate(
        "(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))"
    )
    assert (_light(ink), _light(paper)) == ((True, False) if scheme == "dark" else (False, True))
    text = opened.locator(".drawing svg text").first
    assert text.evaluate("e => getComputedStyle(e).fill") == ink
    smallest = opened.evaluate("""Math.min(...[...document.querySelectorAll('.drawing svg')].flatMap(s =>
        [...s.querySelectorAll('text')].map(t => parseFloat(getComputedStyle(t).fontSize)
            * s.getBoundingClientRect().width / s.viewBox.baseVal.width)))""")
    assert smallest >= 9


def _light(colour):
    return sum(map(int, re.findall(r"\d+", colour)[:3])) > 384


def column(opened, n):
    return opened.locator(f"#table tbody tr td:nth-child({n})").all_inner_texts()


@pytest.mark.parametrize("press", ["click", "Enter"])
def test_a_head_sorts_and_turns_round(page, visit, press):
    opened = visit(page)
    heads = opened.locator("#table thead th button").all_inner_texts()
    n = heads.index("value ± stderr") + 1
    head = opened.locator(f"#table thead th:nth-child({n})")

    def act():
        head.locator("button").click() if press == "click" else head.locator("button").press(press)

    act()
    values = [float(v.split(" ±")[0]) for v in column(opened, n)]
    assert values == sorted(values) and len(set(values)) > 5  # 243.65 after 9.: as numbers, not as text
    assert head.get_attribute("aria-sort") == "ascending"
    act()
    assert [float(v.split(" ±")[0]) for v in column(opened, n)] == values[::-1]
    assert head.get_attribute("aria-sort") == "descending"
    opened.locator("#table thead th:nth-child(1) button").click()
    assert opened.locator("[aria-sort]").count() == 1
    assert column(opened, 1) == sorted(column(opened, 1))


def test_the_filter_keeps_rows_with_all_words(page, visit):
    opened = visit(page)
    opened.fill("#filter", "XSUM griffin rougeL")
    assert opened.locator("#table tbody tr:visible").count() == 2
    assert opened.inner_text("#shown") == "2 rows"


def test_members_of_groups_are_shown_on_demand(tmp_path, visit):
    report_at = tmp_path / "page.html"
    PARTS["a group"](tmp_path)
    report(tmp_path, report_at, None, 50)
    opened = visit(report_at)
    assert opened.locator("#table tbody tr:visible").count() == 1
    opened.check("#members")
    assert opened.locator("#table tbody tr:visible").count() == 2


def test_a_command_can_be_copied(page, visit):
    opened = visit(page, permissions=["clipboard-read", "clipboard-write"])
    opened.locator("#table details summary").first.click()
    opened.locator("#table .copy:visible").click()
    opened.locator("#table .copy:visible", has_text="copied").wait_for()
    assert opened.evaluate("navigator.clipboard.readText()").startswith("dart-eval run --method")


@pytest.mark.parametrize("size", SIZES)
def test_documents_side_by_side(page, visit, size):
    opened = visit(page, size)
    opened.select_option("#task", label="xsum")
    opened.select_option("#first", label="dense")
    opened.select_option("#second", label="dart 70\u202f%")
    shown = opened.inner_text("#document")
    for part in ("Text 0", "The reference", "dense wrote 0", "dart wrote 0", "rougeL 0.2500", "re-masks 1"):
        assert part in shown
    opened.click("#next")
    shown = opened.inner_text("#document")
    assert "dense wrote 1" in shown and "dart wrote 1" in shown and "wrote 0" not in shown
    assert opened.inner_text("#position").startswith("2 of 3")
    opened.focus("#next")
    opened.keyboard.press("Enter")
    assert opened.is_disabled("#next")
    opened.click("#previous")
    assert "wrote 1" in opened.inner_text("#document")


def test_candidates_their_scores_the_pick_and_the_right_answer(page, visit):
    opened = visit(page)
    opened.select_option("#task", label="arc_easy")
    opened.select_option("#first", label="dense")
    opened.select_option("#second", label="dart 50\u202f%")
    rows = [" ".join(t.split()) for t in opened.locator("#document tbody tr").all_inner_texts()]
    assert rows == ["one pick −1.000 −3.500", "two right answer −2.000 pick −2.000", "three −3.000 −3.000"]
    opened.check("#differ")
    assert opened.inner_text("#position") == "1 of 2 that differ (document 0)"
    opened.select_option("#second", label="dense")
    assert opened.inner_text("#position") == "The two differ nowhere."


@pytest.mark.parametrize("size", SIZES)
def test_hostile_names_and_texts_do_nothing(tmp_path, visit, size):
    file = tmp_path / "page.html"
    folder(tmp_path / "out", HOSTILE)
    report(tmp_path / "out", file, HOSTILE, 50)
    opened = visit(file, size)
    opened.click("#next")
    opened.select_option("#task", label="xsum")
    assert "onerror" in opened.inner_text("#document")
    assert opened.evaluate("window.hit") is None
    assert opened.locator("img").count() == 0
    assert opened.evaluate("document.scrollingElement.scrollWidth <= innerWidth")


def test_even_injected_markup_could_not_run(page, visit, tmp_path):
    """The policy stops what escaping would have missed: checked by breaking the page."""
    file = tmp_path / "broken.html"
    file.write_text(page.read_text().replace("<footer>", "<footer><b onclick='window.hit=1' id='b'>b</b>"
                                             "<script>window.hit=1</script>"))  # fmt: skip
    opened = visit(file)
    opened.evaluate("document.getElementById('b').click()")
    assert opened.evaluate("window.hit") is None
    assert len(visit.problems) >= 2
    assert all("Content Security Policy" in p for p in visit.problems)
    visit.problems.clear()


# -- the command line ----------------------------------------------------------------------------------------------


def test_options_of_the_command(tmp_path):
    app = typer.Typer()
    app.command()(report)
    folder(tmp_path)
    run = CliRunner().invoke(app, [str(tmp_path), "--samples", "1", "--title", "A & B"])
    assert run.exit_code == 0, run.output
    assert "15 cells, 10 samples" in run.output
    assert "<title>A &amp; B</title>" in (tmp_path / "report.html").read_text()
    assert CliRunner().invoke(app, [str(tmp_path), "--samples", "-1"]).exit_code == 2
