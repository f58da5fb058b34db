"""lighteval's own command line on a pruned model: the numbers of `dart-eval run`, where lighteval is installed."""

import json
import os
import subprocess
import sys

import pytest

from tests.cli.test_lm_eval import by_run
from tests.helpers.commands import ROOT
from tests.helpers.models import random_tokens, save_tiny

pytest.importorskip("lighteval", reason="lighteval is not installed: it wants another antlr4 than dart-eval[tasks]")

pytestmark = pytest.mark.process

# The same questions, texts and beginnings for both harnesses.
OURS = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/data/test.jsonl}}}}
output_type: {kind}
test_split: test
doc_to_text: "{text}"
{more}
"""
KINDS = {
    "questions": ("multiple_choice", "{{question}}", 'doc_to_choice: "{{choices}}"\ndoc_to_target: "{{gold}}"\n'
                  "metric_list: [{metric: acc}]"),
    "pages": ("loglikelihood_rolling", "", 'doc_to_target: "{{page}}"\nmetric_list: [{metric: bits_per_byte}]'),
    "beginnings": ("generate_until", "{{question}}", 'doc_to_target: "w9"\n'
                   'generation_kwargs: {until: ["w60"], max_gen_toks: 12}\nmetric_list: [{metric: exact_match}]'),
}  # fmt: skip
THEIRS = """
from lighteval.metrics.metrics import Metrics
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.requests import Doc

def questions(line, task_name):
    choices = [" " + choice for choice in line["choices"]]
    return Doc(task_name=task_name, query=line["question"], choices=choices, gold_index=line["gold"])

def pages(line, task_name):
    return Doc(task_name=task_name, query=line["page"], choices=None, gold_index=None)

def beginnings(line, task_name):
    return Doc(task_name=task_name, query=line["question"], choices=["w9"], gold_index=0)

def task(prompt, metric, **more):
    return LightevalTaskConfig(
        name=prompt.__name__, prompt_function=prompt, hf_repo={folder!r}, hf_subset="default", hf_avail_splits=["test"],
        evaluation_splits=["test"], metrics=[metric], **more)

TASKS_TABLE = [
    task(questions, Metrics.loglikelihood_acc), task(pages, Metrics.bits_per_byte),
    task(beginnings, Metrics.exact_match, generation_size=12, stop_sequence=["w60"]),
]
"""

# Its command line, which would fetch the weights of tinyBenchmarks first, whatever the tasks.
OFFLINE = """
import requests, types
requests.get = lambda *_: types.SimpleNamespace(status_code=404)
from lighteval.__main__ import app
app()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A model, and the tasks of both."""
    folder = tmp_path_factory.mktemp("lighteval")
    save_tiny(folder / "model", tokenizer)
    (folder / "data").mkdir()

    def words(count, seed):
        return " ".join(f"w{token}" for token in random_tokens(count, seed))

    rows = [{"question": words(9 + i, i), "choices": [words(1 + j, 50 + i + j) for j in range(3)], "gold": i % 3,
             "page": words(8 + i, 90 + i)} for i in range(6)]  # fmt: skip
    (folder / "data" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "theirs.py").write_text(THEIRS.replace("{folder!r}", repr(str(folder / "data"))))
    for name, (kind, text, more) in KINDS.items():
        (folder / f"{name}.yaml").write_text(OURS.format(name=name, folder=folder, kind=kind, text=text, more=more))
    return folder


def by_lighteval(folder, out, args, tasks):
    """Results, and each task's details by document, of lighteval's command line."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{':'.join(sys.path)}", "HF_HOME": str(out / "hf")}
    path = [sys.executable, "-m", "dart_eval.sweep.lighteval_model"]
    file = subprocess.run(path, capture_output=True, text=True, check=True, env=environment).stdout.strip()
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, "custom", f"pretrained={folder}/model,dtype=float32,{args}", file, tasks,
         "--custom-tasks", folder / "theirs.py", "--output-dir", out, "--save-details"],
        capture_output=True, text=True, env=environment, cwd=out, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    import pandas

    (results,) = out.rglob("results_*.json")
    details = {f.name.split("|")[0].removeprefix("details_"): pandas.read_parquet(f) for f in out.rglob("*.parquet")}
    return json.loads(results.read_text())["results"], details


@pytest.mark.slow
def test_answers_are_those_of_run(folder, tmp_path):
    args = {"method": "griffin", "sparsity": 0.5}
    (tmp_path / "theirs").mkdir()
    words = ",".join(f"{k}={v}" for k, v in args.items())
    results, details = by_lighteval(folder, tmp_path / "theirs", words, ",".join(f"{name}|0" for name in KINDS))
    rows = [json.loads(line) for line in (folder / "data" / "test.jsonl").read_text().splitlines()]
    for name in KINDS:
        found, samples = by_run(tmp_path / name, folder / "model", name, args, "--include-path", folder)
        answers = {answer["input"]: answer for answer in details[name].model_response}  # it shuffles
        asked = [answers[row["page" if name == "pages" else "question"]] for row in rows]
        ours = [samples[i]["responses"] for i in range(len(rows))]
        assert [sample["doc_id"] for sample in samples] == [*range(len(rows))]
        if name == "questions":
            assert results["questions|0"]["acc"] == pytest.approx(found["acc"])
            for answer, scores in zip(asked, ours, strict=True):
                assert list(answer["logprobs"]) == pytest.approx([value for value, _ in scores], abs=1e-6)
                assert list(answer["argmax_logits_eq_gold"]) == [greedy for _, greedy in scores]
        elif name == "beginnings":
            assert [answer["text"][0] for answer in asked] == [text[0] for text in ours]
        else:  # the second half of each page is scored, and scaled up to the whole
            assert results["pages|0"]["bits_per_byte"] == pytest.approx(found["bits_per_byte"], rel=0.01)
