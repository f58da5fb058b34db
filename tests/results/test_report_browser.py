"""The report page in a browser: how it looks and behaves, and that nothing in it runs that should not."""

import re

import pytest

from dart_eval.cli.report import report
from tests.helpers.pages import HOSTILE, PARTS, folder

SIZES = [(390, 844), (1280, 900)]


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


def test_candidates_their_scores_the_chosen_one_and_the_right_answer(page, visit):
    opened = visit(page)
    opened.select_option("#task", label="arc_easy")
    opened.select_option("#first", label="dense")
    opened.select_option("#second", label="dart 50\u202f%")
    rows = [" ".join(t.split()) for t in opened.locator("#document tbody tr").all_inner_texts()]
    assert rows == ["one chosen −1.000 −3.500", "two right answer −2.000 chosen −2.000", "three −3.000 −3.000"]
    opened.check("#differ")
    assert opened.inner_text("#position") == "1 of 2 that differ (document 0)"
    opened.select_option("#second", label="dense")
    assert opened.inner_text("#position") == "The two differ nowhere."


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile")
    folder(path / "out", HOSTILE)
    report(path / "out", path / "page.html", HOSTILE, 50)
    return path / "page.html"


@pytest.mark.parametrize("size", SIZES)
def test_hostile_names_and_texts_do_nothing(hostile, visit, size):
    opened = visit(hostile, size)
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
