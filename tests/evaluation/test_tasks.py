"""The shipped tasks: the data's own rules, names, prompts, metrics and local data."""

import importlib.util
import json
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import lm_eval
import pytest
from lm_eval.api.metrics import weighted_perplexity
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

import dart_eval
from dart_eval.evaluation import tasks as tasks_module
from dart_eval.evaluation.settings import EvalSettings
from dart_eval.evaluation.task_hash import task_hash
from dart_eval.evaluation.task_names import ALIASES, config_of, names, tasks_dir
from dart_eval.evaluation.tasks import CLUSTERS, Tasks, documents, leaves
from dart_eval.util.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tasks():
    return Tasks()


def _script():
    spec = importlib.util.spec_from_file_location("build_smoke_data", ROOT / "scripts" / "build_smoke_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_smoke_data_keeps_its_rules():
    script = _script()
    assert script.problems() == []
    assert script.rows("two_topics") == script.two_topics()
    assert len(script.rows("articles")) >= 30
    assert len({(r["first"], r["second"]) for r in script.two_topics()}) == 40


def test_the_rules_catch_bad_data(monkeypatch):
    script = _script()
    good = {name: script.rows(name) for name in ("questions", "stories", "articles")}
    good["questions"][0] = {**good["questions"][0], "choices": ["a", "a", "b", "c"]}
    good["articles"][0] = {**good["articles"][0], "article": "too short", "summary_three": "One. Two."}
    monkeypatch.setattr(script, "rows", lambda name: good[name])
    assert len(script.problems()) == 3


@pytest.mark.slow  # the index of all tasks as it is built
def test_names_expand_as_users_type_them(tasks):
    assert tasks.expand(["arc", "hellaswag", "arc_easy"]) == ["arc_easy", "arc_challenge", "hellaswag"]
    assert {*tasks.expand(ALIASES)} <= names()  # every name that `ls tasks` offers exists


def test_smoke_prompts(tasks):
    (questions,) = tasks.load("smoke_questions")
    doc = questions.eval_docs[0]
    assert questions.doc_to_text(doc) == f"Question: {doc['question']}\nAnswer:"
    assert questions.doc_to_choice(doc)[questions.doc_to_target(doc)] == doc["choices"][doc["answer"]]
    assert len(questions.eval_docs) >= 120
    (summary,) = tasks.load("smoke_summary")
    doc = summary.eval_docs[0]
    assert summary.doc_to_text(doc) == doc["article"] + "\n\nTL;DR:"
    assert summary.doc_to_target(doc) == doc["summary_one"]
    assert documents([summary]) == {"smoke_summary": "article"}
    (drift,) = tasks.load("smoke_drift")
    doc = drift.eval_docs[0]
    articles = {row["id"]: row["article"] for row in _script().rows("articles")}
    assert doc["context"] + doc["rest"] == articles[doc["first"]] + "\n\n" + articles[doc["second"]]
    assert len(drift.eval_docs) == 40


def test_rouge_is_rouge_scores_with_stemming(tasks):
    from rouge_score.rouge_scorer import RougeScorer

    (task,) = tasks.load("smoke_highlights")
    doc = task.eval_docs[0]
    answer = " The keeper fed bees, and honey kept for years. "
    got = task.process_results(doc, [answer])
    wanted = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(doc["reference"], answer)
    assert {k: got[k] for k in wanted} == {k: v.fmeasure for k, v in wanted.items()}
    assert (got["summary_words"], got["empty"]) == (9, 0)
    assert task.process_results(doc, [" \n"]) == {
        "rouge1": 0, "rouge2": 0, "rougeL": 0, "summary_words": 0, "empty": 1, "bleu": [0, 73] + [0] * 8,
    }  # fmt: skip


LONG = {"multi_news": "several news passages", "gov_report": "a report by a government agency"}


@pytest.mark.parametrize("name", LONG)
def test_long_summaries_have_lm_evals_prompt_and_longbenchs_first_answer(name, tmp_path):
    folder = Path(lm_eval.__file__).parent / "tasks" / "longbench"
    theirs, ours = load_yaml(folder / f"{name}.yaml", resolve_func=False), config_of(name)
    same = ("doc_to_text", "dataset_path", "dataset_name", "test_split")
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
    assert ours["generation_kwargs"].items() <= theirs["generation_kwargs"].items()  # theirs names a temperature, too
    folder = tmp_path / "Xnhyacinth__LongBench" / name
    folder.mkdir(parents=True)
    row = {"context": " Passage 1:\nIt rained. \n", "answers": [" It rained.\n", "Rain."]}
    (folder / "test.jsonl").write_text(json.dumps(row))
    (task,) = Tasks(tmp_path).load(name)
    (doc,) = task.eval_docs
    assert task.doc_to_text(doc).startswith(f"You are given {LONG[name]}.")
    assert f":\n{row['context']}\n\nNow, write a one-page summary of" in task.doc_to_text(doc)
    assert task.doc_to_target(doc) == "It rained."
    assert documents([task]) == {name: "context"}
    assert {k: v for k, v in task.process_results(doc, ["It rained."]).items() if k != "bleu"} == {
        "rouge1": 1, "rouge2": 1, "rougeL": 1, "summary_words": 2, "empty": 0,
    }  # fmt: skip


@pytest.mark.slow
def test_local_data_replaces_the_hub_for_single_tasks_and_groups(tmp_path):
    row = {"question": "What is red?", "choices": ["sky", "blood", "grass", "snow"], "answer": 1, "subject": "x"}
    index = TaskManager().task_index
    configs = [e.cfg for n, e in index.items() if n.startswith("mmlu_") and e.cfg]
    folder = tmp_path / "cais__mmlu"
    for name in {c["dataset_name"] for c in configs if c.get("dataset_path") == "cais/mmlu" and "dataset_name" in c}:
        for split in ("test", "dev"):
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    local = Tasks(tmp_path)
    members = leaves(local.load("mmlu"))
    assert len(members) == 57
    assert all(task.eval_docs[0]["question"] == "What is red?" for task in members)


def test_every_task_with_local_data_loads(data_dir):
    """Names of the paper's tables, on the mirror; gpqa has no data there and says so (test_errors)."""
    local = Tasks(data_dir)
    names = "arc hellaswag boolq rte winogrande openbookqa piqa medmcqa wikitext summaries"
    for name in local.expand(names.split()):
        for task in leaves(local.load(name)):
            assert len(task.eval_docs) > 0


@pytest.mark.process
def test_tasks_travel_in_the_wheel_with_the_types_and_the_version(tmp_path):
    words = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w")
    subprocess.run([sys.executable, *words, tmp_path, ROOT], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    for file in tasks_dir().rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            assert f"dart_eval/tasks/{file.relative_to(tasks_dir())}" in packed
    assert {"dart_eval/data/calibration.txt", "dart_eval/data/keep-tables.json", "dart_eval/py.typed"} <= packed
    assert {
        f"dart_eval/kernels/cpu/{name}" for name in ("kernels.c", "coded.h", "columns.h", "threads.h", "vectors.h")
    } <= packed
    assert wheel.name.startswith(f"dart_eval-{dart_eval.__version__}-")


QUESTIONS = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{{splits}: {rows}}}}}
{splits}_split: {splits}
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{c}}}}"
doc_to_target: 0
{more}
"""
SHUFFLE = """import random
def process_docs(dataset):
    return dataset.map(lambda doc: {"c": random.sample(doc["c"], 6)})
