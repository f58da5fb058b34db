"""Files that a user names: pipes and devices are written into, links followed, records that are none refused."""

import dataclasses
import os
import threading
import time
from pathlib import Path

import pytest

from dart_eval.results.store import Store
from dart_eval.sweep.options import config_from
from dart_eval.util import files
from dart_eval.util.errors import StoreError, UserError
from tests.helpers.commands import command
from tests.helpers.records import answered, record, samples, save

VALUES = [{"acc": float(i % 2)} for i in range(12)]


@pytest.fixture
def folder(tmp_path):
    """A folder of results with two cells that can be compared."""
    made = dataclasses.replace(record("griffin", key="k2"), samples=samples("arc_easy", VALUES))
    Store(tmp_path / "out").save("griffin", made)
    return save(tmp_path / "cells", answered("arc", VALUES), answered("arc", VALUES[::-1], "griffin"))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a command that may write where it stands; returns its status and what it said."""
    monkeypatch.chdir(tmp_path)
    return command


def verbs(folder, target):
    """The commands that write a file which the user names."""
    return {
        "tables": ("tables", folder.parent / "out", "--save", target, "--format", "md"),
        "compare": ("compare", folder, "--row", "dart,griffin", "--save", target, "--format", "csv"),
        "check": ("check", folder, "--baseline", folder, "--junit", target),
        "baseline": ("check", folder, "--baseline", target, "--update"),
        "report": ("report", folder.parent / "out", "--output", target),
    }  # fmt: skip


VERBS = sorted(verbs(Path("a/b"), ""))


@pytest.mark.parametrize("verb", VERBS)
def test_a_pipe_is_written_into_and_stays_a_pipe(folder, tmp_path, run, verb):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()), daemon=True)
    reader.start()
    code, out, err = run(*verbs(folder, pipe)[verb])
    assert code in (0, None), err
    assert pipe.is_fifo(), "the pipe was replaced"
    reader.join(30)
    assert len(got[0]) > 100
    assert "wrote" not in out or verb == "baseline"


@pytest.mark.parametrize("verb", VERBS)
def test_of_a_symbolic_link_the_target_is_written_and_the_link_stays(folder, tmp_path, run, verb):
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "link.md", tmp_path / "there" / "target"
    link.symlink_to(target)
    for _ in ("made", "written again"):
        code, _, err = run(*verbs(folder, link)[verb])
        assert code in (0, None), err
        assert link.is_symlink()
        assert target.stat().st_size > 100
    assert [p.name for p in target.parent.iterdir()] == ["target"]


def test_a_file_of_somebody_elses_is_not_replaced(folder, tmp_path, run):
    target = tmp_path / "notes.txt"
    words = verbs(folder, target)["baseline"]
    for precious in ("precious", "<!doctype html>\n<title>mine</title>", '{"schema": 5}'):
        target.write_text(precious)
        code, out, err = run(*words)
        assert (code, out) == (2, "")
        assert err.startswith(f"error: {target} is not a baseline, and would be overwritten; choose another file")
        assert target.read_text() == precious
    target.write_bytes(b"")
    assert run(*words)[0] in (0, None)
    made = target.read_bytes()
    assert run(*words)[0] in (0, None)  # it is its own now
    assert len(target.read_bytes()) == len(made)


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


@pytest.mark.parametrize(("verb", "name"), [("tables", "t.txt"), ("tables", "t"), ("compare", "c.txt")])
def test_an_ending_that_tells_no_format_is_refused(folder, tmp_path, run, verb, name):
    command = verbs(folder, tmp_path / name)[verb][:-2]
    code, out, err = run(*command)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1 and f"{name} has no ending of a known format; use .md, .csv" in err
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("target", ["folder", "file/below", "loop", "x" * 300, "deep/" * 900 + "x"])
def test_what_cannot_be_written_is_said_in_one_line(folder, tmp_path, run, verb, target):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("precious")
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(*verbs(folder, target)[verb])
    assert (code, out) == (2, ""), err
    assert len(err.splitlines()) == 1
    assert "cannot be written (" in err or "cannot be a path (" in err  # what no file can be called is told first
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "precious"


def test_a_name_as_long_as_the_file_system_takes_is_written(tmp_path):
    path = tmp_path / ("x" * 250 + ".md")
    files.check_target(path)
    files.write(path, "ü")
    assert path.read_bytes() == "ü".encode()


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "", "\ud800"])
def test_no_possible_path_is_told(tmp_path, name):
    with pytest.raises(UserError):
        files.check_name(name, "--output")
    for call in (lambda: files.read_text(name, "config", ""), lambda: files.write(name, "text")):
        with pytest.raises(UserError, match="cannot be"):
            call()


def test_a_text_that_is_not_utf8_is_told_with_its_place(tmp_path):
    (tmp_path / "latin").write_bytes(b"one\ntwo\nna\xefve\n")
    with pytest.raises(UserError, match=r"config .*latin cannot be read \('utf-8' .* 0xef in position 10: .*\); why"):
        files.read_text(tmp_path / "latin", "config", "why")


@pytest.mark.parametrize("pause", [0.0, 0.2])
def test_a_pipe_is_read_to_its_end_however_late_its_writer_is(tmp_path, pause):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def write():
        time.sleep(pause)
        with pipe.open("wb", buffering=0) as stream:
            time.sleep(pause)
            for part in (b"tasks: ", b"arc\n" + b"#" * 200_000):
                stream.write(part)
                time.sleep(pause)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    assert config_from(pipe, {}).tasks == ("arc",)
    writer.join(10)


# -- records and samples that would never end ----------------------------------------------------------------------


def replaced(path, what):
    path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    elif what == "endless":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()


@pytest.mark.parametrize("what", ["pipe", "endless", "folder"])
def test_a_record_that_is_no_file_is_refused_and_run_again(tmp_path, what):
    store = Store(tmp_path)
    store.save("cell", record())
    replaced(store.file("cells", "cell", "k1"), what)
    with pytest.raises(UserError, match=r"cell-k1.json cannot be read \(.*(no regular file|directory)"):
        store.load()
    assert store.get("cell", "k1") is None
    assert store.set_aside("cell", "k1")
    store.save("cell", record())
    assert store.get("cell", "k1") is not None


@pytest.mark.parametrize("what", ["pipe", "endless", "folder"])
def test_samples_that_are_no_file_are_refused(tmp_path, what):
    store = Store(tmp_path)
    saved = store.save("cell", record(), [{"task": "arc_easy", "doc_id": 0}])
    replaced(store.file("samples", "cell", "k1"), what)
    replaced(tmp_path / "texts" / saved.files["texts"]["name"], what)
    with pytest.raises(UserError, match=r"samples of arc_easy .* cannot be read"):
        store.samples(saved)
    with pytest.raises(UserError, match=r"texts of arc_easy .* cannot be read"):
        store.texts(saved)
    assert store.get("cell", "k1") is None


@pytest.mark.parametrize("what", ["pipe", "folder"])
def test_a_journal_that_is_no_file_is_refused(tmp_path, what):
    path = tmp_path / "partial" / "cell-k1.jsonl"
    path.parent.mkdir()
    path.touch()
    replaced(path, what)
    with pytest.raises(StoreError, match=r"no regular file|directory"):
        Store(tmp_path).journal("cell", "k1")
    assert path.exists()
