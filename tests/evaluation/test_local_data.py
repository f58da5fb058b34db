"""Data of users, which are told with their folder or document where they are wrong; the text for calibrations."""

import hashlib
import json
import os

import datasets
import pytest

from dart_eval.evaluation.calibration_text import calibration_text
from dart_eval.evaluation.documents import check_documents
from dart_eval.evaluation.tasks import Tasks, leaves
from dart_eval.pruning.calibration import DEFAULT_TEXT
from dart_eval.util.errors import UserError
from tests.helpers.tasks import write_task


@pytest.fixture(autouse=True)
def _beside(tmp_path, monkeypatch):
    """Data sets that were read are kept beside the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def row(i=0, **changes):
    return {
        "ind": i, "activity_label": "Roof", "ctx_a": "A man", "ctx_b": "he", "ctx": "A man is here. he",
        "endings": ["wraps", "rips", "holds", "starts"], "label": str(i % 4), **changes,
    }  # fmt: skip


def lines(*rows):
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


def check(shelf, name, limit=None):
    for task in leaves(shelf.load(name)):
        check_documents(task, limit)


GOOD = lines(*map(row, range(4)))
PLACE = "Rowan__hellaswag/default"
CUT, FILE, AT = f"{PLACE}[/ ]", f"{PLACE}/validation.jsonl", "document 4 of task hellaswag"
FAULTS = {
    "no text": (GOOD + lines(row(5)).replace(b"Roof", b"R\xe8of"), CUT),
    "latin-1": (GOOD + '{"ctx": "café"}\n'.encode("latin-1"), CUT), "utf-16": (GOOD.decode().encode("utf-16"), CUT),
    "cut": (GOOD[:-30], CUT), "text": (GOOD + b"not json\n", CUT), "nul": (GOOD + b"\0\0\n", CUT),
    "list": (GOOD + b"[1]\n", FILE), "columns": (lines(*(row(i, more=1) for i in range(4))), FILE),
    "types": (lines(*(row(i, ind="x") for i in range(4))), FILE),
    "word": (GOOD + lines(row(5, ctx_a="x" * 2_000_000)), AT),
    "name": (GOOD + b'{"\xe8": 1}\n', FILE), "kind": (GOOD + lines(row(5, endings="one")), CUT), "empty": (b"", CUT),
    "half a character": (GOOD + lines(row(5, ctx="\ud800")), CUT),
    "without fields": (GOOD + lines({"ctx": "a"}), CUT), "no label": (GOOD + lines(row(5, label="b"), row(6)), CUT),
    "beyond": (GOOD + lines(row(5, label="4")), AT), "below": (GOOD + lines(row(5, label="-1")), AT),
    "no choices": (GOOD + lines(row(5, endings=[])), AT), "without end": (None, "needs the split validation"),
}  # fmt: skip


@pytest.mark.slow  # the index of all tasks
@pytest.mark.parametrize("kind", FAULTS)
def test_data_that_cannot_be_used_are_told_with_their_folder_or_document(tmp_path, kind):
    (content, where), place = FAULTS[kind], tmp_path / "data" / PLACE
    place.mkdir(parents=True)
    (place / "train.jsonl").write_bytes(GOOD)
    if content is None:
        os.mkfifo(place / "validation.jsonl")
    else:
        (place / "validation.jsonl").write_bytes(content)
    shelf = Tasks(tmp_path / "data")
    if where is AT:
        check(shelf, "hellaswag", 4)  # what is not asked may be anything
    with pytest.raises(UserError, match=where):
        check(shelf, "hellaswag")


def question(i=0, **changes):
    return {
        "id": f"q{i}", "question": f"Which one is number {i}?", "answerKey": "AB"[i % 2],
        "choices": {"text": ["first", "second"], "label": ["A", "B"]}, **changes,
    }  # fmt: skip


def arc_easy(tmp_path, test):
    """The task on a folder with these bytes as its test split."""
    place = tmp_path / "data" / "allenai__ai2_arc" / "ARC-Easy"
    place.mkdir(parents=True)
    for split, rows in (("train", lines(*map(question, range(4)))), ("test", test), ("validation", lines(question()))):
        (place / f"{split}.jsonl").write_bytes(rows)
    return Tasks(tmp_path / "data")


ODD = {
    "no such label": {"answerKey": "Z"}, "null label": {"answerKey": None}, "null question": {"question": None},
    "too few labels": {"answerKey": "B", "choices": {"text": ["a", "b"], "label": ["A"]}},
    "no choices": {"choices": {"text": [], "label": []}},
    "null choice": {"choices": {"text": ["a", None], "label": ["A", "B"]}},
}  # fmt: skip


@pytest.mark.slow  # the index of all tasks
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("kind", ODD)
def test_a_row_that_cannot_be_asked_is_told(tmp_path, kind, first):
    """lm-eval itself tries a task's first document."""
    rows = [question(9, **ODD[kind]), question(1), question(2)]
    shelf = arc_easy(tmp_path, lines(*(rows if first else rows[::-1])))
    where = "document 2" if not first else "document 0" if kind == "null question" else "ai2_arc/ARC-Easy"
    with pytest.raises(UserError, match=where):
        check(shelf, "arc_easy")


@pytest.mark.slow  # the index of all tasks
def test_a_field_that_is_no_utf8_is_told_though_nobody_asks_it(tmp_path):
    shelf = arc_easy(tmp_path, lines(*map(question, range(3))).replace(b"q2", b"q\xe8"))
    with pytest.raises(UserError, match=r"document 2 .*UnicodeDecodeError"):
        check(shelf, "arc_easy")


@pytest.mark.parametrize("kind", ["generate_until", "loglikelihood", "loglikelihood_rolling"])
@pytest.mark.parametrize("field", ["question", "answer"])
def test_null_is_no_question_and_no_answer(tmp_path, kind, field):
    """It would be asked or scored as the word None."""
    whole, other = {"question": "Who?", "answer": "I", "note": None}, "answer" if field == "question" else "question"
    for name, rows in (("good", [whole]), ("bad", [whole, {**whole, field: None}, {other: "I"}])):
        write_task(tmp_path / name, *rows, name="own", kind=kind, text='"{{question}}"', target="answer")
    check(Tasks(include_path=[tmp_path / "good"]), "own")
    with pytest.raises(UserError, match=rf"document 1 .*null: .*{field}"):
        check(Tasks(include_path=[tmp_path / "bad"]), "own")


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
