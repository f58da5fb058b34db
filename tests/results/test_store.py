"""The folder of results: what is written whole, found again, claimed, set aside; and the journal of a running cell."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dart_eval.results.record import SCHEMA
from dart_eval.results.store import Journal, Store, write_atomically
from dart_eval.util.errors import StoreError, UserError
from tests.helpers.commands import start
from tests.helpers.records import answered, record

TEXTS = [{"task": "arc_easy", "doc_id": 0, "prompt": "Why?", "choices": ["a", "b"], "target": 1}]


def test_what_is_saved_is_found_again_and_nothing_is_created_before(tmp_path):
    store, made = Store(tmp_path / "out"), record()
    assert store.get("cell", "k1") is None and not store.folder.exists()
    saved = store.save("cell", made, TEXTS)
    assert store.file("cells", "cell", "k1").is_file()
    assert store.get("cell", "k1") == dataclasses.replace(saved, samples=[]) == store.load()[0]
    assert store.samples(store.load()[0]) == made.samples
    assert store.texts(store.load()[0]) == {("arc_easy", 0): TEXTS[0]}
    assert dataclasses.replace(saved, files={}) == made


def test_texts_are_kept_once_for_all_cells(tmp_path):
    store = Store(tmp_path)
    for key in ("k1", "k2"):
        store.save("cell", record(key=key), TEXTS)
    assert len(list((tmp_path / "texts").iterdir())) == 1
    store.save("cell", record(key="k3"), [{**TEXTS[0], "prompt": "another"}])
    assert len(list((tmp_path / "texts").iterdir())) == 2
    assert [store.texts(r)["arc_easy", 0]["prompt"] for r in store.load()] == ["Why?", "Why?", "another"]


@pytest.mark.parametrize("damage", ["lost", "cut", "changed"])
@pytest.mark.parametrize("kind", ["texts", "samples"])
def test_a_cell_with_damaged_parts_is_not_finished_is_set_aside_and_made_whole_again(tmp_path, kind, damage):
    store = Store(tmp_path)
    saved, other = store.save("cell", record(), TEXTS), store.save("other", record(key="k2"))
    assert store.texts(other) == {}  # none were kept
    path = store.file("samples", "cell", "k1") if kind == "samples" else next((tmp_path / kind).iterdir())
    if damage == "lost":
        path.unlink()
    else:
        text = path.read_text()
        path.write_text(text[:-3] if damage == "cut" else text.replace("Why?", "How?").replace("1.0", "0.0"))
    with pytest.raises(UserError, match=f"{kind} of arc_easy under dart at 50 % .* cannot be read"):
        getattr(store, kind)(saved)
    assert store.get("cell", "k1") is None and store.get("other", "k2") is not None
    moved = store.set_aside("cell", "k1")
    names = ["cell-k1.json.damaged", "cell-k1.jsonl.damaged"]
    assert [p.name for p in moved] == names[: 2 - (kind == "samples" and damage == "lost")]
    assert all(p.is_file() for p in moved)
    store.save("cell", record(), TEXTS)
    assert store.get("cell", "k1") is not None and store.texts(saved) == {("arc_easy", 0): TEXTS[0]}


def test_setting_aside_sweeps_up_what_a_killed_process_leaves_of_a_cell_with_a_long_name(tmp_path, monkeypatch):
    name, replace, store = "smoke_summary-griffin-remask-drift-0.5", os.replace, Store(tmp_path)

    def killed(temporary, path):
        shutil.copy(temporary, f"{temporary}x")
        replace(temporary, path)

    monkeypatch.setattr("os.replace", killed)
    store.save(name, record(), TEXTS)
    left = [p for kind in ("cells", "samples", "texts") for p in (tmp_path / kind).glob(".*")]
    assert len(left) == 3
    store.file("cells", name, "k1").unlink()
    others = [tmp_path / kind / f".{name}-k2.half" for kind in ("cells", "samples", "texts")]  # being written elsewhere
    for other in others:
        other.write_text("{")
    assert store.set_aside(name, "k1") == []  # samples without a record: stopped between the two, not damaged
    assert sorted(p for p in tmp_path.rglob(".*") if p.is_file()) == others


def _claim(folder, hold, answer):
    with Store(folder).claim("cell", "k1") as mine:
        answer.send(mine)
        if hold:
            time.sleep(60)


@pytest.mark.process
def test_a_claim_is_held_by_one_process_and_ends_with_it(tmp_path):
    def claim(hold):
        ours, theirs = multiprocessing.Pipe()
        return start(_claim, tmp_path, hold, theirs), ours.recv()

    first, mine = claim(hold=True)
    assert mine
    second, theirs = claim(hold=False)
    assert not theirs
    with Store(tmp_path).claim("cell", "k1") as ours, Store(tmp_path).claim("cell", "k2") as other:
        assert (ours, other) == (False, True)
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    third, mine = claim(hold=False)
    assert mine
    for process in (second, third):
        process.join()


def test_another_key_is_another_cell_even_under_the_same_file_name(tmp_path):
    store, start = Store(tmp_path), "a" * 16
    store.save("cell", record(key=start + "1"))
    assert store.file("cells", "cell", start + "1") == store.file("cells", "cell", start + "2")
    assert store.get("cell", start + "2") is None


def test_records_are_loaded_oldest_first(tmp_path):
    store = Store(tmp_path)
    for name, key, created in (("a", "k3", "2026-01-03"), ("b", "k1", "2026-01-01"), ("c", "k2", "2026-01-02")):
        store.save(name, record(key=key, created=created))
    assert [r.key for r in store.load()] == ["k1", "k2", "k3"]


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_truncated_record_counts_as_not_finished_and_is_named(tmp_path, share):
    store = Store(tmp_path)
    store.save("cell", record())
    path = store.file("cells", "cell", "k1")
    text = path.read_bytes()
    path.write_bytes(text[: int(share * len(text))])
    assert store.get("cell", "k1") is None
    with pytest.raises(UserError, match="cannot be read") as error:
        store.load()
    assert str(path) in error.value.problem
    assert "remove it" in error.value.remedy


def test_a_record_of_a_newer_version_is_named(tmp_path):
    store = Store(tmp_path)
    store.save("cell", record())
    path = store.file("cells", "cell", "k1")
    path.write_text(json.dumps({**record().to_json(), "schema": SCHEMA + 1}))
    with pytest.raises(UserError, match=f"schema {SCHEMA + 1} is not known"):  # neither redone nor set aside
        store.get("cell", "k1")
    with pytest.raises(UserError, match=f"{path.name} cannot be read .*schema {SCHEMA + 1}"):
        store.load()


FULL = OSError(28, "No space left on device")


def full(*_):
    raise FULL


@pytest.mark.parametrize(("step", "error"), [
    ("fsync", FULL), ("chmod", FULL), ("replace", FULL), ("fsync", KeyboardInterrupt()),
])  # fmt: skip
def test_a_failed_or_interrupted_write_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch, step, error):
    path = tmp_path / "record.json"
    write_atomically(path, "old")

    def fail(*_):
        raise error

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(error)):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_a_cell_whose_record_cannot_be_written_is_not_finished(tmp_path, monkeypatch):
    store, replace = Store(tmp_path), os.replace

    monkeypatch.setattr(os, "replace", lambda a, b: full() if str(b).endswith(".json") else replace(a, b))
    with pytest.raises(UserError, match=r"cannot be written .*No space left.*--output"):
        store.save("cell", record())
    assert store.get("cell", "k1") is None
    assert list((tmp_path / "cells").iterdir()) == []


# -- journal -------------------------------------------------------------------------------------------------------

BATCHES = [{"a": [0.1 + 0.2, True]}, {"b": ["ünsafe\n\u2028", None], "c": [float("-inf")]}, {"d": {"signal": [1e-300]}}]


def _written(path):
    journal = Journal(path)
    for i, batch in enumerate(BATCHES):
        journal.add(batch, state_bytes=10 * (3 - i), seconds=0.5)
    return path.read_bytes()


def test_a_journal_goes_on_where_it_was(tmp_path):
    path = tmp_path / "partial" / "cell.jsonl"
    _written(path)
    journal = Journal(path)
    for batch in BATCHES:
        for request, answer in batch.items():
            assert request in journal
            assert journal[request] == answer  # floats to the last bit
    assert (len(journal), journal.state_bytes, journal.seconds) == (4, 30, 1.5)
    journal.add({"e": [1]}, 40, 0.5)
    assert len(Journal(path)) == 5
    journal.remove()
    assert not path.exists()
    assert len(journal) == 0


def test_a_journal_cut_anywhere_keeps_the_batches_before_the_cut(tmp_path):
    whole = _written(tmp_path / "whole")
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    assert len(ends) == len(BATCHES)
    path = tmp_path / "cut"
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        complete = sum(end <= cut for end in ends)
        journal = Journal(path)
        assert len(journal) == sum(len(b) for b in BATCHES[:complete])
        journal.add({"z": [1]}, 0, 0.0)  # goes on after the last whole line
        assert len(Journal(path)) == len(journal)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(place=st.floats(0, 0.999), byte=st.integers(0, 255))
def test_a_journal_with_a_changed_byte_gives_no_wrong_answer(tmp_path, place, byte):
    path = tmp_path / "changed"
    path.unlink(missing_ok=True)
    data = bytearray(_written(path))
    data[int(place * len(data))] = byte
    path.write_bytes(bytes(data))
    journal = Journal(path)
    for batch in BATCHES:
        for request, answer in batch.items():
            assert request not in journal or journal[request] == answer


@pytest.mark.parametrize("left", [b"", b"mine", b"mine\n"])
def test_a_link_among_journals_is_refused_and_its_target_untouched(tmp_path, left):
    victim, path = tmp_path / "victim", Store(tmp_path / "out").file("partial", "cell", "k")
    victim.write_bytes(left)
    path.parent.mkdir(parents=True)
    path.symlink_to(victim)
    with pytest.raises(StoreError, match="link"):
        Store(tmp_path / "out").journal("cell", "k").add({"a": [1]}, 0, 0.0)
    assert victim.read_bytes() == left


def test_a_full_disk_is_said_in_one_line_and_loses_no_earlier_batch(tmp_path, monkeypatch):
    path = tmp_path / "out" / "partial" / "cell.jsonl"
    _written(path)
    journal = Journal(path)
    journal.add({"e": [1]}, 0, 0.0)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"cannot be written to .*out \(No space left on device\)"):
        journal.add({"f": [1]}, 0, 0.0)
    monkeypatch.undo()
    assert "e" in Journal(path)


def test_a_task_may_have_a_slash_in_its_name(tmp_path):
    store = Store(tmp_path)
    for task in ("mine/slash", "../../up", "long" * 60):
        made = answered(task, [{"acc": 1.0}] * 3)
        store.save(f"{task}-dart", made, [{"task": task, "doc_id": 0}])
        assert store.get(f"{task}-dart", made.key).inputs["task"] == task
    assert len(store.load()) == 3 and not list(tmp_path.parent.glob("up*"))
