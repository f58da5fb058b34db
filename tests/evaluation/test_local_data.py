"""Wrong local data: the file, the line and the cause, or the document; nothing that counts as wrong in silence."""

import gzip
import json
import os

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dart_eval.errors import UserError
from dart_eval.evaluation.local_data import first_fault
from dart_eval.evaluation.tasks import Tasks


def row(i=0, **changes):
    return {
        "ind": i, "activity_label": "Roof", "ctx_a": "A man", "ctx_b": "he", "ctx": "A man is here. he",
        "endings": ["wraps", "rips", "holds", "starts"], "label": str(i % 4), **changes,
    }  # fmt: skip


def lines(*rows):
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


GOOD = lines(*map(row, range(4)))
FAULTS = {
    "latin-1": (GOOD + '{"ctx": "café"}\n'.encode("latin-1"), "line 5 is not UTF-8 text (byte 0xe9)"),
    "utf-16": (GOOD.decode().encode("utf-16"), "line 1 is not UTF-8 text (byte 0xff)"),
    "packed": (gzip.compress(GOOD), "line 1 is not UTF-8 text (byte 0x8b)"),
    "cut": (GOOD[:-30], "line 4 is not JSON (Unterminated string"),
    "text": (GOOD + b"not json\n", "line 5 is not JSON (Expecting value at column 1)"),
    "nul": (GOOD + b"\0\0\n", "line 5 is not JSON"),
    "two on a line": (GOOD + GOOD.splitlines()[0] * 2, "line 5 is not JSON (Extra data"),
    "list": (GOOD + b"[1]\n", "line 5 is a list, not an object"),
    "number": (GOOD + b"5\n", "line 5 is a number, not an object"),
    "null": (GOOD + b"\nnull\n", "line 6 is null, not an object"),
    "twice": (GOOD + b'{"a": 1, "a": 2}\n', "line 5 has the field 'a' twice"),
    "nan": (GOOD + lines(row(float("nan"), label="1")), "line 5 holds NaN, which is no number of JSON"),
    "huge": (GOOD + lines(row(10**30)), "line 5 holds a number of more than 64 bits"),
    "half": (GOOD + lines(row(5, ctx="\ud800")), "line 5 holds half a character (a lone surrogate)"),
    "deep": (GOOD + b'{"a":' * 100_000, "line 5 is nested too deeply"),
    "kind": (GOOD + lines(row(5, endings="one")), "line 5 has text in the field 'endings', where line 1 has a list"),
    "number for text": (GOOD + lines(row(5, label=3)), "line 5 has a number in the field 'label'"),
    "missing": (GOOD + lines({"ctx": "a"}), "line 5 lacks the field 'ind', which line 1 has"),
    "more": (GOOD + lines(row(5, more=1)), "line 1 lacks the field 'more', which line 5 has"),
    "empty": (b"", "which holds no documents"),
    "blank": (b"\n\n", "which holds no documents"),
    "label": (GOOD + lines(row(5, label="b"), row(6)), "line 5: the task cannot use it (ValueError: invalid literal"),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(FAULTS))
def test_a_broken_row_is_told_with_its_file_line_and_cause(tmp_path, kind):
    data, words = FAULTS[kind]
    good, bad = tmp_path / "train.jsonl", tmp_path / "validation.jsonl"
    good.write_bytes(b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n"))
    bad.write_bytes(data)

    def prepare(dataset):
        return dataset.map(lambda doc: {"gold": int(doc["label"])})

    said = first_fault([str(good), str(bad)], prepare)
    assert said is not None and said.startswith(f"{bad}, ") and words in said
    assert first_fault([str(good)], prepare) is None


PIECES = [GOOD[:200], b"\n", b"{}", b"[", b"1", b"\xff"]


@given(st.binary(max_size=60) | st.lists(st.sampled_from(PIECES)).map(b"".join))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_documents_or_told_in_one_line(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "any.jsonl"
    file.write_bytes(data)
    said = first_fault([str(file)], None)
    assert said is None or said.startswith(str(file))


def data_dir(folder, validation, train=GOOD):
    place = folder / "Rowan__hellaswag" / "default"
    place.mkdir(parents=True)
    (place / "train.jsonl").write_bytes(train)
    (place / "validation.jsonl").write_bytes(validation)
    return place


@pytest.fixture
def _beside(tmp_path, monkeypatch, indexed):
    """Data sets that were read are kept beside the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.slow  # the index of all tasks
@pytest.mark.usefixtures("_beside")
@pytest.mark.parametrize(("kind", "words"), [
    ("latin-1", "validation.jsonl, line 5 is not UTF-8 text"), ("cut", "validation.jsonl, line 4 is not JSON"),
    ("missing", "validation.jsonl, line 5 lacks the field 'ind'"), ("empty", "validation.jsonl, which holds no"),
    ("label", "validation.jsonl, line 5: the task cannot use it"),
])  # fmt: skip
def test_a_task_whose_data_cannot_be_read_names_the_line(tmp_path, kind, words):
    data_dir(tmp_path / "data", FAULTS[kind][0])
    with pytest.raises(UserError) as said:
        Tasks(tmp_path / "data").check("hellaswag", None)
    assert str(said.value).startswith("task hellaswag: ") and words in str(said.value)
    assert "DatasetGenerationError" not in str(said.value)


@pytest.mark.slow  # the index of all tasks
@pytest.mark.usefixtures("_beside")
@pytest.mark.parametrize(("changes", "words"), [
    ({"label": "4"}, "the right answer of document 4 of task hellaswag is '4', and it has 4 choices"),
    ({"label": "-1"}, "the right answer of document 4 of task hellaswag is '-1'"),
    ({"endings": []}, "document 4 of task hellaswag has no choices"),
])  # fmt: skip
def test_a_right_answer_outside_the_choices_is_told_with_its_document(tmp_path, changes, words):
    data_dir(tmp_path / "data", GOOD + lines(row(5, **changes)))
    shelf = Tasks(tmp_path / "data")
    shelf.check("hellaswag", 4)
    with pytest.raises(UserError, match=words):
        shelf.check("hellaswag", None)


@pytest.mark.slow  # the index of all tasks
@pytest.mark.usefixtures("_beside")
def test_data_that_would_never_end_are_refused(tmp_path):
    place = data_dir(tmp_path / "data", GOOD)
    os.mkfifo(place / "test.jsonl")
    with pytest.raises(UserError, match=r"test.jsonl is no regular file"):
        Tasks(tmp_path / "data").load("hellaswag")
