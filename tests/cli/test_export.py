"""`dart-eval export`: other projects' own packages read what it writes, and nothing is half-written."""

import contextlib
import io
import json
import math
from pathlib import Path

import pytest
import yaml

from dart_eval.evaluation import task_names
from dart_eval.export import datasets, every_eval_ever, writing
from dart_eval.export.facts import facts
from dart_eval.results.record import Metric
from dart_eval.results.store import Store
from dart_eval.util.errors import UserError
from tests.helpers.commands import command
from tests.helpers.pages import HOSTILE, choice, texts
from tests.helpers.pages import folder as everything
from tests.helpers.records import answered, cell, perplexities, written

SPEC = "griffin:remask=drift"
PARAMS = {"score": "activation", "remask": "drift", "remask.window": 8}
LAB = ("--organisation", "My Lab", "--relationship", "third_party")
FORMATS = {"every-eval-ever": LAB, "eval-results": ("--dataset", "arc_easy=allenai/ai2_arc:ARC-Easy"), "lm-eval": ()}


@pytest.fixture(autouse=True)
def _no_yaml(monkeypatch):
    """lm-eval's thousands of YAML files are looked through in one test alone."""
    monkeypatch.setattr(datasets, "config_of", lambda name: {})


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
        made.environment.update({"dart-eval": "0.1.0", "lm_eval": "0.4.13", "transformers": "5.0"})
        store.save(f"arc-{method}", made, questions)
    metrics = [Metric("xsum", "rougeL", 0.25, 0.01, 2, True), Metric("xsum", "empty", 0.0, None, 2, None)]
    stories = [written(i, f"a text {i}", drift={"window": 10, "signal": [0.9]}) for i in range(2)]
    made = cell("griffin", 0.5, "xsum", metrics, "me/tiny", stories, params=PARAMS)
    made.settings["method"] = SPEC
    store.save("xsum", made, texts("xsum", 2, None, "Text {}", "reference"))
    return tmp_path / "out"


def _export(out, to, *more):
    done = command("export", out, "--to", to, "--output", out.parent / to, *FORMATS[to], *more)
    assert done.code == 0, done.err
    return done, out.parent / to


def _files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


NO_VALIDATOR = "every-eval-ever is not installed: `make test` installs it"


# -- every format, read by its own project -----------------------------------------------------------------------------


def _valid(folder):
    """Validate a folder as the project's own command does, path and companions included; nothing is remarked."""
    validate_file = pytest.importorskip("every_eval_ever.validator", reason=NO_VALIDATOR).validate_file
    known = set(_files(folder))
    for name in known:
        report = validate_file(
            folder / name, repo_path=name, available_files=known, run_semantic_checks=True,
            read_repo_file=lambda path: (folder / path).read_text("utf-8"),
        )  # fmt: skip
        assert (report.valid, report.errors, report.warnings) == (True, [], []), name
    return [(folder / name, json.loads((folder / name).read_text())) for name in sorted(known) if name[-5:] == ".json"]


def test_every_eval_ever_finds_its_files_valid_and_the_pruner_in_them(out):
    _, folder = _export(out, "every-eval-ever")
    logs = _valid(folder)
    assert len(logs) == 3
    for path, log in logs:
        rows = _lines(path.with_name(f"{path.stem}_samples.jsonl"))
        for result in log["evaluation_results"]:
            own = [r for r in rows if r["evaluation_result_id"] == result["evaluation_result_id"]]
            score = sum(r["evaluation"]["score"] for r in own) / len(own)
            assert score == pytest.approx(result["score_details"]["score"])
    (path, log), *_ = [x for x in logs if x[1]["evaluation_id"].startswith("arc_easy") and SPEC in str(x)]
    told = log["evaluation_results"][0]["generation_config"]["additional_details"]
    assert (told["pruner"], json.loads(told["parameters"]), told["scope"]) == (SPEC, PARAMS, "scored")
    assert [float(told[name]) for name in ("sparsity", "read", "seed", "limit")] == [0.5, 0.5, 0, 400]
    assert log["source_metadata"]["source_organization_name"] == "My Lab"
    assert path.parts[-5:-1] == ("data", "dart-eval", "me", "tiny")
    first, _, last = _lines(path.with_name(f"{path.stem}_samples.jsonl"))
    assert first["input"]["reference"] == [" two"]
    assert [r["answer_attribution"][0]["extracted_value"] for r in (first, last)] == [" two", " one"]
    assert [r["evaluation"]["is_correct"] for r in (first, last)] == [True, False]


