"""`dart-eval export`: lm-eval's own code reads what it writes."""

import json
from pathlib import Path

import pytest

from dart_eval.export.lm_eval import _title
from dart_eval.results.inputs import specs
from dart_eval.results.record import Metric
from dart_eval.results.store import Store
from tests.helpers.commands import command
from tests.helpers.pages import HOSTILE, choice, texts
from tests.helpers.pages import folder as everything
from tests.helpers.records import answered, cell, written

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
        made.environment.update({"dart-eval": "0.1.0", "lm_eval": "0.4.13", "transformers": "5.0"})
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
    from lm_eval.result_schema import EvalResults, SampleResult
    from lm_eval.utils import (
        get_file_task_name,
        get_latest_filename,
        get_results_filenames,
        get_sample_results_filenames,
        make_table,
    )

    folder = _export(out)
    names = [str(folder / name) for name in _files(folder)]
    found = get_results_filenames(names)
    assert (len(found), len(names)) == (2, 2 + 3)  # dense, and the pruner on both tasks
    assert {json.loads(Path(f).read_text())["model_name"] for f in found} == {"me/tiny", f"me/tiny@{SPEC}@0.5"}
    pruned = next(f for f in found if "griffin" in f)
    own = [n for n in get_sample_results_filenames(names) if Path(n).parent == Path(pruned).parent]
    assert sorted(get_file_task_name(Path(n).name) for n in own) == ["arc_easy", "xsum"]
    assert get_latest_filename([pruned]) == pruned
    data = json.loads(Path(pruned).read_text())
    table = make_table(data)
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