"""


@pytest.fixture
def ours(tmp_path):
    """Writes a task of nine questions into a folder, and returns the folder's tasks."""
    rows = "".join(json.dumps({"q": f"{i}?", "c": list("abcdef")}) + "\n" for i in range(9))
    (tmp_path / "rows.jsonl").write_text(rows)

    def made(more="", name="ours", splits="test", **how):
        text = QUESTIONS.format(name=name, splits=splits, rows=tmp_path / "rows.jsonl", more=more)
        (tmp_path / f"{name}.yaml").write_text(text)
        return Tasks(include_path=[tmp_path], **how)

    return made


def test_shuffled_documents_are_those_of_every_process_and_of_the_examples(ours, tmp_path):
    """lm-eval prepares examples before documents; a document that differs from itself would be its own example."""
    (tmp_path / "code.py").write_text(SHUFFLE)
    found = []
    for seed in (1, 2):  # the second finds what Hugging Face's cache would keep
        random.seed(seed)
        (task,) = ours("process_docs: !function code.process_docs", unsafe_code=True).load("ours")
        assert list(task.eval_docs) == list(task.eval_docs) == list(task.sampler.df)
        found.append([doc["c"] for doc in task.eval_docs])
    assert found[0] == found[1] and len(set(map(tuple, found[0]))) > 3


def test_a_task_of_ones_own_stands_before_a_short_name_for_others(ours):
    tasks = ours(name="summaries")
    assert tasks.expand(["summaries"]) == ["summaries"]
    assert Tasks().expand(["summaries"]) == ["cnn_dailymail", "xsum", "multi_news", "gov_report"]


