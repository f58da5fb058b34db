"""A report that the tests of its text and of its looks read."""

import pytest

from dart_eval.cli.report import report
from tests.helpers.pages import folder


@pytest.fixture(scope="session")
def page(tmp_path_factory):
    """The page of a folder with everything in it, to be read alone."""
    path = tmp_path_factory.mktemp("report")
    folder(path / "out")
    report(path / "out", None, 50)
    return path / "out" / "report.html"
