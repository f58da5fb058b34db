"""lm-eval's own command line with `--model dart`: the numbers of `dart-eval run`; and its layout, which we write."""

import importlib.metadata
import json
import math
from pathlib import Path

import pytest
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.result_schema import EvalResults, SampleResult

from dart_eval.evaluation.lm import PrunedLM
from dart_eval.evaluation.tasks import weigh_scored_text
from dart_eval.export.lm_eval import _title
from dart_eval.results.inputs import specs
from dart_eval.results.record import Metric
from dart_eval.results.store import Store
from dart_eval.sweep.dart_lm import DartLM
from tests.helpers.commands import command
from tests.helpers.models import save_tiny
from tests.helpers.pages import HOSTILE, choice, texts
from tests.helpers.pages import folder as everything
from tests.helpers.records import answered, cell, written
from tests.helpers.tasks import write_task


@pytest.fixture(scope="module", autouse=True)
def without_lm_evals_own_tasks(tmp_path_factory):
    """lm-eval looks for its 14,000 files, which no test here runs, in an empty folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.tasks.manager.__file__", str(tmp_path_factory.mktemp("none") / "manager.py"))
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    return save_tiny(tmp_path_factory.mktemp("model"), tokenizer)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with a task of lm-eval's rolling kind, whose documents have an odd number of words."""
    rows = [{"text": text} for text in ("w4 w9 w5 w7 w6", "w8 w11", "w12 w4 w5 w30 w31 w32 w90")]
    asked = {"kind": "loglikelihood_rolling", "text": '""', "target": '"{{text}}"'}
    more = "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]"
    return write_task(tmp_path_factory.mktemp("tasks"), *rows, name="pages", **asked, more=more)


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
    answers = DartLM(str(model), method="dense", dtype="float32").loglikelihood(asked)
    assert answers == [(float(i), False) for i in range(4)]
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


# -- `dart-eval export`: lm-eval's own code reads what it writes -------------------------------------------------------

SPEC = "griffin:remask=drift"
PARAMS = {"score": "activation", "remask": "drift", "remask.window": 8}


@pytest.fixture
def out(tmp_path):
    """Three questions, answered densely and under a pruner, and a summary; values and metrics fit."""
    store = Store(tmp_path / "out")
    questions = texts("arc_easy", 3, [" one", " two", " three"])
    for method, sparsity, best in (("dense", 0.0, 1), ("griffin", 0.5, 0)):
        scores = [[-2.0, -1.0, -3.0], [-2.0, -1.0, -3.0], [-1.0 - best, -1.5, -3.0]]
        samples = [choice(i, s, 1) for i, s in enumerate(scores)]
        acc = sum(s["metrics"]["acc"] for s in samples) / 3
        made = cell(method, sparsity, metrics=[Metric("arc_easy", "acc", acc, 0.1, 3, True)], model="me/tiny",
                    samples=samples, params={} if method == "dense" else PARAMS)  # fmt: skip
        made.settings["method"] = "dense" if method == "dense" else SPEC
        store.save(f"arc-{method}", made, questions)
    metrics = [Metric("xsum", "rougeL", 0.25, 0.01, 2, True), Metric("xsum", "empty", 0.0, None, 2, None)]
    stories = [written(i, f"a text {i}", drift={"window": 10, "signal": [0.9]}) for i in range(2)]
    made = cell("griffin", 0.5, "xsum", metrics, "me/tiny", stories, params=PARAMS)
    made.settings["method"] = SPEC
    store.save("xsum", made, texts("xsum", 2, None, "Text {}", "reference"))
    return tmp_path / "out"


def _export(out, *more):
    done = command("export", out, "--to", "lm-eval", "--output", out.parent / "made", *more)
    assert done.code == 0, done.err
    return out.parent / "made"


def _files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_lm_eval_reads_its_own_files(out):
    folder = _export(out)
    names = [str(folder / name) for name in _files(folder)]
    found = utils.get_results_filenames(names)
    assert (len(found), len(names)) == (2, 2 + 3)  # dense, and the pruner on both tasks
    assert {json.loads(Path(f).read_text())["model_name"] for f in found} == {"me/tiny", f"me/tiny@{SPEC}@0.5"}
    pruned = next(f for f in found if "griffin" in f)
    own = [n for n in utils.get_sample_results_filenames(names) if Path(n).parent == Path(pruned).parent]
    assert sorted(utils.get_file_task_name(Path(n).name) for n in own) == ["arc_easy", "xsum"]
    assert utils.get_latest_filename([pruned]) == pruned
    data = json.loads(Path(pruned).read_text())
    table = utils.make_table(data)
    assert "0.6667" in table and "0.2500" in table
    assert set(data) - {"dart_eval"} == set(EvalResults.__annotations__) - {"samples", "groups"} - TOKENIZER
    assert data["dart_eval"]["arc_easy"]["inputs"]["params"] == PARAMS
    assert data["dart_eval"]["arc_easy"]["weights_read"] == 0.5
    assert data["config"]["pruner"] == SPEC
    assert data["config"]["model_args"] == {"pretrained": "me/tiny", "sparsity": 0.5, "scope": "scored"}
    line = _lines(Path(next(n for n in own if "arc_easy" in n)))[0]
    assert set(line) == {*SampleResult.__annotations__, *line["metrics"], "dart_eval"}
    assert line["filtered_resps"] == [["-2.0", "False"], ["-1.0", "False"], ["-3.0", "False"]]
    assert line["arguments"]["gen_args_1"] == {"arg_0": "Question 0?", "arg_1": " two"}