@pytest.mark.parametrize(("given", "expected"), [
    ({"max_new_tokens": 8}, {"max_new_tokens": 8, "do_sample": False, "until": ["x"]}),
    ({"max_tokens": 8, "until": ["y"]}, {"max_tokens": 8, "do_sample": False, "until": ["y"]}),
    ({"temperature": 0.7, "do_sample": True},
     {"max_gen_toks": 48, "do_sample": True, "temperature": 0.7, "until": ["x"]}),
    ({"temperature": None}, {"max_gen_toks": 48, "do_sample": False, "temperature": None, "until": ["x"]}),
])  # fmt: skip
def test_what_a_user_sets_has_its_effect_whatever_name_the_tasks_length_has(given, expected):
    settings = tasks_module.overridden({"max_gen_toks": 48, "do_sample": False, "until": ["x"]}, given)
    assert settings == expected and tasks_module.draws(settings) == bool(given.get("do_sample"))


def test_a_temperature_without_effect_is_refused():
    with pytest.raises(UserError, match=r"^task smoke_summary: .* temperature=0.7 has no effect with do_sample=false"):
        Tasks(gen_kwargs={"temperature": 0.7}).load("smoke_summary")


def test_a_perplexity_beyond_floats_is_infinite(ours):
    (task,) = ours().load("ours")
    task.OUTPUT_TYPE = "loglikelihood_rolling"
    combined = {"byte_perplexity": weighted_perplexity, "word_perplexity": weighted_perplexity}
    task.aggregation = lambda: combined
    tasks_module.without_overflow(task)
    assert task.aggregation()["word_perplexity"]([(-1500.0, 1)]) == float("inf")
    assert task.aggregation()["byte_perplexity"]([(-1500.0, 1500)]) == pytest.approx(2.71828, abs=1e-4)


@pytest.mark.slow  # the index of all tasks
def test_a_pattern_finds_lm_evals_tasks():
    assert {"hellaswag", "hellaswag_vi"} <= set(Tasks().expand(["hellaswag*"]))


def test_a_groups_own_tasks_read_local_data(tmp_path):
    """Tasks that the group's file writes out."""
    folder = tmp_path / "data" / "org__set" / "default"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text('{"text": "It rained."}\n')
    (tmp_path / "group.yaml").write_text(
        "group: pages\ntask:\n  - {task: inner, dataset_path: org/set, test_split: test, doc_to_text: '', "
        "doc_to_target: '{{text}}', output_type: loglikelihood_rolling}\n"
    )
    (task,) = leaves(Tasks(tmp_path / "data", include_path=[tmp_path]).load("pages"))
    assert task.eval_docs[0]["text"] == "It rained."


@pytest.mark.slow  # the index of all tasks
def test_a_class_that_loads_its_own_data_is_refused_beside_local_data(tmp_path):
    with pytest.raises(UserError, match="squadv2 has code of lm-eval that loads data itself"):
        Tasks(tmp_path).load("squadv2")


@pytest.mark.slow  # reads all YAML files of lm-eval
def test_every_field_that_makes_clusters_is_one_of_its_tasks_data():
    configs = {path: path.read_text() for path in Path(lm_eval.__file__).parent.joinpath("tasks").rglob("*.yaml")}
    for name, field in CLUSTERS.items():
        (path,) = [path for path, text in configs.items() if f"\ntask: {name}\n" in f"\n{text}"]
        assert any(field in other.read_text() for other in path.parent.glob("*.*")), (name, field)


def test_documents_do_not_depend_on_the_tasks_loaded_before(tmp_path, monkeypatch):
    """Tasks of one module that shuffle with its generator, as gpqa's do."""
    (tmp_path / "shuffled.py").write_text(
        "import random\nimport datasets\nrng = random.Random(42)\n"
        "def load(**_):\n    docs = [{'q': str(i), 'c': list('abcdef')} for i in range(9)]\n"
        "    return {'test': datasets.Dataset.from_list(docs)}\n"
        "def process_docs(dataset):\n    docs = [dict(d, c=rng.sample(d['c'], 6)) for d in dataset]\n"
        "    return datasets.Dataset.from_list(docs)\n"
    )
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ncustom_dataset: !function shuffled.load\nprocess_docs: !function shuffled.process_docs\n"
            "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{q}}'\ndoc_to_choice: c\ndoc_to_target: 0\n"
            "metric_list:\n  - metric: acc\n"
        )
    monkeypatch.setattr(tasks_module, "tasks_dir", lambda: tmp_path)

    def choices(*names):
        tasks = Tasks()
        return [[doc["c"] for doc in tasks.load(name)[0].eval_docs] for name in names][-1]

    assert choices("two") == choices("one", "two") == choices("two", "one", "two")
    assert len(set(map(tuple, choices("two")))) > 3


