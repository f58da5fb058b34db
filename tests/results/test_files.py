"""Files that a user names: pipes and devices are written into, links followed, records that are none refused."""

import os
import threading
import time

import pytest

from dart_eval.results.store import Store
from dart_eval.sweep.options import config_from
from dart_eval.util import files
from dart_eval.util.errors import UserError
from tests.helpers.commands import command
from tests.helpers.records import answered, record, save

VALUES = [{"acc": float(i % 2)} for i in range(12)]
# The commands that write a file which the user names, from a folder with two cells that can be compared.
VERBS = {
    "tables": ("tables", "out", "--format", "md", "--save"),
    "compare": ("compare", "out", "--row", "dart,griffin", "--format", "csv", "--save"),
    "check": ("check", "out", "--baseline", "out", "--junit"),
    "baseline": ("check", "out", "--update", "--baseline"),
    "report": ("report", "out", "--output"),
}


@pytest.fixture(params=VERBS)
def verb(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "out", answered("arc", VALUES), answered("arc", VALUES[::-1], "griffin"))
    return VERBS[request.param]


def test_a_pipe_stays_a_pipe_and_of_a_link_the_target_is_written(tmp_path, verb):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()), daemon=True)
    reader.start()
    done = command(*verb, pipe)
    assert done.code == 0, done.err
    assert pipe.is_fifo(), "the pipe was replaced"
    reader.join(30)
    assert len(got[0]) > 100
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "link.md", tmp_path / "there" / "target"
    link.symlink_to(target)
    for _ in ("made", "written again"):
        assert command(*verb, link).code == 0
        assert link.is_symlink() and target.stat().st_size > 100
    assert [p.name for p in target.parent.iterdir()] == ["target"]


def test_what_cannot_be_written_is_refused_and_nothing_is_touched(tmp_path, verb):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("precious")
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(tmp_path.rglob("*"))
    for target in ("folder", "file/below", "loop", "x" * 300, "deep/" * 900 + "x"):
        code, out, err = command(*verb, target)
        assert (code, out, err.count("\n")) == (2, "", 1), target
        assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("precious", ["precious", "<!doctype html>\n<title>mine</title>", '{"schema": 5}', "", None])
def test_a_baseline_replaces_nothing_but_a_baseline(tmp_path, precious):
    save(tmp_path / "out", answered("arc", VALUES))
    target = tmp_path / "notes.txt"
    if precious is not None:
        target.write_text(precious)
    words = ("check", tmp_path / "out", "--update", "--baseline", target)
    done = command(*words)
    if precious:
        assert (done.code, done.out) == (2, "") and str(target) in done.err and target.read_text() == precious
    else:
        made = target.read_bytes()
        assert done.code == command(*words).code == 0 and target.read_bytes() == made  # it is its own now


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may make a device")
def test_a_device_is_written_into_and_stays_a_device(tmp_path):
    null = tmp_path / "null"
    try:
        os.mknod(null, 0o20666, os.makedev(1, 3))
        null.open("wb").close()
    except OSError:
        pytest.skip("no devices here")
    files.write(null, "text")
    assert null.is_char_device()


def test_a_pipe_is_read_to_its_end_however_late_its_writer_is(tmp_path):
    pipe, pause = tmp_path / "pipe", 0.1
    os.mkfifo(pipe)

    def write():
        time.sleep(pause)
        with pipe.open("wb", buffering=0) as stream:
            for part in (b"tasks: ", b"arc\n" + b"#" * 200_000):
                stream.write(part)
                time.sleep(pause)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    assert config_from(pipe, {}).tasks == ("arc",)
    writer.join(10)


@pytest.mark.parametrize("what", ["pipe", "endless", "folder"])
@pytest.mark.parametrize("kind", ["cells", "samples", "texts", "partial"])
def test_what_is_no_file_is_refused_and_never_read(tmp_path, what, kind):
    """It may never end. A cell of it is run again."""
    store = Store(tmp_path)
    saved = store.save("cell", record(), [{"task": "arc_easy", "doc_id": 0}])
    path = store.file("partial", "cell", "k1") if kind == "partial" else next((tmp_path / kind).iterdir())
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if what == "pipe":
        os.mkfifo(path)
    elif what == "endless":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    reads = {
        "cells": store.load, "samples": lambda: store.samples(saved), "texts": lambda: store.texts(saved),
        "partial": lambda: store.journal("cell", "k1"),
    }  # fmt: skip
    with pytest.raises(UserError, match=r"regular file|directory"):
        reads[kind]()
    assert os.path.lexists(path)
    assert (store.get("cell", "k1") is None) == (kind != "partial")
    if kind in ("cells", "samples"):
        assert store.set_aside("cell", "k1")
        store.save("cell", record())
        assert store.get("cell", "k1") is not None
