"""Wrong local data: the file, the line and the cause, or the document; nothing that counts as wrong in silence."""

import contextlib
import gzip
import json
import os

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dart_eval.evaluation.local_data import rows_of
from dart_eval.evaluation.tasks import Tasks
from dart_eval.util.errors import UserError


def row(i=0, **changes):
    return {
        "ind": i, "activity_label": "Roof", "ctx_a": "A man", "ctx_b": "he", "ctx": "A man is here. he",
        "endings": ["wraps", "rips", "holds", "starts"], "label": str(i % 4), **changes,
    }  # fmt: skip


def lines(*rows):
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


GOOD = lines(*map(row, range(4)))
FAULTS = {
    "latin-1": (GOOD + '{"ctx": "café"}\n'.encode("latin-1"), 5, "decode byte 0xe9"),
    "utf-16": (GOOD.decode().encode("utf-16"), 1, "decode byte 0xff"),
    "packed": (gzip.compress(GOOD), 1, "decode byte 0x8b"),
    "cut": (GOOD[:-30], 4, "Unterminated string"),
    "text": (GOOD + b"not json\n", 5, "Expecting value"),
    "nul": (GOOD + b"\0\0\n", 5, "Expecting value"),
    "two on a line": (GOOD + GOOD.splitlines()[0] * 2, 5, "Extra data"),
    "list": (GOOD + b"[1]\n", 5, "no object"),
    "null": (GOOD + b"\nnull\n", 6, "no object"),
    "twice": (GOOD + b'{"a": 1, "a": 2}\n', 5, "twice"),
    "nan": (GOOD + lines(row(float("nan"), label="1")), 5, "NaN is no number"),
    "huge": (GOOD + lines(row(10**30)), 5, "more than 64 bits"),
    "deep": (GOOD + b'{"a":' * 100_000, 5, "recursion"),
    "kind": (GOOD + lines(row(5, endings="one")), 5, "'endings' has text, and a list"),
    "number for text": (GOOD + lines(row(5, label=3)), 5, "'label' has a number, and text"),
    "empty": (b"", None, "no documents"),
    "blank": (b"\n\n", None, "no documents"),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(FAULTS))
