"""Tasks and data that a user brings: code in metrics and filters, templates, answers, nulls."""

import json
import math
from types import SimpleNamespace

import lm_eval
import pytest

from dart_eval.evaluation.documents import check_documents
from dart_eval.evaluation.evaluate import _simple_evaluate, _stderr
from dart_eval.evaluation.settings import EvalSettings
from dart_eval.evaluation.task_hash import task_hash
from dart_eval.evaluation.tasks import Tasks
from dart_eval.sweep.run import check_template
from dart_eval.util.errors import UserError
from tests.evaluation.test_tasks import ours  # noqa: F401
from tests.helpers.models import word_tokenizer

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
def test_code_of_a_users_metrics_filters_and_classes_is_part_of_the_hash(ours, tmp_path, more):  # noqa: F811
    found = []
    for answer in ("yes", "no", "no"):
        (tmp_path / "code.py").write_text(CODE.format(answer, str(tmp_path / "rows.jsonl")))
        tasks = ours(more, unsafe_code=True)
        if more.startswith("class"):
            (tmp_path / "ours.yaml").write_text(f"task: ours\n{more}\n")
            tasks = Tasks(include_path=[tmp_path], unsafe_code=True)
        found.append(task_hash(tasks.load("ours"), EvalSettings()))
    assert found[0] != found[1] == found[2]


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
    with pytest.raises(UserError, match="chat template of m takes no system message; leave --system-instruction out"):
        check_template(model, "Be brief.")


def test_a_perplexity_of_long_answers_is_infinite_and_has_its_error_where_it_is_not(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"c": "a", "r": " b"}\n' * 3)
    (tmp_path / "long.yaml").write_text(
        f"task: long\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_text: c\ndoc_to_target: r\n"
    )
    (task,) = Tasks(include_path=[tmp_path]).load("long")
    combine = task.aggregation()
    assert combine["perplexity"]([-750.0, -720.0]) == math.inf
    assert combine["perplexity"]([-1.0, -2.0]) == pytest.approx(math.exp(1.5))
    assert combine["acc"] is lm_eval.api.metrics.mean  # its error is lm-eval's
    assert _stderr("perplexity", [-1.0, -2.0]) == pytest.approx(math.exp(1.5) * 0.5)
    assert _stderr("perplexity", [-750.0, -720.0]) is None


@pytest.mark.parametrize(("field", "words"), [
    ("real", "has the right answer '1.0', and 2 choices"), ("texts", "has the right answer 'b', and 2 choices"),
    ("none", "has no right answer"), ("several", None), ("text", None),
])  # fmt: skip
def test_right_answers_that_lm_eval_cannot_score_are_told(tmp_path, field, words):
    row = {"q": "one?", "real": 1.0, "texts": ["b"], "none": [], "several": [0, 1], "text": "b"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "g.yaml").write_text(
        f"task: g\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        f"test_split: test\noutput_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: [a, b]\n"
        f"doc_to_target: {field}\n"
    )
    (task,) = Tasks(include_path=[tmp_path]).load("g")
    if words is None:
        check_documents(task, None)
        assert task.process_results(task.eval_docs[0], [(-2.0, False), (-1.0, True)])["acc"] == 1.0
        return
    with pytest.raises(UserError, match=words):
        check_documents(task, None)


def test_what_lm_eval_prints_is_no_output_of_ours(monkeypatch, capsys):
    """It prints that it bootstraps, and the output may be JSON."""
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda **_: print("bootstrapping for stddev: f1_score"))
    tasks = Tasks()
    _simple_evaluate(None, tasks, tasks.load("smoke_stories"), EvalSettings())
    said = capsys.readouterr()
    assert not said.out and "bootstrapping" in said.err