def test_texts_are_exported_as_they_were_written_and_no_empty_one_is_right(tmp_path):
    """A filter takes the answer from a text; `empty` is 1 for a text without one."""
    metrics = [
        Metric("gsm8k", name, 1.0, None, 1, up) for name, up in (("exact_match,strict", True), ("empty,strict", False))
    ]
    text = {"filter": "strict", "written": ["So it is 5."], "metrics": {"exact_match": 1.0, "empty": 1.0}}
    made = cell("griffin", 0.5, "gsm8k", metrics, "me/tiny", [written(0, "5", "gsm8k", **text)], params=PARAMS)
    made.settings["method"] = SPEC
    Store(tmp_path / "out").save("gsm8k", made, texts("gsm8k", 1, None, "Text {}", "5"))
    _, folder = _export(tmp_path / "out", "every-eval-ever")
    ((path, _),) = _valid(folder)
    rows = _lines(path.with_name(f"{path.stem}_samples.jsonl"))
    assert [row["evaluation"]["is_correct"] for row in rows] == [True, False]
    assert {*(text for row in rows for text in row["output"]["raw"])} == {"So it is 5."}
    assert {row["answer_attribution"][0]["extracted_value"] for row in rows} == {"5"}
    _, folder = _export(tmp_path / "out", "lm-eval")
    ((line,),) = (_lines(p) for p in folder.rglob("samples_*"))
    assert (line["resps"], line["filtered_resps"]) == ([["So it is 5."]], ["5"])


def test_the_hub_reads_eval_results_with_the_pruner_in_its_notes(out):
    from huggingface_hub import parse_eval_result_entries

    done, folder = _export(out, "eval-results", "--page", "https://example.org/run")
    assert done.err.splitlines() == [
        "note: left out: xsum: no data set on the hub is known, and this format needs one; name it for each: "
        "--dataset xsum=OWNER/NAME; `--to lm-eval` and `--to every-eval-ever` need none"
    ]
    files = sorted((folder / "me__tiny" / ".eval_results").glob("*.yaml"))
    assert len(files) == 2
    dense, pruned = (parse_eval_result_entries(yaml.safe_load(f.read_text()))[0] for f in files)
    assert (dense.dataset_id, dense.task_id, dense.value) == ("allenai/ai2_arc", "ARC-Easy", 1.0)
    assert (pruned.value, pruned.date) == (pytest.approx(2 / 3), "2026-01-02T03:04:05Z")
    assert pruned.source_url == "https://example.org/run"
    told = dict(part.split("=", 1) for part in pruned.notes.split("; "))
    assert json.loads(told.pop("parameters")) == PARAMS
    assert {k: told[k] for k in ("pruner", "sparsity", "read", "scope", "seed", "metric", "n")} == {
        "pruner": SPEC, "sparsity": "0.5", "read": "0.5", "scope": "scored", "seed": "0", "metric": "acc", "n": "3",
    }  # fmt: skip


def test_lm_eval_reads_its_own_files(out):
    from lm_eval.result_schema import EvalResults, SampleResult
    from lm_eval.utils import (
        get_file_task_name,
        get_latest_filename,
        get_results_filenames,
        get_sample_results_filenames,
        make_table,
    )

    _, folder = _export(out, "lm-eval")
    names = [str(folder / name) for name in _files(folder)]
    found = get_results_filenames(names)
    assert len(found) == 2  # dense, and the pruner on both tasks
    assert len(names) == 2 + 3
    assert {json.loads(Path(f).read_text())["model_name"] for f in found} == {"me/tiny", f"me/tiny@{SPEC}@0.5"}
    pruned = next(f for f in found if "griffin" in f)
    own = [n for n in get_sample_results_filenames(names) if Path(n).parent == Path(pruned).parent]
    assert sorted(get_file_task_name(Path(n).name) for n in own) == ["arc_easy", "xsum"]
    assert get_latest_filename([pruned]) == pruned
    data = json.loads(Path(pruned).read_text())
    table = make_table(data)
    assert "|arc_easy|" in table.replace(" ", "")
    assert "0.6667" in table
    assert "0.2500" in table
    assert set(data) - {"dart_eval"} == set(EvalResults.__annotations__) - {"samples", "groups"} - TOKENIZER
    assert data["dart_eval"]["arc_easy"]["parameters"] == PARAMS
    assert {k: data["config"]["model_args"][k] for k in ("pruner", "sparsity", "scope")} == {
        "pruner": SPEC, "sparsity": 0.5, "scope": "scored"
    }  # fmt: skip
    line = _lines(Path(next(n for n in own if "arc_easy" in n)))[0]
    assert set(line) == {*SampleResult.__annotations__, *line["metrics"], "dart_eval"}
    assert line["filtered_resps"] == [["-2.0", "False"], ["-1.0", "False"], ["-3.0", "False"]]
    assert line["arguments"]["gen_args_1"] == {"arg_0": "Question 0?", "arg_1": " two"}


