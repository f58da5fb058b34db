"""Tasks, shipped and brought: their names, documents, prompts, metrics, data, and what of them a cell's key has."""

import json
import math
import random
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import lm_eval
import nltk
import numpy as np
import pytest
from lm_eval.api.metrics import weighted_perplexity
from lm_eval.tasks._yaml_loader import load_yaml
from rouge_score.rouge_scorer import RougeScorer

import dart_eval
from dart_eval.evaluation import tasks as tasks_module
from dart_eval.evaluation.documents import check_documents
from dart_eval.evaluation.evaluate import _metrics, _plain, _simple_evaluate, _stderr
from dart_eval.evaluation.settings import EvalSettings
from dart_eval.evaluation.task_hash import task_hash
from dart_eval.evaluation.task_names import ALIASES, config_of, names, tasks_dir
from dart_eval.evaluation.tasks import CLUSTERS, Tasks, documents, leaves
from dart_eval.sweep.run import check_template
from dart_eval.util.errors import UserError
from scripts import build_smoke_data as script
from tests.helpers.commands import ROOT
from tests.helpers.models import word_tokenizer
from tests.helpers.tasks import write_task

STOCK = Path(lm_eval.__file__).parent / "tasks"


@pytest.fixture(scope="module")
def tasks():
    return Tasks()


# -- shipped -----------------------------------------------------------------------------------------------------------


def test_the_smoke_data_keeps_its_rules(monkeypatch):
    assert script.problems() == []
    assert script.rows("two_topics") == script.two_topics()
    assert len(script.rows("articles")) >= 30
    assert len({(r["first"], r["second"]) for r in script.two_topics()}) == 40
    rows = {name: script.rows(name) for name in ("questions", "stories", "articles")}
    rows["questions"][0] = {**rows["questions"][0], "choices": ["a", "a", "b", "c"]}
    rows["articles"][0] = {**rows["articles"][0], "article": "too short", "summary_three": "One. Two."}
    monkeypatch.setattr(script, "rows", lambda name: rows[name])
    assert len(script.problems()) == 3


@pytest.mark.slow  # the index of all tasks
def test_names_expand_as_users_type_them(tasks):
    assert tasks.expand(["arc", "hellaswag", "arc_easy"]) == ["arc_easy", "arc_challenge", "hellaswag"]
    assert {*tasks.expand(ALIASES)} <= names()  # every name that `ls tasks` offers exists
    assert {"hellaswag", "hellaswag_vi"} <= set(tasks.expand(["hellaswag*"]))


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
    articles = {row["id"]: row["article"] for row in script.rows("articles")}
    assert doc["context"] + doc["rest"] == articles[doc["first"]] + "\n\n" + articles[doc["second"]]
    assert len(drift.eval_docs) == 40


def test_rouge_is_rouge_scores_with_stemming(tasks):
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


def _rows(place, *rows):
    """A file of documents."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


@pytest.mark.parametrize("name", ["multi_news", "gov_report"])
def test_long_summaries_have_lm_evals_prompt_and_longbenchs_first_answer(name, tmp_path):
    theirs, ours = load_yaml(STOCK / "longbench" / f"{name}.yaml", resolve_func=False), config_of(name)
    same = ("doc_to_text", "dataset_path", "dataset_name", "test_split")
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
    assert ours["generation_kwargs"].items() <= theirs["generation_kwargs"].items()  # theirs names a temperature, too
    row = {"context": " Passage 1:\nIt rained. \n", "answers": [" It rained.\n", "Rain."]}
    _rows(tmp_path / "Xnhyacinth__LongBench" / name / "test.jsonl", row)
    (task,) = Tasks(tmp_path).load(name)
    (doc,) = task.eval_docs
    assert f":\n{row['context']}\n\nNow, " in task.doc_to_text(doc)
    assert task.doc_to_target(doc) == "It rained."
    assert documents([task]) == {name: "context"}
    assert {k: v for k, v in task.process_results(doc, ["It rained."]).items() if k != "bleu"} == {
        "rouge1": 1, "rouge2": 1, "rougeL": 1, "summary_words": 2, "empty": 0,
    }  # fmt: skip


@pytest.mark.slow
def test_local_data_replace_the_hub_for_all_tasks_of_a_group(tmp_path):
    row = {"question": "What is red?", "choices": ["sky", "blood", "grass", "snow"], "answer": 1, "subject": "x"}
    files = (STOCK / "mmlu" / "default").glob("mmlu_*.yaml")
    for name in {load_yaml(file, resolve_func=False)["dataset_name"] for file in files}:
        for split in ("test", "dev"):
            _rows(tmp_path / "cais__mmlu" / name / f"{split}.jsonl", row)
    members = leaves(Tasks(tmp_path).load("mmlu"))
    assert len(members) == 57
    assert all(task.eval_docs[0]["question"] == "What is red?" for task in members)


def test_every_task_with_local_data_loads(data_dir):
    """Names of the paper's tables, on the mirror; gpqa has no data there."""
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
    files = [file.relative_to(tasks_dir()) for file in tasks_dir().rglob("*") if file.is_file()]
    assert {f"dart_eval/tasks/{file}" for file in files if "__pycache__" not in file.parts} <= packed
    kernels = [f"kernels/cpu/{name}" for name in ("kernels.c", "coded.h", "columns.h", "threads.h", "vectors.h")]
    data = ("calibration.txt", "rounding.txt", "keep-tables.json")
    assert {f"dart_eval/{name}" for name in (*(f"data/{one}" for one in data), "py.typed", *kernels)} <= packed
    assert wheel.name.startswith(f"dart_eval-{dart_eval.__version__}-")


