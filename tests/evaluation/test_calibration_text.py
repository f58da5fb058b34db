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


@pytest.mark.parametrize(("rows", "words"), [
    ([], "nor a data set that can be loaded"), (["{"], "nor a data set that can be"), ([{"id": 1}], "no text field"),
])  # fmt: skip
def test_a_data_set_that_is_no_text_is_refused(tmp_path, rows, words):
    with pytest.raises(UserError, match=words):
        calibration_text("org/name", data_set(tmp_path, rows))


def test_a_name_that_is_nothing_is_refused(tmp_path):
    words = r"org/name: neither a file nor a data set of .* \(looked for .*org__name/default/train.jsonl\)"
    with pytest.raises(UserError, match=words):
        calibration_text("org/name", str(tmp_path))
    with pytest.raises(UserError, match="org/no-such-name: neither a file nor a data set that can be loaded"):
        calibration_text("org/no-such-name")


def test_a_folder_of_a_data_sets_name_is_not_taken_for_the_hubs(tmp_path, monkeypatch):
    (tmp_path / "wikitext").mkdir()
    (tmp_path / "wikitext" / "train.jsonl").write_text('{"text": "local words"}\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"calibration wikitext would load ./wikitext of the working directory; start"):
        calibration_text("wikitext")