# lm-eval asks the tokenizer for these; a record does not know them.
TOKENIZER = {"tokenizer_pad_token", "tokenizer_eos_token", "tokenizer_bos_token", "eot_token_id", "max_length"}


def test_every_eval_ever_converts_what_lm_eval_would_have_written(out):
    """A second reader of lm-eval's files, which no one wrote for ours."""
    converter = pytest.importorskip("every_eval_ever.converters.lm_eval.adapter", reason=NO_VALIDATOR)
    _, folder = _export(out, "lm-eval")
    with contextlib.redirect_stdout(io.StringIO()):
        logs = converter.LMEvalAdapter().transform_from_directory(folder, {"source_organization_name": "My Lab"})
    scores = sorted(r.score_details.score for log in logs for r in log.evaluation_results)
    assert scores == pytest.approx([0.0, 0.25, 2 / 3, 1.0])


# -- files -------------------------------------------------------------------------------------------------------------


def test_what_a_killed_export_has_half_written_is_gone_after_the_next(out):
    _, folder = _export(out, "lm-eval")
    whole = {path for path in folder.rglob("*") if path.is_file()}
    for path in whole:
        path.with_name(f".{path.stem[:40]}.a1b2c3d_").write_text("{")
        path.unlink()
    _export(out, "lm-eval")
    assert {path for path in folder.rglob("*") if path.is_file()} == whole


@pytest.mark.parametrize("to", FORMATS)
def test_a_second_export_replaces_nothing_unless_it_is_forced(out, to):
    done, folder = _export(out, to)
    before = _files(folder)
    assert done.out == f"wrote {len(before)} files to {folder}\n"
    words = ("export", out, "--to", to, "--output", folder, *FORMATS[to])
    again = command(*words)
    assert (again.code, again.out) == (2, "")
    assert "would be replaced; give --force, or another --output" in again.err
    assert _files(folder) == before
    some = next(iter(before))
    (folder / some).write_text("older")
    assert command(*words, "--force").code == 0
    assert sorted(_files(folder)) == sorted(before)
    assert (folder / some).read_text() != "older"


@pytest.mark.parametrize("to", FORMATS)
def test_a_failure_leaves_nothing_behind(out, to, monkeypatch):
    count = 0

    def write(*args):
        nonlocal count
        count += 1
        if count == 2:
            raise UserError("no room", "make some")
        kept(*args)

    kept = writing.write
    monkeypatch.setattr(writing, "write", write)
    done = command("export", out, "--to", to, "--output", out.parent / "a" / "b", *FORMATS[to])
    assert (done.code, done.out, count) == (2, "", 2)
    assert not (out.parent / "a").exists()


@pytest.mark.parametrize("to", FORMATS)
def test_names_of_any_kind_stay_inside_and_are_safe(tmp_path, to):
    hostile = f"/../../x:{HOSTILE}\n\ud7ff" + "long" * 80
    everything(tmp_path / "out", hostile, methods=(("dense", 0.0), ("dart", 0.5)))
    more = [] if to == "lm-eval" else ["--dataset", "xsum=a/b"]
    done = command("export", tmp_path / "out", "--to", to, "--output", tmp_path / "made", *more)
    assert done.code == 0, done.err
    assert {p.name for p in tmp_path.iterdir()} == {"out", "made"}
    for name in _files(tmp_path / "made"):
        for part in name.split("/"):
            assert part not in ("", ".", "..") and len(part.encode()) < 200
            assert not set(part) & set('<>:"\\|?*\n ')
    if to == "every-eval-ever":
        assert len(list((tmp_path / "made").rglob("*.json"))) == 6


def test_a_cell_whose_samples_are_damaged_is_left_out_by_name(out):
    damaged = next((out / "samples").glob("arc-griffin*"))
    damaged.write_text("{}\n")
    done, folder = _export(out, "every-eval-ever")
    assert done.err.startswith(f"note: left out: the samples of arc_easy under {SPEC} at 50 % in ")
    assert len(_valid(folder)) == 2
    for file in (out / "samples").iterdir():
        file.write_text("{}\n")
    done = command("export", out, "--to", "every-eval-ever", "--output", out.parent / "none")
    assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 1)
    assert not (out.parent / "none").exists()


