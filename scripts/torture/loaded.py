"""What is fuzzed: models and data, which are loaded before anything runs."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from scripts.torture.damage import as_json, of_bytes, of_text, of_value
from scripts.torture.fuzz import Wrong
from scripts.torture.kinds import Kind
from tests.helpers.commands import command

TASKS = {"hellaswag": "Rowan__hellaswag/default", "arc_easy": "allenai__ai2_arc/ARC-Easy"}  # and where their data is


class DataRows(Kind):
    """`--data-dir`: what is asked is what stands in the file, or the file and the line are named."""

    limit, slow = 60.0, True

    def __init__(self, folder: Path, place: Path) -> None:
        super().__init__(folder, place)
        from lm_eval.tasks import TaskManager

        from dart_eval.evaluation.tasks import tasks_dir

        self.index = TaskManager(include_path=str(tasks_dir()))
        self.rows: dict[str, list[dict[str, Any]]] = {
            "hellaswag": [
                {"ind": i, "activity_label": "Roof", "ctx_a": "A man", "ctx_b": "he", "ctx": "A man is here. he",
                 "endings": ["wraps", "rips", "holds", "starts"], "label": str(i % 4)} for i in range(5)
            ],
            "arc_easy": [
                {"id": f"q{i}", "question": f"What is {i}?", "answerKey": "ABCD"[i % 4],
                 "choices": {"text": ["one", "two", "three", "four"], "label": [*"ABCD"]}} for i in range(5)
            ],
        }  # fmt: skip

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """The index of all tasks is there, and data sets that were read are kept nowhere for long."""
        import datasets

        cache = self.place / "datasets"
        with (
            mock.patch("dart_eval.evaluation.tasks.TaskManager", return_value=self.index),
            mock.patch.object(datasets.config, "HF_DATASETS_CACHE", cache),
        ):
            yield
        shutil.rmtree(cache, ignore_errors=True)

    def case(self, random: Random) -> str:
        from dart_eval.evaluation.tasks import Tasks, leaves

        name = random.choice([*TASKS])
        rows = self.rows[name]
        good = b"".join(as_json(row) + b"\n" for row in rows)
        if random.random() < 0.6:
            at = random.randrange(len(rows))
            every = random.random() < 0.2  # of one kind in all rows: nothing says which is right
            changed = of_value(random, rows[at])
            data = b"".join(as_json(changed if every or i == at else row) + b"\n" for i, row in enumerate(rows))
        else:
            data = of_text(
                random, good.decode(), ("{}", "[1]", "null", "\n", '"', ",", "NaN", '{"a":' * 2000, "\\ud800")
            )
        shutil.rmtree(self.place / "data", ignore_errors=True)
        folder = self.place / "data" / TASKS[name]
        folder.mkdir(parents=True)
        (folder / "train.jsonl").write_bytes(good)
        for split in ("validation", "test"):
            (folder / f"{split}.jsonl").write_bytes(data)
        first = next((a for a, b in zip(data.splitlines(), good.splitlines()) if a != b), b"cut")  # noqa: B905
        self.told = f"{name}: {first[:300]!r}"
        self.words = ["run", "--data-dir", "data", "--tasks", name, "--limit", "3", "--method", "dense"]
        self.words += ["--output", "out", "--model", str(self.folder / "model")]
        tasks = Tasks(self.place / "data")
        tasks.check_task(name, None)
        (task,) = leaves(tasks.load(name))
        given = [*_objects(data.decode())]
        if len(task.eval_docs) != len(given) or not all(_fits(row) for row in given):
            raise Wrong(f"{len(task.eval_docs)} documents of {len(given)} rows are asked: {self.told}")
        return "read"


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The objects of a file, one behind the other."""
    at, decoder = 0, json.JSONDecoder()
    while text[at:].strip():
        found, at = decoder.raw_decode(text, at + len(text[at:]) - len(text[at:].lstrip()))
        yield found


