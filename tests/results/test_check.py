"""`dart-eval check`: regressions are caught, noise is not; baselines, thresholds, reports."""

import inspect
import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
import yaml
from scipy import stats as scipy_stats
from typer.testing import CliRunner

from dart_eval.cli import check as command
from dart_eval.errors import UserError
from dart_eval.executors import jobs
from dart_eval.plan import config_from
from dart_eval.pruning.methods.griffin import Griffin
from dart_eval.results import baseline, outcomes
from dart_eval.results.check import check, recovery, workflow_commands
from dart_eval.results.outcomes import Cell, Measure
from dart_eval.results.thresholds import Limits, Thresholds, thresholds_from
from tests.helpers.commands import run_local
from tests.helpers.models import tiny
from tests.helpers.records import answered, digest, perplexities, right, samples, save

N = 60


def cell(record):
    """A record as a cell, without files."""
    return Cell(record.key, record.inputs, "results", record.created, lambda: outcomes.outcome(record, record.samples))


def checked(now, then, thresholds=None):
    return check([cell(r) for r in now], [cell(r) for r in then], thresholds or Thresholds(), "baseline.json")


@pytest.fixture
def cli():
    app = typer.Typer()
    app.command()(command.check)
    return lambda *args: CliRunner().invoke(app, [str(a) for a in args])


# -- noise and regressions, simulated ------------------------------------------------------------------------------


def noisy_run(generator, fall=0.0):
    """Results of two methods whose documents' outcomes are drawn anew: accuracies, log-likelihoods, a perplexity."""
    base = np.random.default_rng(99)  # the documents stay the same
    gold, w = base.gamma(4, 5, 100), base.integers(50, 500, 40)
    ll = -w * base.gamma(9, 0.3, 40)
    made = []
    for method in ("dart", "griffin"):
        values = [
            {"acc": float(generator.random() < 0.6 - fall), "gold_ll": float(-g + generator.normal(-fall, 0.3))}
            for g in gold
        ]
        made.append(answered("arc", values, method))
        values = [
            {"word_perplexity": [float(x * (1 + fall + generator.normal(0, 0.02))), int(k)]}
            for x, k in zip(ll, w, strict=True)
        ]
        made.append(answered("drift", values, method, up=False))
    return made


def test_noise_alone_is_no_regression():
    """100 pairs of runs, documents redrawn: at most the stated 5 % may fail (binomial bound, 1 in 1000)."""
    alarms = 0
    for seed in range(100):
        generator = np.random.default_rng(seed)
        alarms += bool(checked(noisy_run(generator), noisy_run(generator)).bad)
    assert alarms <= scipy_stats.binom.ppf(0.999, 100, 0.05)


def test_a_real_fall_is_found():
    generator = np.random.default_rng(1)
    found = 0
    for _ in range(20):
        report = checked(noisy_run(generator, fall=0.25), noisy_run(generator))
        found += {r.metric for r in report.bad} == {"acc", "gold_ll", "word_perplexity"}
    assert found >= 18


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
    assert not run_local(config, jobs.Silent()).failed
    return output


def test_a_planted_bug_fails_the_check_and_the_same_run_again_does_not(taught, tmp_path, cli, monkeypatch):
    file = tmp_path / "baseline.json"
    assert cli(run(taught, tmp_path / "good"), "--baseline", file, "--update").exit_code == 0
    again = cli(run(taught, tmp_path / "again"), "--baseline", file)
    assert again.exit_code == 0, again.output
    assert "ok: all" in again.stdout

    keep_best = Griffin.energy
    monkeypatch.setattr(Griffin, "energy", lambda self, h, valid: -keep_best(self, h, valid))  # keeps the lowest
    broken = run(taught, tmp_path / "broken")
    found = cli(broken, "--baseline", file, "--format", "json")
    assert found.exit_code == 1
    rows = {(r["cell"], r["task"], r["metric"]): r for r in json.loads(found.stdout)["rows"]}
    fell = rows["griffin 0.5", "smoke_drift", "word_perplexity"]
    assert fell["verdict"] == "FELL"
    assert fell["recovery"] < 0.98
    assert fell["p_holm"] < 0.05
    assert {r["verdict"] for (name, *_), r in rows.items() if name == "dense"} == {"ok"}
    assert cli(broken, "--baseline", tmp_path / "good").exit_code == 1  # a folder is a baseline too


# -- verdicts ------------------------------------------------------------------------------------------------------


def test_a_row_falls_only_with_too_much_lost_and_beyond_noise():
    then = right(0.9)
    slightly = [{"acc": v["acc"] if i else 0.0} for i, v in enumerate(then)]
    (row,) = checked([answered("arc", slightly)], [answered("arc", then)], Thresholds(Limits(recovery=0.999))).rows
    assert (row.verdict, row.why) == ("ok", "recovery below 0.999, within noise")
    (row,) = checked([answered("arc", right(0.5))], [answered("arc", then)], Thresholds(Limits(recovery=0.3))).rows
    assert row.verdict == "ok"
    (row,) = checked([answered("arc", right(0.5))], [answered("arc", then)]).rows
    assert row.verdict == "FELL"
    assert row.recovery == pytest.approx(row.result.value_a / row.result.value_b)
    assert row.changed == sum(a != b for a, b in zip(right(0.5), then, strict=True))