def test_the_other_cells_of_a_damaged_ones_setting_are_exported_and_counted(out):
    """lm-eval has a folder a setting, with a file a task: an earlier export had all of them."""
    done, folder = _export(out, "lm-eval")
    before = _files(folder)
    next((out / "samples").glob("arc-griffin*")).write_text("{}\n")
    done, folder = _export(out, "lm-eval", "--force")
    assert done.err.startswith(f"note: left out: the samples of arc_easy under {SPEC} at 50 % in ")
    gone = before.keys() - _files(folder).keys()
    assert [name.partition("samples_")[2].partition("_2")[0] for name in gone] == ["arc_easy"]
    assert f"wrote {len(before) - 1} files" in done.out + done.err
    next((out / "samples").glob("arc-dense*")).write_text("{}\n")  # all that this setting has
    done, _ = _export(out, "lm-eval", "--force")
    said = [line.split(" under ")[1].split(" at ")[0] for line in done.err.splitlines() if "left out" in line]
    assert sorted(said) == ["dense", SPEC]


def test_what_is_no_number_is_no_result(tmp_path):
    metrics = {"dense": [("acc", math.nan, 0.1)], "dart": [("acc", 0.5, math.inf), ("mcc", math.inf, None)]}
    made = [cell(m, metrics=[Metric("arc_easy", *v, 3, True) for v in values]) for m, values in metrics.items()]
    for i, record in enumerate(made):
        Store(tmp_path / "out").save(f"cell{i}", record)
    done, folder = _export(tmp_path / "out", "every-eval-ever")
    assert "left out: arc_easy under dense at 50 % has no number" in done.err
    ((_, log),) = _valid(folder)
    (result,) = log["evaluation_results"]
    assert result["score_details"] == {"score": 0.5, "uncertainty": {"num_samples": 3}}


@pytest.mark.parametrize("response", [None, [], [None, True], "text", ["-1.0", True], {"a": 1}])
@pytest.mark.parametrize("to", FORMATS)
def test_a_response_that_is_no_score_is_no_traceback(out, to, response):
    made = [choice(i, [-2.0, -1.0, -3.0], 1) for i in range(3)]
    made[1]["responses"][0] = response
    record = cell("dart", 0.5, metrics=[Metric("arc_easy", "acc", 1.0, 0.1, 3, True)], model="me/tiny", samples=made)
    Store(out).save("forged", record, texts("arc_easy", 3, [" one", " two", " three"]))
    _, folder = _export(out, to)
    if to == "every-eval-ever":
        rows = [row for path in folder.rglob("*_samples.jsonl") for row in _lines(path) if row["sample_id"] == "1"]
        assert sorted(len(row["answer_attribution"]) for row in rows if "acc" in row["evaluation_result_id"]) == [
            0,
            1,
            1,
        ]


def test_a_document_has_a_perplexity_of_its_own(tmp_path):
    values = perplexities(1.0, 3)
    record = answered("wikitext", values, up=False)
    Store(tmp_path / "out").save("cell", record, texts("wikitext", 3))
    _, folder = _export(tmp_path / "out", "every-eval-ever")
    ((path, log),) = _valid(folder)
    rows = _lines(path.with_name(f"{path.stem}_samples.jsonl"))
    expected = [math.exp(-ll / words) for ll, words in (v["word_perplexity"] for v in values)]
    assert [r["evaluation"]["score"] for r in rows] == pytest.approx(expected)
    assert log["evaluation_results"][0]["metric_config"]["max_score"] == "Infinity"


def test_a_document_has_a_distance_of_its_own(tmp_path):
    values = [{"kl": [0.5 * i, 3 + i]} for i in range(3)]
    Store(tmp_path / "out").save("cell", answered("arc_easy", values, up=False), texts("arc_easy", 3))
    ((path, _),) = _valid(_export(tmp_path / "out", "every-eval-ever")[1])
    rows = _lines(path.with_name(f"{path.stem}_samples.jsonl"))
    assert [r["evaluation"]["score"] for r in rows] == [0, 0.5 / 4, 1 / 5]


