"""The report page in a browser: how it looks and behaves, and that nothing in it runs that should not."""

import re

import pytest

from dart_eval.cli.report import report
from tests.helpers.pages import HOSTILE, folder

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
        opened.clock.install()
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
    if size[0] < 400:  # the wide tables scroll inside their own boxes
        assert opened.evaluate("(e => e.scrollWidth > e.clientWidth)(document.querySelector('#board .scroll'))")
    charts = opened.locator(".chart svg")
    assert charts.count() == 1
    for i in range(charts.count()):
        box = charts.nth(i).bounding_box()
        assert box["width"] > 250 and box["height"] > 120
    ink, paper = opened.evaluate(
        "(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))"
    )
    assert (_light(ink), _light(paper)) == ((True, False) if scheme == "dark" else (False, True))
    text = opened.locator(".chart svg text").first
    assert text.evaluate("e => getComputedStyle(e).fill") == ink
    smallest = opened.evaluate("""Math.min(...[...document.querySelectorAll('.chart svg')].flatMap(s =>
        [...s.querySelectorAll('text')].map(t => parseFloat(getComputedStyle(t).fontSize)
            * s.getBoundingClientRect().width / s.viewBox.baseVal.width)))""")
    assert smallest >= 9


def _light(colour):
    return sum(map(int, re.findall(r"\d+", colour)[:3])) > 384


def unfold(opened, task):
    opened.locator(".task > summary", has_text=task).click()
    return opened.locator(".task", has_text=task).locator(".document")


@pytest.mark.parametrize("size", SIZES)
def test_a_document_shows_the_answers_of_every_method(page, visit, size):
    first = unfold(visit(page, size), "xsum").first
    first.locator("summary").click()
    shown = first.inner_text()
    for part in ("Text 0", "The reference", "rougeL 0.2500, re-masks 1, effective sparsity 0.48"):
        assert part in shown
    assert [t.split("\n")[0] for t in first.locator(".reply").all_inner_texts()] == [
        "dense", "dart 50 %", "griffin 50 %", "dart 70 %", "griffin 70 %"
    ]  # fmt: skip
    assert first.locator(".said").all_inner_texts() == [f"{m} wrote 0 " for m in ("dense", *["dart", "griffin"] * 2)]


def test_candidates_their_scores_the_chosen_one_and_the_right_answer(page, visit):
    found = unfold(visit(page), "arc_easy").nth(4)
    found.locator("summary").click()
    assert found.locator("li").all_inner_texts() == ["one", "two right", "three"]
    rows = [" ".join(t.split()) for t in found.locator("tbody tr").all_inner_texts()]
    assert rows[:3] == [
        "dense 2 right −3.500 −2.000 −3.000 acc 1, effective sparsity 0.50",
        "dart 50 % 2 right −3.500 −2.000 −3.000 acc 1, effective sparsity 0.50",
        "griffin 50 % 1 −1.000 −2.000 −3.000 acc 0, effective sparsity 0.50",
    ]


def test_documents_are_searched_and_filtered_by_method_and_difference(page, visit):
    opened = visit(page)
    shown = opened.locator("#shown")
    assert shown.inner_text() == "11 of 11 documents"
    opened.fill("#search", "3? QUESTION")
    assert shown.inner_text() == "1 of 11 documents"
    assert opened.locator(".document:visible summary").all_inner_texts() == ["3 Question 3?"]
    opened.fill("#search", "question")
    opened.check("#differ")
    assert shown.inner_text() == "4 of 11 documents"  # 2 to 5: some method is right there, another is not
    choose(opened, "dart", "50 %")
    assert shown.inner_text() == "1 of 11 documents"  # dense, which always stays, is right there
    opened.uncheck("#differ")
    opened.locator(".document:visible summary").first.click()
    assert [t.split("\t")[0] for t in opened.locator(".reply:visible").all_inner_texts()] == ["dense", "dart 50 %"]


def choose(opened, method, level):
    opened.locator("#filter summary").click()
    opened.get_by_label(method, exact=True).check()
    opened.locator("#filter select").select_option(level)
    opened.locator("h1").click()


@pytest.mark.parametrize("size", SIZES)
def test_board_charts_and_tables_are_filtered_by_method_and_level(page, visit, size):
    opened = visit(page, size)
    rows = opened.locator("#board tbody tr:visible th")
    assert opened.locator("#filter button").is_hidden()
    choose(opened, "griffin", "30 %")
    assert opened.locator("#filter summary").inner_text() == "Methods: griffin"
    assert opened.locator("#filter ul").is_hidden()
    assert [t.split()[0] for t in rows.all_inner_texts()] == ["dense", "guessing", "griffin"]
    dots = opened.locator("#quality .dot:visible")
    assert {" ".join(dot.get_attribute("aria-label").split()[:3]) for dot in dots.all()} == {"griffin at 30"}
    assert opened.locator("#quality .join:visible").count() == 0
    opened.locator("#filter button").click()
    opened.locator("#filter button").wait_for(state="hidden")
    assert rows.count() == 6 and opened.locator("#quality .join:visible").count() > 1