def test_better_is_never_a_fall():
    report = checked(
        [answered("arc", right(0.9)), answered("drift", perplexities(0.8), up=False)],
        [answered("arc", right(0.5)), answered("drift", perplexities(1.0), up=False)],
    )
    assert [r.verdict for r in report.rows] == ["ok", "ok"]
    assert all(r.recovery > 1 for r in report.rows)


def test_where_lower_is_better_more_is_a_fall():
    (row,) = checked(
        [answered("drift", perplexities(1.05), up=False)], [answered("drift", perplexities(1.0), up=False)]
    ).rows
    assert row.verdict == "FELL"
    assert row.recovery == pytest.approx(1 / row.result.ratio, rel=1e-4)


def test_too_few_documents_fall_by_the_threshold_alone_and_say_so():
    (row,) = checked([answered("arc", right(0.5)[:5])], [answered("arc", [{"acc": 1.0}] * 5)]).rows
    assert row.verdict == "FELL"
    assert "by the threshold alone; not tested: 5 independent units, fewer than 6" in row.why
    (row,) = checked([answered("arc", [{"acc": 1.0}] * 5)], [answered("arc", [{"acc": 1.0}] * 5)]).rows
    assert row.verdict == "ok"


def test_p_is_adjusted_over_all_rows():
    then, now = right(0.9), right(0.75)
    (alone,) = checked([answered("arc", now)], [answered("arc", then)]).rows
    tasks = [f"t{i}" for i in range(20)]
    many = checked(
        [answered("arc", now), *(answered(t, then) for t in tasks)],
        [answered("arc", then), *(answered(t, then) for t in tasks)],
    ).rows
    assert many[0].p_holm == pytest.approx(min(1, 21 * alone.p_holm))


@pytest.mark.parametrize(("metric", "up", "now", "then", "expected"), [
    ("acc", True, 0.0, 0.0, None), ("acc", True, 0.5, 0.0, None), ("acc", True, 0.0, 0.5, 0.0),
    ("acc", True, 0.25, 0.25, 1.0), ("word_perplexity", False, 40.0, 20.0, 0.5),
    ("word_perplexity", False, math.inf, math.inf, 1.0), ("word_perplexity", False, math.inf, 20.0, 0.0),
    ("empty", False, 0.0, 0.0, None), ("empty", False, 0.2, 0.0, 0.0), ("score", True, -1.0, -2.0, None),
    ("gold_ll", True, -10.1, -10.0, math.exp(-0.1)), ("gold_ll", True, 0.0, -1000.0, math.inf),
])  # fmt: skip
def test_recovery_has_no_division_by_zero(metric, up, now, then, expected):
    assert recovery(Measure("t", metric, up, ("t",)), now, then) == (expected and pytest.approx(expected))


def test_a_baseline_of_zero_holds():
    (row,) = checked([answered("arc", [{"acc": 0.0}] * N)], [answered("arc", [{"acc": 0.0}] * N)]).rows
    assert (row.verdict, row.recovery) == ("ok", None)


def test_values_that_became_nan_fall():
    now = [{"rougeL": math.nan if i == 3 else 0.5} for i in range(N)]
    (row,) = checked([answered("s", now)], [answered("s", [{"rougeL": 0.5}] * N)]).rows
    assert row.verdict == "FELL"
    assert "not tested: values that are not finite" in row.why


def test_missing_cells_are_named_with_the_nearest():
    now = [answered("arc", right(0.5), limit=10)]
    report = checked(now, [answered("arc", right(0.5)), answered("arc", right(0.5), limit=10)])
    assert [r.verdict for r in report.rows] == ["missing", "ok"]
    assert "differ in limit None and 10" in report.rows[0].why
    assert report.headline == "FAILED: of 2 rows of baseline.json 1 missing"


def test_new_cells_and_other_versions_are_remarked():
    report = checked(
        [answered("arc", right(0.5), code="new"), answered("piqa", right(0.5))], [answered("arc", right(0.5))]
    )
    assert not report.bad
    assert report.notes[0] == "code: c0de then, new now."
    assert report.notes[1].startswith("Not in the baseline, so not checked: 1 of")


def test_quality_against_dense():
    then = [answered("arc", right(0.8), "dense", 0.0), answered("arc", right(0.6))]
    rows = checked(then, then).rows
    assert rows[0].of_dense == 1
    assert rows[1].of_dense == pytest.approx(rows[1].result.value_a / rows[0].result.value_a)
    rows = checked(then, then, Thresholds(Limits(of_dense=0.95))).rows
    assert [r.verdict for r in rows] == ["ok", "FELL"]
    assert "of dense" in rows[1].why
    with pytest.raises(UserError, match=r"no dense cell for arc; run with --method dense"):
        checked(then[1:], then[1:], Thresholds(Limits(of_dense=0.95)))


