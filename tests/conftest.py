"""How tests run: their environment, markers and order. The fixtures are in `fixtures.py`."""

import gc
import os

import pytest
from hypothesis import settings

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The same examples in every run, so that a failure is the change's. Hypothesis also draws constants of the modules that
# happen to be loaded, so a run of other tests may find more; HYPOTHESIS_PROFILE=search looks for new ones.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

# Fixtures that need something give its marker to every test that uses them.
NEEDS = {"demo_installed": "demo", "data_dir": "data", "browser": "browser"}
LONG = ("ray", "demo", "process", "slow")
# What the fast lane is made of: what computes. The rest is of what a user sees: commands, sweeps, pages, files.
LANE = (
    *(f"tests/{folder}/" for folder in ("derivations", "golden", "kernels", "pruning")),
    "tests/matrix/test_matrix.py",
    *(f"tests/evaluation/test_{name}.py" for name in ("distance", "rotary", "scoring", "summaries", "throughput")),
    *(f"tests/results/test_{name}.py" for name in ("check", "documents", "estimates", "stats", "store")),
)  # fmt: skip


def pytest_ignore_collect(collection_path, config):
    """Where the fast lane alone is asked for, files that have none of it are not even loaded."""
    name = collection_path.relative_to(config.rootpath).as_posix()
    tests = config.getoption("markexpr") == "fast" and collection_path.name.startswith("test_")
    return True if tests and not name.startswith(LANE) else None


def pytest_collection_modifyitems(items):
    for item in items:
        for fixture in NEEDS.keys() & set(getattr(item, "fixturenames", ())):
            item.add_marker(NEEDS[fixture])
        if item.nodeid.startswith(LANE) and not {*LONG, *NEEDS.values()} & {m.name for m in item.iter_markers()}:
            item.add_marker("fast")
    marks = {item.path: set() for item in items}  # of a file's tests
    for item in items:
        marks[item.path] |= {m.name for m in item.iter_markers()}
    # A file's tests run on one worker, and on one those of all files that start processes: it alone has their server.
    for item in items:
        starts = marks[item.path] & {"process", "ray"}
        item.add_marker(pytest.mark.xdist_group("processes" if starts else item.path.as_posix()))
    # Files that take long come first, so that no worker waits for another's last one.
    items.sort(key=lambda item: next((i for i, name in enumerate(LONG) if name in marks[item.path]), len(LONG)))


def pytest_configure(config):
    # Who only hands tests to workers does without torch and all else that fixtures import: it starts at once.
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("tests.fixtures")


def pytest_collection_finish():
    # What imports and collection made stays to the end: walking through it at each collection of garbage takes a tenth.
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # libraries look at the end for what was not freed