@pytest.mark.slow  # the index of all tasks
def test_every_field_that_makes_clusters_is_one_of_its_tasks_data(tasks):
    tasks.index_all()
    for name, field in CLUSTERS.items():
        folder = tasks.manager.task_index[name].yaml_path.parent
        assert any(field in other.read_text() for other in folder.glob("*.*")), (name, field)


@pytest.mark.slow  # the index of all tasks
def test_a_class_that_loads_its_own_data_is_refused_beside_local_data(tmp_path):
    with pytest.raises(UserError, match="run it without --data-dir"):
        Tasks(tmp_path).load("squadv2")


@pytest.mark.parametrize(("task", "module"), [
    ("mine", "no_such_package"),
    *(pytest.param(*both, marks=pytest.mark.slow) for both in (  # the index of all tasks
        ("ifeval", "langdetect"), ("ruler_4k", "wonderwords"), ("longbench_lcc", "rouge"), ("minerva_math", "sympy"),
    )),
])  # fmt: skip
def test_a_missing_package_is_named_before_a_model_is_loaded(task, module, monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.") and "._" not in name]:
        monkeypatch.delitem(sys.modules, name, raising=False)  # code of tasks is imported anew
    monkeypatch.setattr(nltk.data, "find", lambda name: name)  # or its data would be fetched
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "code.py").write_text("import no_such_package")
    (tmp_path / "mine.yaml").write_text("task: mine\ndoc_to_text: !function code.text\n")
    own = {"include_path": [tmp_path], "unsafe_code": True} if task == "mine" else {"data_dir": tmp_path}
    with pytest.raises(UserError, match=f"package {module}.* pip install"):
        Tasks(**own, tokenizer=lambda: None).load(task)


# -- brought -----------------------------------------------------------------------------------------------------------

NINE = [{"q": f"{i}?", "c": list("abcdef")} for i in range(9)]


@pytest.fixture
def ours(tmp_path):
    """Writes a task, of nine questions if not told otherwise, into a folder; returns the folder's tasks."""

    def made(more="", name="ours", rows=NINE, kind="multiple_choice", target="0", **how):
        write_task(tmp_path, *rows, name=name, kind=kind, target=target, choices='"{{c}}"', more=more)
        return Tasks(include_path=[tmp_path], **how)

    return made


SHUFFLE = """import random
def process_docs(dataset):
    return dataset.map(lambda doc: {"c": random.sample(doc["c"], 6)})
"""


def test_shuffled_documents_are_those_of_every_process_and_of_the_examples(ours, tmp_path):
    """lm-eval prepares examples before documents; a document that differs from itself would be its own example."""
    (tmp_path / "code.py").write_text(SHUFFLE)
    found = []
    for seed in (1, 2):  # the second finds what Hugging Face's cache would keep
        random.seed(seed)
        (task,) = ours("process_docs: !function code.process_docs", unsafe_code=True).load("ours")
        assert list(task.eval_docs) == list(task.eval_docs) == list(task.sampler.df)
        found.append([doc["c"] for doc in task.eval_docs])
        assert datasets.is_caching_enabled()
    assert found[0] == found[1] and len(set(map(tuple, found[0]))) > 3