def test_samples_with_numpy_values_become_plain():
    import numpy as np

    # No shipped task returns numpy's values; lm-eval's own do.
    from dart_eval.evaluation.evaluate import _plain

    value = {"f1": (np.int64(1), np.float32(0.5)), "x": [np.array([1, 2]), None, True, "a"]}
    assert json.loads(json.dumps(_plain(value))) == {"f1": [1, 0.5], "x": [[1, 2], None, True, "a"]}


def test_members_of_a_mere_list_are_shown_and_those_of_a_group_hidden():
    # From lm-eval's result to our metrics: no shipped task is a group of this kind.
    from dart_eval.evaluation.evaluate import _metrics

    def result(group):
        return {
            "results": {"g": group, "a": {"acc,none": 0.5, "acc_stderr,none": 0.1}}, "group_subtasks": {"g": ["a"]},
            "n-samples": {"a": {"effective": 4}}, "higher_is_better": {"a": {"acc": True}}, "samples": {},
        }  # fmt: skip

    assert [(m.task, m.part_of) for m in _metrics(result({"alias": "g"}), [])] == [("a", None)]
    found = _metrics(result({"acc,none": 0.5, "acc_stderr,none": 0.1}), [])
    outer = result({"acc,none": 0.5}) | {"higher_is_better": {"a": {"acc": False}, "b": {"acc": False}}}
    outer |= {"group_subtasks": {"g": ["inner"], "inner": ["a", "b"]}, "n-samples": {n: {"effective": 4} for n in "ab"}}
    assert next(m for m in _metrics(outer, []) if m.task == "g").higher_is_better is False
    outer["higher_is_better"]["b"] = {"acc": True}
    assert next(m for m in _metrics(outer, []) if m.task == "g").higher_is_better is None
    assert [(m.task, m.part_of, m.n) for m in found] == [("g", None, 4), ("a", "g", 4)]


def test_what_weighs_the_same_in_a_group_is_recorded(tmp_path):
    # The rule alone: `weight_by_size: false` gives each member the same weight, whatever its number of documents.
    from dart_eval.evaluation.evaluate import _metrics

    found = {}
    for weighted in ("true", "false"):
        tasks = _group(tmp_path, weighted)
        result = {
            "results": {"mine_group": {"acc,none": 0.5}, "mine_a": {"acc,none": 0.5}, "mine_b": {"acc,none": 0.5}},
            "group_subtasks": {"mine_group": ["mine_a", "mine_b"]}, "samples": {}, "higher_is_better": {},
            "n-samples": {name: {"effective": 1} for name in ("mine_a", "mine_b")},
        }  # fmt: skip
        found[weighted] = {m.task: m.weights for m in _metrics(result, tasks.load("mine_group"))}
    assert found["true"] == dict.fromkeys(("mine_group", "mine_a", "mine_b"), "documents")
    assert found["false"] == {**found["true"], "mine_group": "tasks"}


def _group(tmp_path, weighted):
    """The tasks with a group of two, whose members weigh by their size, or the same."""
    for name in ("a", "b"):
        data = tmp_path / "data" / f"mine__{name}" / "default"
        data.mkdir(parents=True, exist_ok=True)
        (data / "test.jsonl").write_text('{"q": "one", "c": ["two", "three"], "g": 1}\n')
        (tmp_path / f"{name}.yaml").write_text(
            f"task: mine_{name}\ndataset_path: mine/{name}\ntest_split: test\noutput_type: multiple_choice\n"
            'doc_to_text: "{{q}}"\ndoc_to_choice: "{{c}}"\ndoc_to_target: g\nmetric_list: [{metric: acc}]\n'
        )
    (tmp_path / "g.yaml").write_text(
        "group: mine_group\ntask: [mine_a, mine_b]\n"
        f"aggregate_metric_list: [{{metric: acc, aggregation: mean, weight_by_size: {weighted}}}]\n"
    )
    return Tasks(tmp_path / "data", include_path=[tmp_path])


def test_a_groups_rule_is_part_of_its_hash(tmp_path):
    found = [
        task_hash(_group(tmp_path, weighted).load("mine_group"), EvalSettings())
        for weighted in ("true", "false", "false")
    ]
    assert found[0] != found[1] == found[2]
