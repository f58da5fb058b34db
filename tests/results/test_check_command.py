"""`dart-eval check`: a planted bug is caught; the baseline file, what is shown, annotated and reported."""

import inspect
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner

import dart_eval
from dart_eval.cli import check as command
from dart_eval.pruning.methods.griffin import Griffin
from dart_eval.results.check import Limits, Thresholds, check, load_baseline, thresholds_from
from dart_eval.results.frame import cells
from dart_eval.sweep.events import silent
from dart_eval.sweep.options import config_from
from dart_eval.util.errors import UserError
from tests.helpers.commands import run_local
from tests.helpers.models import tiny
from tests.helpers.records import N, answered, digest, perplexities, right, save


@pytest.fixture
def cli():
    app = typer.Typer()
    app.command()(command.check)
    return lambda *args: CliRunner().invoke(app, [str(a) for a in args])


# -- a planted bug, for real ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taught(tmp_path_factory, tokenizer):
    """A tiny model whose FFNs, and nothing else, have learned what comes next: pruning the wrong neurons shows."""
    model = tiny("llama").float()
    model.config.max_position_embeddings = 1024
    ffns = [p for name, p in model.named_parameters() if "mlp" in name]
    optimiser = torch.optim.Adam(ffns, lr=1e-2)
    text = torch.full((4, 32), 3)  # to this tokenizer every word of the smoke tasks is the unknown word
    text[:, 0] = 1
    for _ in range(40):
        loss = model(input_ids=text, labels=text).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    path = tmp_path_factory.mktemp("models") / "taught"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def run(model, output):
    config = config_from(None, {
        "model": model, "output": str(output), "tasks": "smoke_drift,smoke_questions", "method": "dense,griffin",
        "sparsity": "0.5", "limit": 10,
    })  # fmt: skip
    assert not run_local(config, silent).failed
    return output


@pytest.mark.slow
def test_a_planted_bug_fails_the_check_and_the_same_run_again_does_not(taught, tmp_path, cli, monkeypatch):
    file = tmp_path / "baseline.json"
    assert cli(run(taught, tmp_path / "good"), "--baseline", file, "--update").exit_code == 0
    again = cli(run(taught, tmp_path / "again"), "--baseline", file)
    assert again.exit_code == 0, again.output
    assert again.stdout.startswith("### ok")

    keep_best = Griffin.observe
    monkeypatch.setattr(Griffin, "observe", lambda *given: -keep_best(*given))  # keeps the lowest
    broken = run(taught, tmp_path / "broken")
    found = cli(broken, "--baseline", file, "--format", "json")
    assert found.exit_code == 1
    rows = {(r["cell"], r["task"], r["metric"]): r for r in json.loads(found.stdout)["rows"]}
    fell = rows["griffin 50 %", "smoke_drift", "word_perplexity"]
    assert fell["verdict"] == "FELL"
    assert fell["recovery"] < 0.98
    assert fell["p_holm"] < 0.05
    assert {r["verdict"] for (name, *_), r in rows.items() if name == "dense"} == {"ok"}
    assert cli(broken, "--baseline", tmp_path / "good").exit_code == 1  # a folder is a baseline too


# -- the baseline file ---------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path):
    values = [{**v, "gold_ll": -1 / 3 - i, "acc_norm": 1.0} for i, v in enumerate(right(0.8))]
    return save(
        tmp_path / "out", answered("arc", values), answered("drift", perplexities(1.0), up=False),
        answered("arc", values, "dense", 0.0),
    )  # fmt: skip