# lm-eval asks the tokenizer for these; a record does not know them.
TOKENIZER = {"tokenizer_pad_token", "tokenizer_eos_token", "tokenizer_bos_token", "eot_token_id", "max_length"}


def test_texts_are_exported_as_they_were_written(tmp_path):
    """A filter takes the answer from a text."""
    text = {"filter": "strict", "written": ["So it is 5."], "metrics": {"exact_match": 1.0}}
    metrics = [Metric("gsm8k", "exact_match,strict", 1.0, None, 1, True)]
    made = cell("griffin", 0.5, "gsm8k", metrics, "me/tiny", [written(0, "5", "gsm8k", **text)], params=PARAMS)
    Store(tmp_path / "out").save("gsm8k", made, texts("gsm8k", 1, None, "Text {}", "5"))
    folder = _export(tmp_path / "out")
    ((line,),) = (_lines(p) for p in folder.rglob("samples_*"))
    assert (line["resps"], line["filtered_resps"]) == ([["So it is 5."]], ["5"])


def test_a_second_export_replaces_nothing_unless_it_is_forced(out):
    folder = _export(out)
    before = _files(folder)
    again = command("export", out, "--output", folder)
    assert (again.code, again.out) == (2, "")
    assert "--force" in again.err and _files(folder) == before
    some = next(iter(before))
    (folder / some).write_text("older")
    _export(out, "--force")
    assert _files(folder) == before


def test_names_of_any_kind_stay_inside_and_are_safe(tmp_path):
    hostile = f"/../../x:{HOSTILE}\n\ud7ff" + "long" * 80
    everything(tmp_path / "out", hostile)
    _export(tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"out", "made"}
    for name in _files(tmp_path / "made"):
        for part in name.split("/"):
            assert part not in ("", ".", "..") and len(part.encode()) < 200
            assert not set(part) & set('<>:"\\|?*\n ')


def test_a_cell_whose_samples_are_damaged_is_left_out_by_name(out):
    before = set(_files(_export(out)))
    next((out / "samples").glob("arc-griffin*")).write_text("{}\n")
    done = command("export", out, "--output", out.parent / "less")
    assert "arc_easy" in done.err and SPEC in done.err
    assert [name.partition("samples_")[2][:8] for name in before - set(_files(out.parent / "less"))] == ["arc_easy"]
    for file in (out / "samples").iterdir():
        file.write_text("{}\n")
    done = command("export", out, "--output", out.parent / "none")
    assert (done.code, done.out) == (2, "") and not (out.parent / "none").exists()


def test_a_response_that_is_no_score_is_no_traceback(out):
    for i, response in enumerate([None, [], [None, True], "text", ["-1.0", True], {"a": 1}]):
        made = [choice(i, [-2.0, -1.0, -3.0], 1) for i in range(3)]
        made[1]["responses"][0] = response
        metrics = [Metric("arc_easy", "acc", 1.0, 0.1, 3, True)]
        record = cell("dart", 0.5, metrics=metrics, model=f"me/tiny-{i}", samples=made)
        Store(out).save("forged", record, texts("arc_easy", 3, [" one", " two", " three"]))
    _export(out)


def test_rounded_weights_stand_in_every_name():
    """dense on 4 bits cannot pass for dense, nor griffin on 4 bits for griffin."""
    on_4 = {"ffn_bits": "4"}
    asked = ("dense", 0.0, {}), ("dense", 0.0, on_4), ("griffin", 0.5, on_4)
    records = [answered("arc", [{"acc": 1.0}], method, sparsity, **bits) for method, sparsity, bits in asked]
    dense, rounded, both = (_title(record, specs(records)) for record in records)
    assert "@" not in dense and rounded == f"{dense}@dense-on-4-bits" and both == f"{dense}@griffin-on-4-bits@0.5"