def _fits(row: dict[str, Any]) -> bool:
    """Whether a row asks something: texts for texts, choices that are not empty, an answer among them."""
    if "endings" in row:
        texts, right = row["endings"], str(row["label"]).isdigit() and int(row["label"]) < len(row["endings"])
        asked = [row["ctx_a"], row["ctx_b"], row["activity_label"]]
    else:
        texts, labels = row["choices"]["text"], row["choices"]["label"]
        asked, right = [row["question"]], row["answerKey"] in labels[: len(texts)]
    words = [*texts, *asked]
    return bool(right and texts and all(isinstance(t, str) for t in words) and all(t.strip() for t in texts))


class ModelFolder(Kind):
    """`--model FOLDER`, whose config.json is damaged: the weights are the file's, or it is refused."""

    limit, slow = 60.0, True

    def __init__(self, folder: Path, place: Path) -> None:
        super().__init__(folder, place)
        from safetensors.torch import load_file

        self.text = (folder / "model" / "config.json").read_text()
        self.weights = load_file(folder / "model" / "model.safetensors")
        shutil.copytree(folder / "model", place / "model")
        self.words = ["run", "--model", "model", "--tasks", "smoke_questions", "--limit", "1", "--method", "griffin"]
        self.words += ["--output", "out"]

    def case(self, random: Random) -> str:
        import torch

        from dart_eval.models.loading import ModelSpec, resolve

        data = json.loads(self.text)
        if random.random() < 0.75:
            sizes = [name for name, value in data.items() if isinstance(value, int)]
            if random.random() < 0.5:
                data[random.choice(sizes)] = random.choice((0, -1, 1, 3, 7, 10**8, 2**31, 1.5, "4", None, True))
            else:
                data = of_value(random, data)
            self.put("model/config.json", as_json(data))
        else:
            self.put("model/config.json", of_bytes(random, self.text.encode()))
        changed = (self.place / "model" / "config.json").read_text(errors="replace")
        self.told = (
            " ".join(sorted({*changed.split("\n")} - {*self.text.split("\n")}))[:300]
            if "\n" in changed
            else _changes(self.text, changed)
        )
        model, _ = resolve(ModelSpec(str(self.place / "model"))).load()
        tied: Any = model.get_input_embeddings().weight
        for name, weight in model.state_dict().items():
            file = self.weights.get(name)
            if file is None and name == "lm_head.weight" and torch.equal(weight, tied):
                continue
            if file is None or not torch.equal(weight, file.to(weight.dtype)):
                raise Wrong(f"{name} is not the file's: {self.told}")
        shutil.rmtree(self.place / "out", ignore_errors=True)
        done = command(*self.words)
        if done.code not in (0, 1, 2) or "Traceback" in done.err:
            raise Wrong(f"the run ends with {done.code}: {done.err[-300:]!r}, {self.told}")
        return {0: "ran", 1: "failed as a cell", 2: "refused"}[done.code]


def _changes(text: str, changed: str) -> str:
    """The keys whose values are others."""
    a, b = json.loads(text), json.loads(changed)
    if not isinstance(b, dict):
        return changed[:200]
    return ", ".join(f"{key}: {json.dumps(b.get(key, 'gone'))[:60]}" for key in {*a, *b} if a.get(key) != b.get(key))


class Gguf(Kind):
    """`--model FILE.gguf`: the weights are the file's, all of them, or it is refused."""

    limit, slow = 60.0, True

    def __init__(self, folder: Path, place: Path) -> None:
        super().__init__(folder, place)
        from tests.helpers.gguf_damage import damaged, differing
        from tests.helpers.gguf_files import write

        self.damaged, self.differing = damaged, differing
        self.data = write(place / "whole.gguf").read_bytes()

    def case(self, random: Random) -> str:
        from dart_eval.models.loading import ModelSpec, resolve

        file = self.put("case.gguf", self.data)
        self.told = self.damaged(random, file)
        self.words = ["run", "--model", "case.gguf", "--tasks", "smoke_questions", "--limit", "1", "--method", "dense"]
        self.words += ["--output", "out"]
        model, _ = resolve(ModelSpec(str(file))).load()
        if wrong := self.differing(model, file):
            raise Wrong(f"{len(wrong)} weights are not the file's ({wrong[0]}): {self.told}")
        return "read"
