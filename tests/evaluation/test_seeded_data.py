"""Tasks that make their own documents: the same everywhere, with the model's tokenizer, and no more than asked."""

import random
import types

import numpy as np
import pytest
import yaml

from dart_eval.evaluation.documents import prepared_once, seeded, without_other_lengths
from dart_eval.evaluation.task_names import lm_evals_dir, tasks_dir
from dart_eval.evaluation.tasks import Tasks, leaves
from dart_eval.util.errors import UserError
from tests.helpers.models import word_tokenizer

MODULE = """
import random
import datasets
import numpy as np

def get_tokenizer(*names, **kwargs):
    raise AssertionError("lm-eval would load one, with the code that comes with it")

def make(**kwargs):
    print("noise")
    drawn = [random.random(), float(np.random.random())]
    return {"kwargs": kwargs, "tokenizer": get_tokenizer(None), "drawn": drawn}

def some(num_samples=5):
    return [random.random() for _ in range(num_samples)]

def several(**_):
    return some()

def cached(rows):
    return datasets.is_caching_enabled()
"""


@pytest.fixture
def module():
    made = types.ModuleType("maker")
    exec(MODULE, made.__dict__)
    return made


def test_documents_are_the_same_whatever_was_drawn_before(module, capsys):
    found = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        before = random.getstate(), np.random.get_state()[1].tolist()
        found.append(seeded(module.make, "mine", lambda: "ours")(max_seq_lengths=[8]))
        after = random.getstate(), np.random.get_state()[1].tolist()
        assert after == before  # others draw as if nothing had been
    assert found[0] == found[1]
    assert found[0]["tokenizer"] == "ours" and found[0]["kwargs"] == {"max_seq_lengths": [8]}
    assert capsys.readouterr().out == ""
    with pytest.raises(AssertionError, match="with the code"):  # the module is as it was
        module.make()
    with pytest.raises(UserError, match="run it with a model"):
        seeded(module.make, "mine", None)()


def test_no_more_documents_are_made_than_are_asked(module):
    del module.get_tokenizer
    whole = seeded(module.several, "mine", None)()
    assert len(whole) == 5 and seeded(module.several, "mine", None, 0.5)() == whole
    assert seeded(module.several, "mine", None, 9)() == whole
    assert seeded(module.several, "mine", None, 2)() == whole[:2]  # the first of all
    assert len(module.several()) == 5


def test_only_what_draws_is_prepared_without_the_cache(module):
    """Hugging Face's cache would hide a shuffle from a second look, and show another one elsewhere."""
    assert not prepared_once(module.cached)("rows")
    del module.random, module.np
    assert prepared_once(module.cached)("rows")


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

    folder = tasks_dir() / "ruler"
    assert read(folder / "_members_yaml")["task"] == read(lm_evals_dir() / "ruler" / "ruler.yaml")["task"]
    files = sorted(folder.glob("*.yaml"))
    assert [f.stem for f in files] == ["ruler_16k", "ruler_32k", "ruler_4k", "ruler_8k"]
    for file in files:
        said, length = read(file), str(1024 * int(file.stem[6:-1]))
        assert said["group"] == file.stem and said["dataset_kwargs"] == {"max_seq_lengths": [length]}
        assert [m["metric"] for m in (*said["metric_list"], *said["aggregate_metric_list"])] == [length, length]


@pytest.mark.slow  # lm-eval's index
def test_rulers_documents_fit_into_the_length_that_is_asked_and_are_refused_beside_local_data(tmp_path, monkeypatch):
    class Few(pytest.importorskip("wonderwords").RandomWord):
        """RULER sorts all pairs of an adjective and a noun, some millions."""

        def __init__(self):
            super().__init__()
            self._categories["nouns"] = self._categories["nouns"][:9]

    monkeypatch.setattr("wonderwords.RandomWord", Few)
    with pytest.raises(UserError, match="run it without --data-dir"):
        Tasks(tmp_path, tokenizer=lambda: None).load("ruler_4k")
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