WRONG = {
    "no format": ((), "--to is missing"),
    "an unknown format": (("--to", "lm-evl"), "unknown format 'lm-evl'; did you mean lm-eval?"),
    "an option of another format": (("--to", "lm-eval", "--page", "x"),
                                    "--page needs --to every-eval-ever or eval-results; leave it out"),
    "an unknown relationship": (("--to", "every-eval-ever", "--relationship", "self"), "unknown relationship 'self'"),
    "a data set that is none": (("--to", "lm-eval", "--dataset", "arc_easy"), "--dataset 'arc_easy' names no data set"),
    "a data set of no task": (("--to", "lm-eval", "--dataset", "arc_esy=a/b"), "names arc_esy, a task without"),
    "a model that is a path": (("--to", "lm-eval", "--model-id", "../x"), "--model-id '../x' is no name on the hub"),
    "a file for a folder": (("--to", "lm-eval", "--output", "file"), "--output file is no folder; name a folder"),
    "no data set at all": (("--to", "eval-results"), "error: arc_easy, xsum: no data set on the hub is known"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_is_one_line_and_writes_nothing(out, monkeypatch, wrong):
    monkeypatch.chdir(out.parent)
    Path("file").touch()
    words, message = WRONG[wrong]
    done = command("export", "out", *words)
    assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 1)
    assert message in done.err
    assert sorted(p.name for p in out.iterdir()) == ["cells", "samples", "texts"]


def test_one_name_on_the_hub_is_given_to_one_model(out):
    _, folder = _export(out, "every-eval-ever", "--model-id", "Owner/Name")
    assert {(path.parts[-3:-1], log["model_info"]["id"]) for path, log in _valid(folder)} == {
        (("Owner", "Name"), "Owner/Name")
    }
    Store(out).save("other", cell("dense", 0.0, model="other"))
    done = command("export", out, "--to", "lm-eval", "--model-id", "me/tiny")
    assert "--model-id names one model, and the results are of 2 (me/tiny, other)" in done.err


# -- data sets ---------------------------------------------------------------------------------------------------------


def test_data_sets_are_those_of_the_tasks_yaml(monkeypatch):
    monkeypatch.undo()
    task_names.names()  # what looked for names has seen every file
    monkeypatch.setattr("os.scandir", None)
    asked = ["arc_challenge", "xsum", "smoke_questions", "mmlu_anatomy", "mmlu_astronomy", "no_such_task", "x\n]"]
    found = datasets.datasets_of(asked, {"xsum": datasets.Dataset("a/b", "c")})
    assert found == {
        "arc_challenge": datasets.Dataset("allenai/ai2_arc", "ARC-Challenge", "test"),  # the rest from arc_easy's
        "xsum": datasets.Dataset("a/b", "c"),
        "mmlu_anatomy": datasets.Dataset("cais/mmlu", "anatomy", "test"),
        "mmlu_astronomy": datasets.Dataset("cais/mmlu", "astronomy", "test"),
    }
    assert datasets.of_task("mmlu", ["mmlu_anatomy", "mmlu_astronomy"], found) == datasets.Dataset("cais/mmlu")
    assert datasets.of_task(
        "mmlu", [], datasets.datasets_of([], {"mmlu": datasets.Dataset("a/b")})
    ) == datasets.Dataset("a/b")
    assert datasets.of_task("both", ["mmlu_anatomy", "xsum"], found) is None


def test_rounded_weights_stand_in_every_name(tmp_path):
    """dense on 4 bits cannot pass for dense, nor griffin on 4 bits for griffin."""
    records = [answered("arc", [{"acc": 1.0}], m, s, ffn_bits=b)
               for m, s, b in (("dense", 0.0, None), ("dense", 0.0, "4"), ("griffin", 0.5, "4"))]  # fmt: skip
    found = [(f.title, f.named("-"), f.details()["ffn_bits"]) for f in facts(Store(tmp_path), records)]
    assert found[0] == ("dense", "dense", None) and found[1] == ("dense on 4 bits", "dense-on-4-bits", "4")
    assert found[2][0].endswith(" on 4 bits at 50 %") and found[2][1].endswith("-on-4-bits-0.5")


@pytest.mark.parametrize(("metric", "value", "wanted"), [
    ("prompt_level_strict_acc", True, 1.0), ("perplexity", -3.2, math.exp(3.2)),
    ("word_perplexity", [-6.0, 3], math.exp(2)),
    ("bits_per_byte", [-2 * math.log(2), 4], 0.5), ("word_perplexity", [-6.0, 0], None), ("acc", 0.5, 0.5),
])  # fmt: skip
def test_a_document_has_a_number_of_its_own(metric, value, wanted):
    found = every_eval_ever._score(metric, value)
    assert found is wanted or found == pytest.approx(wanted)
