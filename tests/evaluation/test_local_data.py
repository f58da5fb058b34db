"""Wrong local data: the folder and the cause, or the document; nothing that counts as wrong in silence."""

import json
import os

import datasets
import pytest

from dart_eval.evaluation.documents import check_documents
from dart_eval.evaluation.tasks import Tasks, leaves
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
    "latin-1": GOOD + '{"ctx": "café"}\n'.encode("latin-1"), "utf-16": GOOD.decode().encode("utf-16"),
    "cut": GOOD[:-30], "text": GOOD + b"not json\n", "nul": GOOD + b"\0\0\n",
    "list": GOOD + b"[1]\n", "kind": GOOD + lines(row(5, endings="one")),
    "empty": b"", "half a character": GOOD + lines(row(5, ctx="\ud800")),
    "without fields": GOOD + lines({"ctx": "a"}), "no label": GOOD + lines(row(5, label="b"), row(6)),
}  # fmt: skip


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


def check(shelf, name, limit=None):
    for task in leaves(shelf.load(name)):
        check_documents(task, limit)


@pytest.mark.slow  # the index of all tasks
@pytest.mark.usefixtures("_beside")
@pytest.mark.parametrize("kind", FAULTS)
def test_data_that_cannot_be_used_are_told_in_one_line_with_their_folder(tmp_path, kind):
    place = data_dir(tmp_path / "data", FAULTS[kind])
    with pytest.raises(UserError) as said:
        check(Tasks(tmp_path / "data"), "hellaswag")
    assert str(said.value).startswith(f"task hellaswag cannot use the documents of {place} (")


@pytest.mark.slow  # the index of all tasks
@pytest.mark.usefixtures("_beside")
@pytest.mark.parametrize(("changes", "words"), [
    ({"label": "4"}, "document 4 of task hellaswag has the right answer '4', and 4 choices"),
    ({"label": "-1"}, "has the right answer '-1', and"),
    ({"endings": []}, "document 4 of task hellaswag has no choices"),
])  # fmt: skip
def test_a_right_answer_outside_the_choices_is_told_with_its_document(tmp_path, changes, words):
    data_dir(tmp_path / "data", GOOD + lines(row(5, **changes)))
    shelf = Tasks(tmp_path / "data")
    check(shelf, "hellaswag", 4)
    with pytest.raises(UserError, match=words):
        check(shelf, "hellaswag")


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
    "no choices": ({"choices": {"text": [], "label": []}}, "cannot be asked ("),
    "null question": ({"question": None}, "cannot be asked (ValueError: a field is null) (null: question)"),
    "null choice": ({"choices": {"text": ["a", None], "label": ["A", "B"]}}, "cannot be asked ("),
}


@pytest.mark.slow  # the index of all tasks
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("kind", ODD)
def test_a_row_that_cannot_be_asked_is_told(arc, kind, first):
    """lm-eval itself tries a task's first document."""
    changes, words = ODD[kind]
    rows = [question(9, **changes), question(1), question(2)]
    with pytest.raises(UserError) as said:
        check(arc(*rows if first else rows[::-1]), "arc_easy")
    where = "document 0" if kind == "null question" else "allenai__ai2_arc/ARC-Easy"
    assert (where if first else f"document 2 of task arc_easy {words}") in said.value.problem


@pytest.mark.slow  # the index of all tasks
@pytest.mark.usefixtures("_beside")
def test_data_that_would_never_end_are_no_data(tmp_path):
    place = data_dir(tmp_path / "data", GOOD)
    (place / "validation.jsonl").unlink()
    os.mkfifo(place / "validation.jsonl")
    with pytest.raises(UserError, match="task hellaswag needs the split validation"):
        Tasks(tmp_path / "data").load("hellaswag")


TASK = """
task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: {}}}}}
test_split: test
output_type: {}
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
"""


@pytest.mark.usefixtures("_beside")
@pytest.mark.parametrize("kind", ["generate_until", "loglikelihood", "loglikelihood_rolling"])
@pytest.mark.parametrize("field", ["question", "answer"])
def test_null_is_no_question_and_no_answer(tmp_path, kind, field):
    """It would be asked or scored as the word None."""
    whole, other = {"question": "Who?", "answer": "I", "note": None}, "answer" if field == "question" else "question"
    for name, rows in (("good", [whole]), ("bad", [whole, {**whole, field: None}, {other: "I"}])):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(*rows))
        (tmp_path / name).mkdir()
        (tmp_path / name / "own.yaml").write_text(TASK.format(tmp_path / f"{name}.jsonl", kind))
    check(Tasks(include_path=[tmp_path / "good"]), "own")
    with pytest.raises(UserError, match=rf"document 1 of task own cannot be asked .* \(null: .*{field}"):
        check(Tasks(include_path=[tmp_path / "bad"]), "own")