def test_other_documents_are_no_regression_but_wrong_input():
    lines = samples("arc", right(0.5), data="v2")
    with pytest.raises(UserError, match=r"documents differ.*renew the baseline with --update"):
        checked([answered("arc", right(0.5), lines=lines)], [answered("arc", right(0.5))])


# -- thresholds ----------------------------------------------------------------------------------------------------


def test_thresholds_are_read(tmp_path):
    file = tmp_path / "t.yaml"
    file.write_text(
        "recovery: 0.9\nalpha: 0.01\nof_dense: null\ntasks: {drift: {recovery: 0.5}, arc: {of_dense: 0.8}}\n"
    )
    found = thresholds_from(file)
    assert (found.alpha, found.of("piqa")) == (0.01, Limits(0.9, None))
    assert (found.of("drift"), found.of("arc")) == (Limits(0.5, None), Limits(0.9, 0.8))
    file.write_text("")
    assert thresholds_from(file) == thresholds_from(None) == Thresholds()


@pytest.mark.parametrize(("text", "words"), [
    ("recovry: 0.9", "unknown key 'recovry' in .*; did you mean recovery"),
    ("recovery: 98", "recovery 98 in .* must lie above 0 and at most at 1"),
    ("recovery: null", "recovery None"),
    ("recovery: yes", "recovery True"),
    ("alpha: 0", "alpha 0 in .* between 0 and 1"),
    ("tasks: {arc: {alpha: 0.1}}", "unknown key 'alpha' in .* for arc"),
    ("tasks: [arc]", "must hold keys and values"),
    ("- 1", "must hold keys and values"),
    ("a: [", "cannot be read"),
])  # fmt: skip
def test_wrong_thresholds_are_refused(tmp_path, text, words):
    file = tmp_path / "t.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=words):
        thresholds_from(file)


def test_thresholds_of_an_unknown_task_are_refused():
    with pytest.raises(UserError, match=r"thresholds name task 'acr'; did you mean arc"):
        checked([answered("arc", right(0.5))], [answered("arc", right(0.5))], Thresholds(tasks={"acr": Limits()}))


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
        report = check(outcomes.cells(results), baseline.read(reference), Thresholds(), "b")
        assert {(r.metric, r.verdict, r.changed, r.recovery) for r in report.rows} == {
            ("acc", "ok", 0, 1.0), ("gold_ll", "ok", 0, 1.0), ("word_perplexity", "ok", 0, 1.0),
        }  # fmt: skip
        assert all(r.result.difference == 0 for r in report.rows)


def test_values_that_are_not_finite_make_no_baseline(tmp_path, cli):
    out = save(tmp_path / "out", answered("s", [{"rougeL": math.nan}] * N))
    found = cli(out, "--baseline", tmp_path / "b.json", "--update")
    assert "values that are not finite" in str(found.exception)
    assert not (tmp_path / "b.json").exists()


@pytest.mark.parametrize("text", [
    "", "[]", "{}", '{"schema": 2, "cells": []}', '{"schema": 1, "cells": []}',
    '{"schema": 1, "cells": [{"inputs": {}}]}', '{"schema": 1, "cells": [3]}',
])  # fmt: skip
def test_what_is_no_baseline_is_refused(results, tmp_path, cli, text):
    file = tmp_path / "b.json"
    file.write_text(text)
    found = cli(results, "--baseline", file)
    assert isinstance(found.exception, UserError)
    assert f"dart-eval check RESULTS --baseline {file} --update" in found.exception.remedy


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
    assert lines[0] == f"### FAILED: of 5 rows of {file} 1 fell, 2 missing"
    assert sum("| FELL" in line for line in lines) == 1
    assert sum("| missing" in line for line in lines) == 2
    assert not any("| ok" in line for line in lines)
    assert "2 rows are ok, recovery 1.0000 to 1.0000." in found.stdout
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
    monkeypatch.delenv("GITHUB_STEP_SUMMARY")
    assert "GITHUB_STEP_SUMMARY, which is not set" in str(cli(now, "--baseline", file, "--github").exception)


def test_annotations_are_escaped():
    report = checked([], [answered("a,b:c%\nd", right(0.5))])
    (line,) = workflow_commands(report)
    assert line.startswith("::error title=missing a%2Cb%3Ac%25 d acc::")
    assert "\n" not in line


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
    (("--format", "csv"), "unknown format 'csv'"),
    (("--update", "--all"), "--update only writes the baseline"),
    (("--thresholds", "none.yaml"), "thresholds none.yaml cannot be read"),
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
    thresholds, workflow = (block.partition("```")[0] for block in text.split("```yaml\n")[1:])
    (tmp_path / "t.yaml").write_text(thresholds)
    assert thresholds_from(tmp_path / "t.yaml") == Thresholds(tasks={"smoke_drift": Limits(recovery=0.95)})
    steps = yaml.safe_load(workflow)["jobs"]["regression"]["steps"]
    (line,) = (s["run"] for s in steps if "dart-eval check" in s.get("run", ""))
    options = inspect.signature(command.check).parameters.keys()
    assert {w.removeprefix("--") for w in line.split() if w.startswith("--")} <= options