def test_columns_sort_by_number_up_down_and_back_also_by_keyboard(page, visit):
    opened = visit(page)
    rows = opened.locator("#board tbody tr")
    before = rows.all_inner_texts()
    button = opened.locator("#board thead button", has_text="FFN bytes read")
    button.focus()
    reads = []
    for sort in ("ascending", "descending", None):
        opened.keyboard.press("Enter")
        assert opened.locator("#board th[aria-sort]").count() == (sort is not None)
        assert button.locator("..").get_attribute("aria-sort") == sort
        reads.append([row.split("\t")[1] for row in rows.all_inner_texts()])
    assert reads[0] == ["30 %", "30 %", "50 %", "50 %", "100 %", ""] and reads[1] == [*reads[0][4::-1], ""]
    assert rows.all_inner_texts() == before
    opened.locator("#board thead button", has_text="method").click()
    assert [t.split()[0] for t in rows.all_inner_texts()] == ["dart", "dart", "dense", "griffin", "griffin", "guessing"]
    texts = [
        "701 kB",
        "1.2 MB",
        "0 B",
        "+42 %",
        "< 0.01 %",
        "1,234.5 ±3",
        "\u22123.5",
        "8.4e9",
        "none",
        "108 % [83, 9]",
    ]
    assert opened.evaluate("t => t.map(number)", texts) == [701e3, 1.2e6, 0, 42, 0.01, 1234.5, -3.5, 8.4e9, None, 108]
    found = opened.locator("#numbers details", has=opened.locator("th[scope=row]")).first
    found.locator("summary").click()
    found.locator("thead button").first.click()
    assert found.locator("th[aria-sort=ascending]").count() == 1


def test_values_of_points_show_under_the_mouse_and_by_keyboard(page, visit):
    opened = visit(page)
    tip, dots = opened.locator("#tip"), opened.locator("#quality .chart").first.locator(".dot")
    assert tip.is_hidden()
    dots.nth(1).locator("path").last.hover()  # its mark: the middle of a long interval is far from it
    assert tip.inner_text() == dots.nth(1).get_attribute("aria-label")
    assert tip.inner_text().startswith("dart at 30 %: 10 % [")
    opened.mouse.move(5, 5)
    assert tip.is_hidden()
    dots.first.focus()
    assert tip.inner_text().startswith("dart at 50 %: ")
    opened.keyboard.press("ArrowRight")
    assert tip.inner_text().startswith("dart at 30 %: ")
    assert opened.locator("#quality .chart").first.locator("[tabindex='0']").count() == 1


def test_a_phone_has_the_answer_first_and_targets_for_a_finger(page, visit):
    opened = visit(page, SIZES[0], has_touch=True)
    answer = opened.locator("table.answer").bounding_box()
    assert answer["y"] + answer["height"] < SIZES[0][1]  # on the first screen
    assert opened.evaluate("(e => e.scrollWidth <= e.clientWidth)(document.querySelector('#answer .scroll'))")
    assert "50 %" in opened.locator("table.answer tbody tr").first.inner_text()
    for target in ("nav a", "#filter summary", "#filter select", "#board thead button", "details > summary"):
        sizes = [found.bounding_box() for found in opened.locator(target).all() if found.is_visible()]
        assert sizes and min(min(box["height"], box["width"]) for box in sizes) >= 24, target
    dot = opened.locator("#quality .chart").first.locator(".dot").last
    dot.scroll_into_view_if_needed()
    box = dot.locator("path").last.bounding_box()
    opened.touchscreen.tap(box["x"] + 12, box["y"] + 8)  # beside the point
    assert opened.locator("#tip").inner_text() == dot.get_attribute("aria-label")
    tip = opened.locator("#tip").bounding_box()
    assert tip["x"] >= 0 and tip["x"] + tip["width"] <= 390
    opened.locator("#quality h2").tap()
    assert opened.locator("#tip").is_hidden()
    assert opened.evaluate("document.scrollingElement.scrollWidth <= innerWidth")


def test_all_can_be_read_without_the_script(page, visit):
    opened = visit(page, java_script_enabled=False)
    assert opened.locator("#controls").is_hidden()
    found = unfold(opened, "xsum").first
    found.locator("summary").click()
    assert "dart wrote 0" in found.inner_text()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile")
    folder(path / "out", HOSTILE)
    report(path / "out", path / "page.html", HOSTILE, 50)
    return path / "page.html"


@pytest.mark.parametrize("size", SIZES)
def test_hostile_names_and_texts_do_nothing(hostile, visit, size):
    opened = visit(hostile, size)
    found = unfold(opened, "xsum").first
    found.locator("summary").click()
    assert "onerror" in found.inner_text()
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
