"""The boards and the numbers of the folders in results/board are those of tests/golden/boards, to the last digit.

A file there changes only in a commit that says why. Of a board the titles and rows are compared as text, its sentences
are free; numbers of JSON may differ by 1e-9, as sums of another processor do.
"""

import json
import lzma
import math
import tarfile

import pytest

from dart_eval.results import board, frame
from dart_eval.results.store import Store
from tests.helpers.commands import ROOT, command

ARCHIVES = sorted(ROOT.glob("results/board/*.tar.xz"))
GOLDEN = ROOT / "tests" / "golden" / "boards"
KEYS = ("model", "label", "scope", "task", "metric", "seed")  # what tells a row to a reader of a failure


@pytest.fixture(scope="module", params=ARCHIVES, ids=lambda archive: archive.name.partition(".")[0])
def archive(request, tmp_path_factory):
    """The name of an archive, and its folder of results; both tests share what is read, and compared with dense."""
    folder = tmp_path_factory.mktemp("archive") / "out"
    with tarfile.open(request.param) as packed:
        packed.extractall(folder, filter="data")
    store, pairs = Store(folder), {}
    cells = {cell.key: cell for cell in frame.with_distances([frame.cell_of(store, r) for r in store.load()])}

    def paired(a, b, stock=frame.paired):
        if (a.key, b.key) not in pairs:
            pairs[a.key, b.key] = stock(a, b)
        return pairs[a.key, b.key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frame, "paired", paired)
        for user in (board, frame):
            patch.setattr(user, "with_distances", lambda some, texts=True: [cells[cell.key] for cell in some])
        yield request.param.name.removesuffix(".tar.xz"), folder


def same(here, there):
    if isinstance(here, float) and isinstance(there, float):
        return math.isclose(here, there, rel_tol=1e-9, abs_tol=1e-12) or (math.isnan(here) and math.isnan(there))
    if isinstance(here, list) and isinstance(there, list) and len(here) == len(there):
        return all(map(same, here, there))
    return here == there


def rows_of(folder):
    """The titles and the rows of a folder's board, with all columns."""
    lines = command("tables", folder, "--format", "md").out.splitlines()
    return [line for line in lines if line.startswith(("#", "|"))]


@pytest.mark.slow
def test_board_is_the_golden_one(archive):
    name, folder = archive
    assert rows_of(folder) == (GOLDEN / f"{name}.txt").read_text("utf-8").splitlines()


@pytest.mark.slow
def test_numbers_are_the_golden_ones(archive):
    name, folder = archive
    rows = json.loads(command("tables", folder, "--format", "json").out)
    golden = json.loads(lzma.decompress((GOLDEN / f"{name}.json.xz").read_bytes()))
    assert [[row.get(key) for key in KEYS] for row in rows] == [[row[key] for key in KEYS] for row in golden]
    moved = [
        f"{', '.join(str(then[key]) for key in KEYS)}: {field} {then[field]!r} -> {now.get(field)!r}"
        for now, then in zip(rows, golden, strict=True)
        for field in then
        if not same(now.get(field), then[field])
    ]
    assert not moved, "\n".join(moved[:20])


def test_every_archive_has_its_golden_files():
    names = {archive.name.removesuffix(".tar.xz") for archive in ARCHIVES}
    assert names and {file.name.partition(".json")[0].removesuffix(".txt") for file in GOLDEN.iterdir()} == names
