"""lm-eval's own command line with `--model dart`: the numbers of `dart-eval run`, and refusals in a line."""

import importlib.metadata
import json
import math

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from dart_eval.evaluation.lm import PrunedLM
from dart_eval.evaluation.tasks import weigh_scored_text
from dart_eval.results.store import Store
from dart_eval.sweep.dart_lm import DartLM
from tests.helpers.commands import command
from tests.helpers.models import save_tiny

ROLLING = """
task: pages
dataset_path: json
dataset_kwargs: {{data_files: {{test: {0}/pages.jsonl}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    return save_tiny(tmp_path_factory.mktemp("model"), tokenizer)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with a task of lm-eval's rolling kind, whose documents have an odd number of words."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "pages.yaml").write_text(ROLLING.format(folder))
    texts = ["w4 w9 w5 w7 w6", "w8 w11", "w12 w4 w5 w30 w31 w32 w90"]
    (folder / "pages.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def by_lm_eval(folder, model, task, args, *more):
    """Results and samples as lm-eval writes them."""
    done = command("lm-eval", "--model", "dart", "--model_args", f"pretrained={model},dtype=float32,{args}", "--tasks",
                   task, "--limit", "6", "--log_samples", "--output_path", folder, *more)  # fmt: skip
    assert done.code == 0, done.err
    (results,) = folder.rglob("results*.json")
    (samples,) = folder.rglob("samples*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    found = json.loads(results.read_text())["results"][task]
    return {k.partition(",")[0]: v for k, v in found.items() if isinstance(v, float) and "stderr" not in k}, rows


def by_run(folder, model, task, args, *more):
    options = [w for name, value in args.items() for w in (f"--{name.replace('_', '-')}", value)]
    done = command("run", "--model", model, "--dtype", "float32", "--tasks", task, "--limit", 6, "--output", folder,
                   "--no-kl", *options, *more)  # fmt: skip
    assert done.code == 0, done.err
    store = Store(folder)
    (record,) = store.load()
    found = {m.metric: m.value for m in record.metrics if m.task == task}
    return found, store.samples(record)


CASES = [
    {"method": "griffin", "sparsity": 0.5}, {"method": "griffin", "sparsity": 0.5, "scope": "all"},
    {"method": "grinqh", "sparsity": 0.6}, {"method": "dense"}, {"method": "dense", "ffn_bits": "4:row"},
    {"method": "dart:remask.window=4", "sparsity": 0.6},
]  # fmt: skip


@pytest.mark.parametrize("args", CASES, ids=lambda args: " ".join(map(str, args.values())))
def test_answers_are_those_of_run(tmp_path, model, args):
    words = ",".join(f"{k}={v}" for k, v in args.items())
    theirs, rows = by_lm_eval(tmp_path / "theirs", model, "smoke_questions", words, "--batch_size", "4")
    ours, samples = by_run(tmp_path / "ours", model, "smoke_questions", args)
    assert theirs == pytest.approx({name: ours[name] for name in theirs}, abs=1e-6) and len(rows) == 6
    for row, sample in zip(rows, samples, strict=True):
        likely = [float(value) for value, _ in row["filtered_resps"]]
        assert likely == pytest.approx([value for value, _ in sample["responses"]], abs=1e-6) and min(likely) < -1


def test_answers_of_drift_begin_as_in_a_run(monkeypatch, model):
    """With a token that crosses the end of the context; in one call with other tasks, which do not."""
    seen = []

    def answer(self, requests, *_):
        seen.append((self.whole_tokens, [r.task_name for r in requests]))
        return [(float(r.doc_id), False) for r in requests]

    monkeypatch.setattr(PrunedLM, "loglikelihood", answer)
    names = ["drift_smoke", "smoke_questions", "drift_smoke_same", "of_ones_own"]
    asked = [Instance("loglikelihood", {}, ("a", "b"), 0, metadata=(name, i, 1)) for i, name in enumerate(names)]
    assert DartLM(str(model), method="dense", dtype="float32").loglikelihood(asked) == [
        (float(i), False) for i in range(4)
    ]
    assert seen == [(False, names[1::2]), (True, names[::2])]


def test_perplexities_count_the_text_that_was_scored(tmp_path, model, tasks):
    args = {"method": "griffin", "sparsity": 0.5}
    theirs, _ = by_lm_eval(tmp_path / "theirs", model, "pages", "method=griffin,sparsity=0.5", "--include_path", tasks)
    ours, samples = by_run(tmp_path / "ours", model, "pages", args, "--include-path", tasks)
    assert theirs == pytest.approx({name: ours[name] for name in theirs}, rel=1e-6) and theirs["word_perplexity"] > 1
    scored = [sample["metrics"]["word_perplexity"] for sample in samples]  # words, by the bytes of second halves
    assert [weight for _, weight in scored] == pytest.approx([5 * 8 / 14, 2 * 3 / 6, 7 * 15 / 25])
    total = sum(ll for ll, _ in scored) / sum(weight for _, weight in scored)
    assert ours["word_perplexity"] == pytest.approx(math.exp(-total), rel=1e-5)
    weigh_scored_text()  # once more changes nothing
    again, _ = by_lm_eval(tmp_path / "again", model, "pages", "method=griffin,sparsity=0.5", "--include_path", tasks)
    assert again == theirs


@pytest.mark.parametrize(("args", "more", "word"), [
    ("method=grifin", (), "griffin"), ("metod=griffin", (), "metod"), ("scope=al", (), "scored"),
    ("sparsity=1.5", (), "sparsity"), ("method=griffin", ("--use_cache", "answers"), "--use_cache"),
    ("ffn_bits=99", (), "99"), ("load_in=3bit", (), "4bit"), ("method=griffin", ("--batch_size", "many"), "batch_size"),
    ("method=oracle,scope=continuation", (), "scored"),  # it has nothing to look at
    ("method=griffin,scope=all", (), "scored"),  # a task without answers
])  # fmt: skip
def test_wrong_arguments_are_refused_in_a_line(tmp_path, monkeypatch, model, tasks, args, more, word):
    monkeypatch.chdir(tmp_path)
    asked = ("pages", "--include_path", tasks) if "scope=all" in args else ("smoke_questions",)
    words = ("--model_args", f"pretrained={model},{args}", "--limit", "2", "--tasks", *asked, *more)
    done = command("lm-eval", "--model", "dart", *words)
    assert done.code == 2 and word in done.err.splitlines()[-1]


def test_the_entry_point_names_the_model():
    (entry,) = (e for e in importlib.metadata.entry_points(group="lm_eval.models") if e.name == "dart")
    assert entry.load() is DartLM and issubclass(DartLM, HFLM)