def test_a_baseline_is_stable_and_compact(results, tmp_path, cli):
    file = tmp_path / "b.json"
    assert cli(results, "--baseline", file, "--update").stdout == f"wrote {file}: 3 cells, 180 documents\n"
    first = file.read_text()
    lines = [line for line in first.splitlines() if line.startswith('["arc", 3,')]
    short = digest("arc 3 v1")[:8], digest("prompt arc 3 v1")[:8]
    assert lines == [
        f'["arc", 3, "none", "{short[0]}", "{short[1]}", null, {{"acc": 1, "gold_ll": -3.333333}}],'
    ] * 2  # fmt: skip
    save(results, answered("drift", perplexities(1.0), up=False, created="2027-01-01"))  # the same again, later
    assert cli(results, "--baseline", file, "--update").exit_code == 0
    assert file.read_text() == first
    json.loads(first)


def test_a_baseline_file_says_what_the_folder_says(results, tmp_path, cli):
    file = tmp_path / "b.json"
    cli(results, "--baseline", file, "--update")
    for reference in (file, results):
        report = check(cells(results), load_baseline(reference), Thresholds(), "b")
        assert {(r["metric"], r["verdict"], r["changed"], r["recovery"]) for r in report.rows} == {
            ("acc", "ok", 0, 1.0), ("gold_ll", "ok", 0, 1.0), ("word_perplexity", "ok", 0, 1.0),
        }  # fmt: skip
        assert all(r["difference"] == 0 for r in report.rows)


def test_values_that_are_not_finite_make_no_baseline(tmp_path, cli):
    out = save(tmp_path / "out", answered("s", [{"rougeL": math.nan}] * N))
    found = cli(out, "--baseline", tmp_path / "b.json", "--update")
    assert "not finite" in str(found.exception)
    assert not (tmp_path / "b.json").exists()


