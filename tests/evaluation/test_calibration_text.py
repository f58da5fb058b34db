"""The text that methods calibrate on: a file, or the train split of a data set."""

import hashlib
import json
from types import SimpleNamespace

import pytest

from dart_eval.evaluation.calibration_text import calibration_text, sharing
from dart_eval.pruning.calibration import DEFAULT_TEXT
from dart_eval.sweep import jobs
from dart_eval.sweep.options import RunConfig
from dart_eval.util.errors import UserError


def data_set(folder, rows, name="org__name/default"):
    """A local data set with these rows in its train split."""
    (folder / name).mkdir(parents=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name / "train.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return str(folder)


def test_a_file_is_read_whole_and_the_projects_own_where_none_is_named(tmp_path):
    (tmp_path / "text").write_bytes(b"one\r\ntwo")
    found = calibration_text(str(tmp_path / "text"))
    assert (found.text, found.data_set) == ("one\ntwo", None)
    assert found.digest == hashlib.sha256(b"one\r\ntwo").hexdigest()
    assert calibration_text(None).text == DEFAULT_TEXT.read_text()


def test_of_a_data_set_the_first_text_field_of_the_train_split_is_read(tmp_path):
    rows = [{"id": n, "text": text, "title": "x"} for n, text in enumerate(("one", " ", "two"))]
    folder = data_set(tmp_path, rows)
    found = calibration_text("org/name", folder)
    assert (found.text, found.data_set) == ("one\n\ntwo", "org/name")
    nulls = data_set(tmp_path / "nulls", [{"text": "one"}, {"text": None}, {"text": "two"}])
    assert calibration_text("org/name", nulls).text == "one\n\ntwo"
    data_set(tmp_path, [{"text": "other"}], "org__name/small")
    assert calibration_text("org/name:small", folder).text == "other"
    file = tmp_path / "org__name" / "small" / "train.jsonl"  # named itself, it is known to be of the data set
    assert calibration_text(str(file), folder).data_set == "org/name"


@pytest.mark.parametrize(("rows", "words"), [
    ([], "train.jsonl has no documents"), (["{"], "train.jsonl, line 1: "), ([{"id": 1}], "has no text field"),
])  # fmt: skip
def test_a_data_set_that_is_no_text_is_refused(tmp_path, rows, words):
    with pytest.raises(UserError, match=words):
        calibration_text("org/name", data_set(tmp_path, rows))


def test_a_name_that_is_nothing_is_refused(tmp_path):
    words = r"org/name is neither a file nor a data set of .* \(looked for org__name/default/train.jsonl\)"
    with pytest.raises(UserError, match=words):
        calibration_text("org/name", str(tmp_path))
    with pytest.raises(UserError, match="org/no-such-name is neither a file nor a data set that can be loaded"):
        calibration_text("org/no-such-name")


def test_a_folder_of_a_data_sets_name_is_not_taken_for_the_hubs(tmp_path, monkeypatch):
    (tmp_path / "wikitext").mkdir()
    (tmp_path / "wikitext" / "train.jsonl").write_text('{"text": "local words"}\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"calibration wikitext would load ./wikitext of the working directory; start"):
        calibration_text("wikitext")


def task(name, path, files=None):
    kwargs = None if files is None else {"data_files": files}
    return SimpleNamespace(task_name=name, config=SimpleNamespace(dataset_path=path, dataset_kwargs=kwargs))


TASKS = [
    task("wikitext", "EleutherAI/wikitext_document_level"), task("c4", "allenai/c4"), task("none", None),
    task("local", "json", {"test": "/data/Salesforce__wikitext/default/test.jsonl"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "tasks"), [
    ("Salesforce/wikitext", ["wikitext", "local"]), ("wikitext", ["wikitext", "local"]), ("allenai/c4", ["c4"]),
    ("wiki", []), ("json", []),
])  # fmt: skip
def test_tasks_that_ask_documents_of_the_same_data_set_are_found(name, tasks):
    assert sharing(TASKS, name) == tasks


def test_a_run_says_so_where_a_method_calibrates(tmp_path):
    folder = data_set(tmp_path, [{"text": "one"}], "Salesforce__wikitext/default")
    loaded = SimpleNamespace(load=lambda name: TASKS)
    for method, count in (("griffin", 0), ("griffin,flap", 1)):
        notes = []
        config = RunConfig(method=method, calibration="Salesforce/wikitext", data_dir=folder)
        jobs._warn_shared_data(config, loaded, ["any"], SimpleNamespace(note=notes.append))
        assert len(notes) == count and all(
            n.startswith("wikitext, local: methods calibrate on the same") for n in notes
        )
