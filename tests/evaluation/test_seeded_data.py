"""Tasks that make their own documents: the same in every process, with the model's tokenizer, from local data."""

import random
import types
from pathlib import Path

import datasets
import lm_eval.tasks
import numpy as np
import pytest
import yaml

from dart_eval.evaluation.documents import prepared_once, seeded, without_other_lengths
from dart_eval.evaluation.task_names import tasks_dir
from dart_eval.evaluation.tasks import Tasks, leaves
from dart_eval.util.errors import UserError
from tests.helpers.models import word_tokenizer

MODULE = """
import random
import numpy as np

def get_tokenizer(*names, **kwargs):
    raise AssertionError("lm-eval would load one, with the code that comes with it")

def make(**kwargs):
    print("noise")
    drawn = [random.random(), float(np.random.random())]
    return {"kwargs": kwargs, "tokenizer": get_tokenizer(None), "drawn": drawn}
"""


@pytest.fixture
def make():
    module = types.ModuleType("maker")
    exec(MODULE, module.__dict__)
    return module.make


def test_documents_are_the_same_whatever_was_drawn_before(make, capsys):
    found = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        before = random.getstate(), np.random.get_state()[1].tolist()
        found.append(seeded(make, "mine", lambda: "ours")(max_seq_lengths=[8]))
        assert (
            random.getstate(),
            np.random.get_state()[1].tolist(),
        ) == before  # and others draw as if nothing had been
    assert found[0] == found[1]
    assert found[0]["tokenizer"] == "ours" and found[0]["kwargs"] == {"max_seq_lengths": [8]}
    assert capsys.readouterr().out == ""
    with pytest.raises(AssertionError, match="with the code"):  # the module is as it was
        make.__globals__["get_tokenizer"]()


@pytest.mark.slow  # lm-eval's index
def test_documents_made_from_the_web_are_refused_beside_local_data(tmp_path):
    pytest.importorskip("wonderwords")
    with pytest.raises(UserError, match="has code of lm-eval that loads data itself, whatever --data-dir says"):
        Tasks(tmp_path, tokenizer=lambda: None).load("ruler_4k")


def test_without_a_model_there_is_no_length(make):
    with pytest.raises(UserError, match="task mine makes documents for a model's tokenizer"):
        seeded(make, "mine", None)()


def test_lengths_that_were_not_made_are_no_metrics():
    class Stock:
        def process_results(self, doc, results):
            return {"4096": -1.0, "8192": 0.5, "other": -1.0}

    task = Stock()
    without_other_lengths(task)
    assert task.process_results({}, ["answer"]) == {"8192": 0.5, "other": -1.0}


def test_our_lengths_have_lm_evals_members():
    def read(path):
        return yaml.load(path.read_text(), Loader=yaml.BaseLoader)

    stock = read(Path(lm_eval.tasks.__file__).parent / "ruler" / "ruler.yaml")
    folder = tasks_dir() / "ruler"
    assert read(folder / "_members_yaml")["task"] == stock["task"]
    files = sorted(folder.glob("*.yaml"))
    assert [f.stem for f in files] == ["ruler_16k", "ruler_32k", "ruler_4k", "ruler_8k"]
    for file in files:
        said, length = read(file), str(1024 * int(file.stem[6:-1]))
        assert said["group"] == file.stem and said["dataset_kwargs"] == {"max_seq_lengths": [length]}
        assert [m["metric"] for m in (*said["metric_list"], *said["aggregate_metric_list"])] == [length, length]


def test_no_more_documents_are_made_than_are_asked():
    module = types.ModuleType("maker")
    exec(
        "import random\ndef some(num_samples=5):\n    return [random.random() for _ in range(num_samples)]\n"
        "def make(**_):\n    return some()\n", module.__dict__,
    )  # fmt: skip
    whole = seeded(module.make, "mine", None)()
    assert len(whole) == 5 and seeded(module.make, "mine", None, 0.5)() == whole
    assert seeded(module.make, "mine", None, 9)() == whole
    assert seeded(module.make, "mine", None, 2)() == whole[:2]  # the first of all
    assert len(module.make()) == 5


@pytest.mark.slow  # lm-eval's index
def test_rulers_documents_fit_into_the_length_that_is_asked(tmp_path):
    pytest.importorskip("wonderwords")
    (tmp_path / "mine.yaml").write_text(
        'group: mine\ntask: [niah_single_1, ruler_cwe]\ndataset_kwargs: {max_seq_lengths: [600]}\n'
        'metric_list: [{metric: "600", aggregation: mean, higher_is_better: true}]\n'
        'aggregate_metric_list: [{metric: "600", weight_by_size: false}]\n'
    )  # fmt: skip
    tokenizer, found = word_tokenizer(), []
    for limit in (4, 2):
        shelf = Tasks(include_path=[tmp_path], tokenizer=lambda: tokenizer, limit=limit)
        tasks = leaves(shelf.load("mine"))
        found.append([[doc["input"] for doc in task.eval_docs] for task in tasks])
        doc = tasks[0].eval_docs[0]
        assert tasks[0].process_results(doc, [doc["outputs"][0]]) == {"600": 1.0}
    assert [[len(texts) for texts in tasks] for tasks in found] == [[4, 4], [2, 2]]
    assert found[1] == [texts[:2] for texts in found[0]]
    for texts, room in zip(found[0], (128, 120), strict=True):
        counts = [len(tokenizer(text).input_ids) + room for text in texts]
        assert min(counts) > 300 and max(counts) <= 600


def test_documents_that_a_task_shuffles_are_the_same_in_every_process():
    """Hugging Face's cache would hide the shuffle from a second look, and show another one elsewhere."""
    before = random.getstate()

    def shuffled(rows):
        assert not datasets.is_caching_enabled()
        return rows.map(lambda row: {"order": random.sample(range(9), 9)})

    rows, found = datasets.Dataset.from_dict({"q": [*"abcd"]}), []
    for seed in (1, 2):
        random.seed(seed)
        prepare = prepared_once(shuffled)
        found.append(prepare(rows))
        assert prepare(rows) is found[-1]
    random.setstate(before)
    assert datasets.is_caching_enabled()
    assert list(found[0]["order"]) == list(found[1]["order"]) and len({*map(tuple, found[0]["order"])}) > 1


def test_what_draws_nothing_is_prepared_with_the_cache():
    module = types.ModuleType("plain")
    exec("import datasets\ndef prepare(rows):\n    return datasets.is_caching_enabled()", module.__dict__)
    assert prepared_once(module.prepare)("rows")