def test_documents_do_not_depend_on_the_tasks_loaded_before(ours, tmp_path, monkeypatch):
    """Tasks of one module that shuffle with its generator, as gpqa's do."""
    (tmp_path / "code.py").write_text(
        SHUFFLE.replace("random.s", "rng.s").replace("def", "rng = random.Random(42)\ndef")
    )
    for name in ("one", "two"):
        ours("process_docs: !function code.process_docs", name=name)

    def choices(*names):
        tasks = Tasks(include_path=[tmp_path], unsafe_code=True)
        return [[doc["c"] for doc in tasks.load(name)[0].eval_docs] for name in names][-1]

    assert choices("two") == choices("one", "two") == choices("two", "one", "two")
    assert len(set(map(tuple, choices("two")))) > 3


def test_a_task_of_ones_own_stands_before_a_short_name_for_others(ours):
    tasks = ours(name="summaries")
    assert tasks.expand(["summaries"]) == ["summaries"]
    assert Tasks().expand(["summaries"]) == ["cnn_dailymail", "xsum", "multi_news", "gov_report"]


def test_a_perplexity_beyond_floats_is_infinite_and_has_its_error_where_it_is_not(ours):
    (task,) = ours(kind="loglikelihood", target="q").load("ours")
    combine = task.aggregation()
    assert combine["perplexity"]([-750.0, -720.0]) == math.inf
    assert combine["perplexity"]([-1.0, -2.0]) == pytest.approx(math.exp(1.5))
    assert combine["acc"] is lm_eval.api.metrics.mean  # its error is lm-eval's
    assert _stderr("perplexity", [-1.0, -2.0]) == pytest.approx(math.exp(1.5) * 0.5)
    assert _stderr("perplexity", [-750.0, -720.0]) is None
    task.aggregation = lambda: {"perplexity": weighted_perplexity}
    tasks_module.without_overflow(task)
    assert task.aggregation()["perplexity"]([(-1500.0, 1)]) == math.inf
    assert task.aggregation()["perplexity"]([(-1500.0, 1500)]) == pytest.approx(math.e, abs=1e-4)


def test_a_groups_own_tasks_read_local_data(tmp_path):
    """Tasks that the group's file writes out."""
    _rows(tmp_path / "data" / "org__set" / "default" / "test.jsonl", {"text": "It rained."})
    (tmp_path / "group.yaml").write_text(
        "group: pages\ntask:\n  - {task: inner, dataset_path: org/set, test_split: test, doc_to_text: '', "
        "doc_to_target: '{{text}}', output_type: loglikelihood_rolling}\n"
    )
    (task,) = leaves(Tasks(tmp_path / "data", include_path=[tmp_path]).load("pages"))
    assert task.eval_docs[0]["text"] == "It rained."


CODE = """from lm_eval.api.task import ConfigurableTask
from lm_eval.api.filter import Filter
def helper(x):
    return x == {0!r}
def score(items):
    return sum(map(helper, items))
class Taken(Filter):
    def apply(self, resps, docs):
        return [[helper(r) for r in some] for some in resps]
class Own(ConfigurableTask):
    def __init__(self, config=None):
        super().__init__(config={{**config_of, "task": "ours"}})
config_of = {{"dataset_path": "json", "dataset_kwargs": {{"data_files": {{"test": {1!r}}}}}, "test_split": "test",
             "doc_to_text": "{{{{q}}}}", "doc_to_target": "{{{{q}}}}"}}
"""


@pytest.mark.parametrize("more", [
    "metric_list: [{metric: acc, aggregation: !function code.score, higher_is_better: true}]",
    "filter_list: [{name: taken, filter: [{function: !function code.Taken}, {function: take_first}]}]",
    "class: !function code.Own",
])  # fmt: skip
def test_code_of_a_users_metrics_filters_and_classes_is_part_of_the_hash(ours, tmp_path, more):
    found = []
    for answer in ("yes", "no", "no"):
        (tmp_path / "code.py").write_text(CODE.format(answer, str(tmp_path / "ours.jsonl")))
        tasks = ours(more, unsafe_code=True)
        if more.startswith("class"):
            (tmp_path / "ours.yaml").write_text(f"task: ours\n{more}\n")
            tasks = Tasks(include_path=[tmp_path], unsafe_code=True)
        found.append(task_hash(tasks.load("ours"), EvalSettings()))
    assert found[0] != found[1] == found[2]


@pytest.mark.parametrize(("target", "word"), [
    ("real", "'1.0'"), ("texts", "'b'"), ("none", "no right answer"), ("several", None), ("text", None),
])  # fmt: skip
def test_right_answers_that_lm_eval_cannot_score_are_refused(ours, target, word):
    row = {"q": "one?", "c": ["a", "b"], "real": 1.0, "texts": ["b"], "none": [], "several": [0, 1], "text": "b"}
    (task,) = ours(rows=[row], target=target).load("ours")
    if word is None:
        check_documents(task, None)
        assert task.process_results(task.eval_docs[0], [(-2.0, False), (-1.0, True)])["acc"] == 1.0
        return
    with pytest.raises(UserError, match=word):
        check_documents(task, None)


REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[0]['content'] }}"


@pytest.mark.parametrize(("template", "fits"), [
    (REFUSES, False), ("{{ messages[-1]['content'] }}", False),
    ("{% for m in messages %}{{ m['content'] | trim }} {% endfor %}", True),
])  # fmt: skip
def test_a_system_message_that_the_template_leaves_out_is_refused(template, fits):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    model = SimpleNamespace(load_tokenizer=lambda: tokenizer, identity=SimpleNamespace(name="m"))
    if fits:
        return check_template(model, " Be brief. ")
    with pytest.raises(UserError, match="leave --system-instruction out"):
        check_template(model, "Be brief.")


# -- from lm-eval's result to ours: no shipped task has groups or values of these kinds --------------------------------


def test_what_lm_eval_prints_is_no_output_of_ours(monkeypatch, capsys, tasks):
    """It prints that it bootstraps, and the output may be JSON."""
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda **_: print("bootstrapping for stddev: f1_score"))
    _simple_evaluate(None, tasks, tasks.load("smoke_stories"), EvalSettings())
    said = capsys.readouterr()
    assert not said.out and "bootstrapping" in said.err


def test_samples_with_numpy_values_become_plain():
    value = {"f1": (np.int64(1), np.float32(0.5)), "x": [np.array([1, 2]), None, True, "a"]}
    assert json.loads(json.dumps(_plain(value))) == {"f1": [1, 0.5], "x": [[1, 2], None, True, "a"]}


def test_members_of_a_mere_list_are_shown_and_those_of_a_group_hidden():
    def result(group):
        return {
            "results": {"g": group, "a": {"acc,none": 0.5, "acc_stderr,none": 0.1}}, "group_subtasks": {"g": ["a"]},
            "n-samples": {"a": {"effective": 4}}, "higher_is_better": {"a": {"acc": True}}, "samples": {},
        }  # fmt: skip

    assert [(m.task, m.part_of) for m in _metrics(result({"alias": "g"}), [])] == [("a", None)]
    found = _metrics(result({"acc,none": 0.5, "acc_stderr,none": 0.1}), [])
    assert [(m.task, m.part_of, m.n) for m in found] == [("g", None, 4), ("a", "g", 4)]
    outer = result({"acc,none": 0.5}) | {"group_subtasks": {"g": ["inner"], "inner": ["a", "b"]}}
    outer["n-samples"] = {n: {"effective": 4} for n in "ab"}
    for others, direction in ((False, False), (True, None)):
        outer["higher_is_better"] = {"a": {"acc": False}, "b": {"acc": others}}
        assert next(m for m in _metrics(outer, []) if m.task == "g").higher_is_better is direction


def test_what_weighs_the_same_in_a_group_is_recorded_and_part_of_its_hash(tmp_path):
    """`weight_by_size: false` gives each member the same weight, whatever its number of documents."""
    members, weights, hashes = ("mine_a", "mine_b"), [], []
    for name in members:
        _rows(tmp_path / "data" / f"mine__{name}" / "default" / "test.jsonl", {"q": "1", "c": ["2", "3"], "g": 1})
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: mine/{name}\ntest_split: test\noutput_type: multiple_choice\n"
            f'doc_to_text: "{{{{q}}}}"\ndoc_to_choice: "{{{{c}}}}"\ndoc_to_target: g\nmetric_list: [{{metric: acc}}]\n'
        )
    result = {
        "results": {name: {"acc,none": 0.5} for name in ("mine", *members)}, "group_subtasks": {"mine": [*members]},
        "samples": {}, "higher_is_better": {}, "n-samples": {name: {"effective": 1} for name in members},
    }  # fmt: skip
    for weighted in ("true", "false", "false"):
        (tmp_path / "g.yaml").write_text(
            "group: mine\ntask: [mine_a, mine_b]\n"
            f"aggregate_metric_list: [{{metric: acc, aggregation: mean, weight_by_size: {weighted}}}]\n"
        )
        loaded = Tasks(tmp_path / "data", include_path=[tmp_path]).load("mine")
        hashes.append(task_hash(loaded, EvalSettings()))
        weights.append({m.task: m.weights for m in _metrics(result, loaded)})
    assert weights[0] == dict.fromkeys(("mine", *members), "documents")
    assert weights[1] == {**weights[0], "mine": "tasks"}
    assert hashes[0] != hashes[1] == hashes[2]
