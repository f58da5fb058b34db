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

    def go(file, size=(1280, 900), **more):
        viewport = dict(zip(("width", "height"), size, strict=True))
        context = browser.new_context(viewport=viewport, offline=True, **more)
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


def fits(opened):
    return opened.evaluate("document.scrollingElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("size", SIZES)
def test_the_page_fits_and_its_charts_can_be_read(page, visit, size):
    opened = visit(page, size)
    assert fits(opened)
    assert opened.locator("#board thead").first.is_visible() == (size[0] > 500)  # else a row is a card with heads
    chart = opened.locator("#charts img").first
    assert chart.evaluate("i => 12 * i.width / i.naturalWidth") >= 9  # pixels of its letters


def shown(opened):
    return [text.split(":")[0] for text in opened.locator(".document:visible > summary").all_inner_texts()]


@pytest.mark.parametrize("size", SIZES)
def test_a_number_of_the_board_leads_to_the_documents_that_differ(page, visit, size):
    opened = visit(page, size)
    row = opened.locator("#board tr", has_text="griffin").first
    row.locator("[data-head^=flips] a").click()
    assert opened.locator(".task:visible > summary").all_inner_texts() == ["arc_easy"]
    assert shown(opened) == ["4", "5"] and "2 documents of arc_easy" in opened.locator("output").inner_text()
    assert opened.locator("form select option:checked").inner_text() == "griffin 50 %"
    answers = opened.locator(".document:visible").first.locator("tr:visible").all_inner_texts()
    assert [re.split(r"\s{2,}|[\t\n]", text)[:2] for text in answers] == [
        ["dense", "2. two"],
        ["griffin 50 %", "1. one"],
    ]
    assert opened.evaluate("(e => e.getBoundingClientRect().top < innerHeight)(document.querySelector('#answers'))")
    opened.locator("[name=differ]").uncheck()
    assert shown(opened) == [*map(str, range(8))] and fits(opened)
    opened.locator("form button").click()
    assert opened.locator(".task:visible").count() == 2 and opened.locator("tr[hidden]").count() == 0
    opened.locator("[name=differ]").check()
    assert shown(opened) == ["2", "3", "4", "5", "0", "1", "2"]  # where any row differs


def test_all_can_be_read_without_the_script(page, visit):
    opened = visit(page, java_script_enabled=False)
    assert opened.locator("form").is_hidden()
    task = opened.locator(".task", has_text="xsum")
    task.locator("> summary").click()
    task.locator(".document > summary").first.click()
    assert "dart wrote 0" in task.inner_text() and "griffin wrote 0" in task.inner_text()


@pytest.mark.parametrize("size", SIZES)
def test_hostile_names_and_texts_do_nothing(tmp_path, visit, size):
    folder(tmp_path / "out", HOSTILE)
    report(tmp_path / "out", tmp_path / "page.html", 50)
    opened = visit(tmp_path / "page.html", size)
    opened.locator(".task", has_text="xsum").locator("> summary").click()
    opened.locator(".task[open] .document > summary").first.click()
    assert "onerror" in opened.locator(".document[open]").inner_text()
    assert (
        opened.evaluate("window.hit") is None and opened.locator("img:not([src^=data])").count() == 0 and fits(opened)
    )


def test_even_injected_markup_could_not_run(page, visit, tmp_path):
    """The policy stops what escaping would have missed: checked by breaking the page."""
    file = tmp_path / "broken.html"
    broken = "<b onclick='window.hit=1' id='b'>b</b><script>window.hit=1</script><footer"
    file.write_text(page.read_text().replace("<footer", broken))
    opened = visit(file)
    opened.evaluate("document.getElementById('b').click()")
    assert opened.evaluate("window.hit") is None
    assert len(visit.problems) >= 2 and all("Content Security Policy" in p for p in visit.problems)
    visit.problems.clear()