@pytest.mark.parametrize("text", [
    "", "[]", "{}", '{"schema": 2, "cells": []}', '{"schema": 1, "cells": []}',
    '{"schema": 1, "cells": [{"inputs": {}}]}', '{"schema": 1, "cells": [3]}', "half", "words",
])  # fmt: skip
def test_what_is_no_baseline_is_refused(results, tmp_path, cli, text):
    file = tmp_path / "b.json"
    cli(results, "--baseline", file, "--update")
    good = file.read_text()
    file.write_text(
        {"half": good[: len(good) // 2], "words": good.replace('"acc": 1', '"acc": "good"', 1)}.get(text, text)
    )
    found = cli(results, "--baseline", file)
    assert isinstance(found.exception, UserError)
    assert f"dart-eval check RESULTS --baseline {file} --update" in found.exception.remedy


def test_a_baseline_of_an_earlier_version_with_bleu_is_read_and_says_that_it_is_not_checked(results, tmp_path, cli):
    file = tmp_path / "b.json"
    cli(results, "--baseline", file, "--update")
    data = json.loads(file.read_text())
    for cell in data["cells"]:
        if cell["inputs"]["method"] == "dense":
            cell["measures"] = [["arc", "bleu", True, ["arc"], False]]
            cell["documents"] = [[*line[:-1], {"bleu": [9] * 10}] for line in cell["documents"]]
    file.write_text(json.dumps(data))
    found = cli(results, "--baseline", file)
    assert found.exit_code == 0 and "Not checked: dense" in found.stdout


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fallen(results, tmp_path, cli):
    """A baseline and results of which one row fell and one is missing."""
    file = tmp_path / "b.json"
    cli(results, "--baseline", file, "--update")
    values = [{**v, "gold_ll": -1 / 3 - i} for i, v in enumerate(right(0.4))]
    now = save(tmp_path / "now", answered("arc", values), answered("drift", perplexities(1.0), up=False))
    return now, file


def test_the_verdict_comes_first_then_what_fell(fallen, cli):
    now, file = fallen
    found = cli(now, "--baseline", file)
    assert found.exit_code == 1
    lines = found.stdout.splitlines()
    assert lines[0].startswith("### FAILED") and "1 fell, 2 missing" in lines[0]
    assert sum("| FELL" in line for line in lines) == 1
    assert sum("| missing" in line for line in lines) == 2
    assert not any("| ok" in line for line in lines)
    assert "2 of 5 rows are ok" in found.stdout
    assert sum("| ok" in line for line in cli(now, "--baseline", file, "--all").stdout.splitlines()) == 2


def test_github_gets_annotations_and_a_summary(fallen, cli, tmp_path, monkeypatch):
    now, file = fallen
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    found = cli(now, "--baseline", file, "--github")
    assert found.exit_code == 1
    lines = [line for line in found.stdout.splitlines() if line.startswith("::error ")]
    assert len(lines) == 3
    assert any(line.startswith("::error title=FELL arc acc::") for line in lines)
    assert summary.read_text().startswith("before\n### FAILED")
    as_json = cli(now, "--baseline", file, "--github", "--format", "json")
    assert json.loads(as_json.stdout)["verdict"] == "FELL"
    assert cli(now, "--baseline", file, "--github", "--format", "csv").stdout.startswith("cell,")
    monkeypatch.delenv("GITHUB_STEP_SUMMARY")
    assert "GITHUB_STEP_SUMMARY" in str(cli(now, "--baseline", file, "--github").exception)


def test_junit_reports_every_row(fallen, cli, tmp_path):
    now, file = fallen
    report = tmp_path / "reports" / "junit.xml"
    assert cli(now, "--baseline", file, "--junit", report).exit_code == 1
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert (suite.get("tests"), suite.get("failures")) == ("5", "3")
    failures = [c for c in suite.iter("testcase") if c.find("failure") is not None]
    assert [c.find("failure").get("type") for c in failures].count("FELL") == 1
    assert all(c.find("failure").text for c in failures)
    library = pytest.importorskip("junitparser")
    (parsed,) = library.JUnitXml.fromfile(str(report))
    assert (parsed.tests, parsed.failures, len(list(parsed))) == (5, 3, 5)
    assert {c.name for c in parsed} == {"arc acc", "arc gold_ll", "drift word_perplexity"}


@pytest.mark.parametrize(("args", "words"), [
    (("--format", "xml"), "xml"), (("--update", "--all"), "--update"), 
    (("--thresholds", "none.yaml"), "none.yaml"), (("--thresholds", "/dev/zero"), "device"),
    (("--baseline", "/dev/zero"), "device"),
])  # fmt: skip
def test_wrong_options_are_refused(fallen, cli, args, words):
    now, file = fallen
    before = file.read_text()
    assert words in str(cli(now, "--baseline", file, *args).exception)
    assert file.read_text() == before


def test_empty_results_are_refused(fallen, cli, tmp_path):
    found = cli(tmp_path / "empty", "--baseline", fallen[1])
    assert isinstance(found.exception, UserError)
    assert "no results in" in str(found.exception)
    assert "is a folder" in str(cli(fallen[0], "--baseline", tmp_path, "--update").exception)


# -- the documentation ---------------------------------------------------------------------------------------------


def test_the_yaml_of_the_documentation_is_what_it_says(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "ci.md").read_text(encoding="utf-8")
    thresholds, workflow, quality = (block.partition("```")[0] for block in text.split("```yaml\n")[1:])
    (tmp_path / "t.yaml").write_text(thresholds)
    assert thresholds_from(tmp_path / "t.yaml") == Thresholds(tasks={"smoke_drift": Limits(recovery=0.95)})
    (step,) = yaml.safe_load(workflow)["jobs"]["quality"]["steps"][1:]
    assert config_from(None, yaml.safe_load(quality)).method == ("dense", "griffin")
    inputs = yaml.safe_load((Path(__file__).parents[2] / "action.yml").read_text(encoding="utf-8"))["inputs"]
    assert step["uses"] == f"OWNER/dart-eval@v{dart_eval.__version__}"
    assert {name for name, field in inputs.items() if field.get("required")} <= step["with"].keys() <= inputs.keys()
    assert all(f"`{name}`" in text for name in inputs)
    named = {option.replace("-", "_") for option in re.findall(r"`(?:dart-eval check )?--([a-z]+)", text)}
    assert {"github", "junit"} <= named <= inspect.signature(command.check).parameters.keys()