def test_a_broken_row_is_told_with_its_file_line_and_cause(tmp_path, kind):
    data, line, words = FAULTS[kind]
    good, bad = tmp_path / "train.jsonl", tmp_path / "validation.jsonl"
    good.write_bytes(b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n"))
    assert [r["ind"] for r in rows_of(good)] == [0, 1, 2, 3] and len(rows_of(good, 2)) == 2
    bad.write_bytes(data)
    with pytest.raises(UserError) as said:
        rows_of(bad)
    assert words in said.value.problem
    assert said.value.problem.startswith(f"{bad} " if line is None else f"{bad}, line {line}: ")


PIECES = [GOOD[:200], b"\n", b"{}", b"[", b"1", b"\xff"]


@given(st.binary(max_size=60) | st.lists(st.sampled_from(PIECES)).map(b"".join))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_documents_or_told_in_one_line(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "any.jsonl"
    file.write_bytes(data)
    with contextlib.suppress(UserError):
        assert all(isinstance(row, dict) for row in rows_of(file))
        return
    with pytest.raises(UserError) as refused:
        rows_of(file)
    assert refused.value.problem.startswith(str(file)) and "\n" not in str(refused.value)


def data_dir(folder, validation, train=GOOD):
    place = folder / "Rowan__hellaswag" / "default"
    place.mkdir(parents=True)
    (place / "train.jsonl").write_bytes(train)
    (place / "validation.jsonl").write_bytes(validation)
    return place


@pytest.fixture
def _beside(tmp_path, monkeypatch):
    """Data sets that were read are kept beside the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.slow  # the index of all tasks
@pytest.mark.usefixtures("_beside")
@pytest.mark.parametrize("kind", ["latin-1", "cut", "kind", "nan", "empty"])
def test_a_task_whose_data_cannot_be_read_names_the_line(tmp_path, kind):
    data, line, words = FAULTS[kind]
    data_dir(tmp_path / "data", data)
    with pytest.raises(UserError) as said:
        Tasks(tmp_path / "data").check_task("hellaswag", None)
    assert str(said.value).startswith("task hellaswag: ") and words in str(said.value)
    assert "validation.jsonl" in str(said.value) and (line is None or f"line {line}" in str(said.value))


@pytest.mark.slow  # the index of all tasks
@pytest.mark.usefixtures("_beside")
@pytest.mark.parametrize("bad", [
    lines(row(5, ctx="\ud800")), lines({"ctx": "a"}), lines(row(5, label="b"), row(6)),
], ids=["half a character", "without fields", "no label"])  # fmt: skip
def test_rows_that_only_the_task_or_the_loader_cannot_use_are_told_with_their_data(tmp_path, bad):
    data_dir(tmp_path / "data", GOOD + bad)
    with pytest.raises(UserError, match="Rowan__hellaswag/default"):
        Tasks(tmp_path / "data").check_task("hellaswag", None)


@pytest.mark.slow  # the index of all tasks
@pytest.mark.usefixtures("_beside")
@pytest.mark.parametrize(("changes", "words"), [
    ({"label": "4"}, r"document 4 of task hellaswag \(.*validation.jsonl\) has the right answer '4', and 4 choices"),
    ({"label": "-1"}, r"validation.jsonl\) has the right answer '-1', and"),
    ({"endings": []}, r"document 4 of task hellaswag \(.*validation.jsonl\) has no choices"),
])  # fmt: skip
def test_a_right_answer_outside_the_choices_is_told_with_its_document(tmp_path, changes, words):
    data_dir(tmp_path / "data", GOOD + lines(row(5, **changes)))
    shelf = Tasks(tmp_path / "data")
    shelf.check_task("hellaswag", 4)
    with pytest.raises(UserError, match=words):
        shelf.check_task("hellaswag", None)


def question(i=0, **changes):
    return {
        "id": f"q{i}", "question": f"Which one is number {i}?", "answerKey": "AB"[i % 2],
        "choices": {"text": ["first", "second"], "label": ["A", "B"]}, **changes,
    }  # fmt: skip


@pytest.fixture
def arc(tmp_path, _beside):
    """A shelf with `arc_easy` of these questions."""

    def shelf(*rows):
        place = tmp_path / "data" / "allenai__ai2_arc" / "ARC-Easy"
        place.mkdir(parents=True)
        (place / "train.jsonl").write_bytes(lines(*map(question, range(4))))
        (place / "test.jsonl").write_bytes(lines(*rows))
        (place / "validation.jsonl").write_bytes(lines(question()))
        return Tasks(tmp_path / "data")

    return shelf


ODD = {
    "no such label": ({"answerKey": "Z"}, "cannot be asked (ValueError: 'Z' is not in list)"),
    "null label": ({"answerKey": None}, "cannot be asked (ValueError: None is not in list)"),
    "too few labels": ({"answerKey": "B", "choices": {"text": ["a", "b"], "label": ["A"]}}, "cannot be asked ("),
    "empty choice": ({"choices": {"text": ["a", ""], "label": ["A", "B"]}}, "has a choice without text"),
    "null choice": ({"choices": {"text": ["a", None], "label": ["A", "B"]}}, "has a choice without text"),
    "no choices": ({"choices": {"text": [], "label": []}}, "cannot be asked ("),
    "null question": ({"question": None}, "has null in the field 'question', which would be asked as None"),
    "number": ({"question": 5}, "'question' has a number, and text in the first line"),
}


@pytest.mark.slow  # the index of all tasks
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("kind", ODD)
def test_a_row_that_cannot_be_asked_is_told_with_its_file(arc, kind, first):
    """lm-eval itself tries a task's first document."""
    changes, words = ODD[kind]
    rows = [question(9, **changes), question(1), question(2)]
    shelf = arc(*rows if first else rows[::-1])
    with pytest.raises(UserError) as said:
        shelf.check_task("arc_easy", None)
    assert "allenai__ai2_arc/ARC-Easy" in said.value.problem
    if not first:
        assert words in said.value.problem
        assert f"test.jsonl{', line 3' if kind == 'number' else ''}" in said.value.problem


@pytest.mark.slow  # the index of all tasks
def test_examples_that_there_are_not_are_refused(arc):
    shelf = arc(question(5), question(6))
    shelf.check_task("arc_easy", None, 4)
    for shots in (5, 4_000_000_000):
        with pytest.raises(
            UserError, match=rf"arc_easy needs {shots} few-shot examples, and has 4; give --num-fewshot 4 or"
        ):
            shelf.check_task("arc_easy", None, shots)


@pytest.mark.slow  # the index of all tasks
@pytest.mark.usefixtures("_beside")
def test_data_that_would_never_end_are_refused(tmp_path):
    place = data_dir(tmp_path / "data", GOOD)
    os.mkfifo(place / "test.jsonl")
    with pytest.raises(UserError, match=r"test.jsonl is not a regular file"):
        Tasks(tmp_path / "data").load("hellaswag")
