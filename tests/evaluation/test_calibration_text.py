"""The text that methods calibrate on: a file, or the train split of a data set."""

import hashlib
import json

import pytest

from dart_eval.evaluation.calibration_text import calibration_text
from dart_eval.pruning.calibration import DEFAULT_TEXT
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
    assert found.text == "one\ntwo"
    assert found.digest == hashlib.sha256(b"one\r\ntwo").hexdigest()
    assert calibration_text(None).text == DEFAULT_TEXT.read_text()


def test_of_a_data_set_the_first_text_field_of_the_train_split_is_read(tmp_path):
    rows = [{"id": n, "text": text, "title": "x"} for n, text in enumerate(("one", " ", "two"))]
    folder = data_set(tmp_path, rows)
    found = calibration_text("org/name", folder)
    assert found.text == "one\n\ntwo"
    assert found.digest == hashlib.sha256(b"one\n\ntwo").hexdigest()
    nulls = data_set(tmp_path / "nulls", [{"text": "one"}, {"text": None}, {"text": "two"}])
    assert calibration_text("org/name", nulls).text == "one\n\ntwo"
    data_set(tmp_path, [{"text": "other"}], "org__name/small")
    assert calibration_text("org/name:small", folder).text == "other"


@pytest.mark.parametrize(("name", "rows", "word"), [
    ("org/name", [], "that can be loaded"), ("org/name", ["{"], "that can be loaded"),
    ("org/name", [{"id": 1}], "no text field"), ("org/name:small", [], "org__name/small/train.jsonl"),
])  # fmt: skip
def test_what_is_no_text_is_refused(tmp_path, name, rows, word):
    with pytest.raises(UserError, match=word):
        calibration_text(name, data_set(tmp_path, rows))


def test_a_folder_of_a_data_sets_name_is_not_taken_for_the_hubs(tmp_path, monkeypatch):
    data_set(tmp_path, [{"text": "local words"}], "wikitext")
    monkeypatch.chdir(tmp_path)
    for name, word in (("wikitext", "./wikitext"), ("org/no-such-name", "org/no-such-name")):
        with pytest.raises(UserError, match=word):
            calibration_text(name)
