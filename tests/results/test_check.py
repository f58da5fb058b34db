"""`dart-eval check`: regressions are caught, noise is not; verdicts, thresholds, the baseline file, and the command."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats

from dart_eval.pruning.methods.griffin import Griffin
from dart_eval.results import check as checks
from dart_eval.results.check import FELL, Limits, Thresholds, bad, check, recovery, thresholds_from
from dart_eval.results.documents import answers_of
from dart_eval.results.frame import Cell, cells
from dart_eval.results.record import Metric
from dart_eval.sweep.events import silent
from dart_eval.sweep.options import config_from
from dart_eval.util.errors import UserError
from tests.helpers.commands import command, run_local
from tests.helpers.models import tiny
from tests.helpers.records import N, answered, choosing, digest, perplexities, right, samples, save


def cell(record):
    """A record as a cell, without files."""
    answers = answers_of(record.metrics, record.samples)
    return Cell(record.key, record.inputs, "results", record.created, lambda: answers)


def checked(now, then, thresholds=None):
    return check([cell(r) for r in now], [cell(r) for r in then], thresholds or Thresholds(), "baseline.json")


def checked_row(now, then, thresholds=None, task="arc", up=True):
    """The only row of a check of one task: the values of its documents now and then."""
    (row,) = checked([answered(task, now, up=up)], [answered(task, then, up=up)], thresholds).rows
    return row


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


@pytest.mark.slow
def test_noise_alone_is_no_regression():
    """60 pairs of runs, documents redrawn: at most the stated 5 % may fail (binomial bound, 1 in 1000)."""
    drawn = [np.random.default_rng(seed) for seed in range(60)]
    alarms = sum(bool(bad(checked(noisy_run(generator), noisy_run(generator)))) for generator in drawn)
    assert alarms <= scipy_stats.binom.ppf(0.999, 60, 0.05)


@pytest.mark.slow
def test_a_real_fall_is_found():
    generator = np.random.default_rng(1)
    found = 0
    for _ in range(6):
        report = checked(noisy_run(generator, fall=0.25), noisy_run(generator))
        found += {r["metric"] for r in bad(report)} == {"acc", "gold_ll", "word_perplexity"}
    assert found >= 5


def test_a_row_falls_only_with_too_much_lost_and_beyond_noise():
    then, now = right(0.9), right(0.5)
    slightly = [{"acc": v["acc"] if i else 0.0} for i, v in enumerate(then)]
    row = checked_row(slightly, then, Thresholds(recovery=0.999))
    assert row["verdict"] == "ok" and "within noise" in row["why"]
    assert checked_row(now, then, Thresholds(recovery=0.3))["verdict"] == "ok"
    row = checked_row(now, then)
    assert (row["verdict"], row["recovery"]) == (FELL, pytest.approx(row["now"] / row["then"]))
    assert row["changed"] == sum(a != b for a, b in zip(now, then, strict=True))
    assert checked_row(then, now)["verdict"] == "ok" and checked_row(then, now)["recovery"] > 1


def test_where_lower_is_better_more_is_a_fall():
    row = checked_row(perplexities(1.05), perplexities(1.0), task="drift", up=False)
    assert (row["verdict"], row["recovery"]) == (FELL, pytest.approx(1 / row["ratio"], rel=1e-4))
    row = checked_row(perplexities(0.8), perplexities(1.0), task="drift", up=False)
    assert row["verdict"] == "ok" and row["recovery"] > 1


@pytest.mark.parametrize(("metric", "then", "now", "verdict", "why"), [
    ("acc", [1.0] * 5, [v["acc"] for v in right(0.5)[:5]], FELL, "not tested: 5 independent units"),
    ("acc", [1.0] * 5, [1.0] * 5, "ok", ""), ("acc", [0.0] * N, [0.0] * N, "ok", ""),  # a baseline of zero holds
    ("rougeL", [0.5] * N, [0.5] * 3 + [math.nan] + [0.5] * (N - 4), FELL, "not finite"),
    # A negative score that no test decides is held against the threshold.
    ("score", [-1.0] * 5, [-50.0] * 5, FELL, ""), ("score", [0.5] * 5, [-0.5] * 5, FELL, ""),
    ("score", [-1.0] * 5, [-1.001] * 5, "ok", ""), ("score", [-50.0] * 5, [-1.0] * 5, "ok", ""),
    ("score", [-1.0] * 5, [-1.0] * 5, "ok", ""),
])  # fmt: skip
def test_what_no_test_decides_falls_by_the_threshold_alone(metric, then, now, verdict, why):
    row = checked_row(*([{metric: v} for v in side] for side in (now, then)))
    assert row["verdict"] == verdict and why in row["why"]


def test_p_is_adjusted_over_all_rows():
    then, now = right(0.9), right(0.75)
    tasks = [f"t{i}" for i in range(5)]
    many = checked(
        [answered("arc", now), *(answered(t, then) for t in tasks)],
        [answered("arc", then), *(answered(t, then) for t in tasks)],
    ).rows
    assert many[0]["p_holm"] == pytest.approx(min(1, 6 * checked_row(now, then)["p_holm"]))


@pytest.mark.parametrize(("metric", "up", "now", "then", "expected"), [
    ("acc", True, 0.0, 0.0, None), ("acc", True, 0.5, 0.0, None), ("acc", True, 0.0, 0.5, 0.0),
    ("acc", True, 0.25, 0.25, 1.0), ("word_perplexity", False, 40.0, 20.0, 0.5),
    ("word_perplexity", False, math.inf, math.inf, 1.0), ("word_perplexity", False, math.inf, 20.0, 0.0),
    ("empty", False, 0.0, 0.0, None), ("empty", False, 0.2, 0.0, 0.0), ("score", True, -1.0, -2.0, None),
    ("gold_ll", True, -10.1, -10.0, math.exp(-0.1)), ("gold_ll", True, 0.0, -1000.0, math.inf),
])  # fmt: skip
def test_recovery_has_no_division_by_zero(metric, up, now, then, expected):
    test = SimpleNamespace(value_a=now, value_b=then)
    one = SimpleNamespace(metric=Metric("t", metric, now, None, 1, up), test=test, chance=0.0)
    assert recovery(one, tested=True) == (expected and pytest.approx(expected))


def test_missing_cells_fall_and_new_ones_and_other_versions_are_remarked():
    now = [answered("arc", right(0.5), limit=10, code="new"), answered("piqa", right(0.5))]
    report = checked(now, [answered("arc", right(0.5)), answered("arc", right(0.5), limit=10)])
    assert [(r["verdict"], r["why"]) for r in report.rows] == [("missing", "not in the results"), ("ok", "")]
    assert len(bad(report)) == 1 and "c0de then, new now" in report.notes[0] and "1 of" in report.notes[1]


def test_other_documents_are_no_regression_but_wrong_input():
    lines = samples("arc", right(0.5), data="v2")
    with pytest.raises(UserError, match="documents"):
        checked([answered("arc", right(0.5), lines=lines)], [answered("arc", right(0.5))])


def test_a_baseline_that_checks_nothing_is_no_gate():
    """Matthews' correlation needs all documents: no test can be made of it, and -1 is no 1."""
    whole = [{"mcc": [i % 2, i % 2]} for i in range(40)]
    cola = answered("cola", whole, metrics=[Metric("cola", "mcc", 1.0, None, 40, True)])
    with pytest.raises(UserError, match="no metric"):
        checked([cola], [cola])
    report = checked([cola, answered("arc", right(0.5))], [cola, answered("arc", right(0.5))])
    assert not bad(report) and any("cola" in note for note in report.notes)


def test_many_rows_that_all_fell_do_not_hold():
    """p of resamples is at least 1 / 10 001, which Holm multiplies by the number of rows."""
    rows, alpha = 11, 0.001
    then = [answered(f"t{i}", perplexities(1.0, seed=i % 5), up=False) for i in range(rows)]
    now = [answered(f"t{i}", perplexities(3.0, seed=i % 5), up=False) for i in range(rows)]
    assert {r["verdict"] for r in checked(now, then, Thresholds(alpha=alpha)).rows} == {FELL}


def test_a_baselines_metric_is_checked_though_another_has_become_the_main_one():
    both = [{"acc": v["acc"], "acc_norm": w["acc"]} for v, w in zip(right(0.9), right(0.8), strict=True)]
    then = answered("arc", [{"acc_norm": v["acc_norm"]} for v in both])
    (row,) = checked([answered("arc", both, code="new")], [then]).rows
    assert (row["metric"], row["verdict"], row["changed"]) == ("acc_norm", "ok", 0)


@pytest.mark.parametrize(("documents", "rows"), [(6, 4), (8, 13), pytest.param(10, 52, marks=pytest.mark.slow)])
def test_a_loss_of_every_answer_falls_however_many_rows_there_are(documents, rows):
    """The smallest p of an exact test is 2^-n, which Holm multiplies by the number of rows."""
    then, now = ([answered(f"t{i}", [{"exact_match": v}] * documents) for i in range(rows)] for v in (1.0, 0.0))
    found = checked(now, then)
    assert {r["verdict"] for r in found.rows} == {FELL}
    assert f"not tested: {documents} independent units" in found.rows[0]["why"]
    assert not bad(checked(then, then))


@pytest.mark.parametrize("rows", [1, 8])
def test_the_least_fall_that_a_check_names_is_the_least_that_falls(rows):
    def found(wrong):
        then, now = ([answered(f"t{i}", [{"exact_match": float(d >= lost)} for d in range(40)]) for i in range(rows)]
                     for lost in (0, wrong))  # fmt: skip
        return checked([*now[:1], *then[1:]], then)

    (text,) = checks.least_falls(found(1))
    wrong = int(re.search(r"(\d+) answers", text)[1])
    assert f"{100 * wrong / 40:.1f} points at n = 40" in text
    assert [len(bad(found(n))) for n in (wrong - 1, wrong)] == [0, 1]


def test_a_loss_that_is_left_untested_has_the_threshold():
    """Eight answers do not show that a baseline is above guessing, and seven tasks leave them no test either."""
    sides = []
    for good in (0, 5):
        values = [{"acc": float(i < good), "gold_ll": -1.0} for i in range(8)]
        sides.append([choosing(answered(f"t{i}", values)) for i in range(7)])
    acc = [r for r in checked(*sides).rows if r["metric"] == "acc"]
    assert {r["verdict"] for r in acc} == {FELL} and all("not tested" in r["why"] for r in acc)
    scores = ([answered(f"t{i}", [{"score": v}] * 6) for i in range(4)] for v in (-0.5, 0.5))
    assert {r["verdict"] for r in checked(*scores).rows} == {FELL}
    now, then = ([choosing(answered("arc", [{"acc": v}] * 5))] for v in (0.0, 1.0))  # of four choices
    (row, *_) = checked(now, then, Thresholds()).rows
    assert (row["verdict"], row["recovery"]) == (FELL, pytest.approx(-1 / 3))


@pytest.mark.parametrize(("text", "expected"), [
    ("recovery: 0.9\nalpha: 0.01\ntasks: {drift: {recovery: 0.5}}\n",
     Thresholds(recovery=0.9, alpha=0.01, tasks={"drift": Limits(recovery=0.5)})),
    *((text, Thresholds()) for text in ("", "{}", "null", "# nothing", None)),
])  # fmt: skip
def test_thresholds_are_read(tmp_path, text, expected):
    if text is not None:
        (tmp_path / "t.yaml").write_text(text)
    assert thresholds_from(None if text is None else tmp_path / "t.yaml") == expected


@pytest.mark.parametrize(("text", "word"), [
    ("recovry: 0.9", "recovry"), ("recovery: 98", "recovery"), ("recovery: null", "recovery"),
    ("recovery: yes", "recovery"), ("recovery: .nan", "recovery"), ("recovery: [1]", "recovery"), ("alpha: 0", "alpha"),
    ("alpha: {a: 1}", "alpha"), ("tasks: {arc: {alpha: 0.1}}", "alpha"), ("tasks: {arc: [1]}", "arc"),
    ("tasks: [arc]", "tasks"), ("{1: 2}", "1"), ("- 1", "keys"), ("a: [", "YAML"),
    ("alpha: 0.1\nalpha: 0.2", "twice"), ("!!timestamp x: 1", "YAML"), ("recovery: !!timestamp x", "YAML"),
    ("recovery: 2001-01-01", "recovery"), (f"recovery: {9**99}", "recovery"), ("[]", "keys"), ("0", "keys"),
    ("''", "keys"), ("recovery: 2024-99-99", "YAML"), ("[" * 600 + "]" * 600, "YAML"),
])  # fmt: skip
def test_wrong_thresholds_are_refused(tmp_path, text, word):
    file = tmp_path / "t.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=word) as refused:
        thresholds_from(file)
    assert str(file) in refused.value.problem and len(str(refused.value)) < 400


@pytest.mark.parametrize("task", ["acr", "piqa"])
def test_thresholds_of_a_task_that_the_baseline_lacks_are_refused(task):
    now = [answered("arc", right(0.5)), answered("piqa", right(0.5))]
    with pytest.raises(UserError, match=task):
        checked(now, now[:1], Thresholds(tasks={task: Limits()}))


@pytest.fixture
def results(tmp_path):
    values = [{**v, "gold_ll": -1 / 3 - i, "acc_norm": 1.0} for i, v in enumerate(right(0.8))]
    return save(
        tmp_path / "out", answered("arc", values), answered("drift", perplexities(1.0), up=False),
        answered("arc", values, "dense", 0.0),
    )  # fmt: skip


@pytest.fixture
def file(results, tmp_path):
    """The baseline of `results`."""
    checks.write_baseline(tmp_path / "b.json", cells(results))
    return tmp_path / "b.json"


def test_a_baseline_is_stable_and_says_what_the_folder_says(results, file):
    first = file.read_text()
    lines = [line for line in first.splitlines() if line.startswith('["arc", 3,')]
    short = digest("arc 3 v1")[:8], digest("prompt arc 3 v1")[:8]
    assert lines == [
        f'["arc", 3, "none", "{short[0]}", "{short[1]}", null, {{"acc": 1, "gold_ll": -3.333333}}],'
    ] * 2  # fmt: skip
    save(results, answered("drift", perplexities(1.0), up=False, created="2027-01-01"))  # the same again, later
    assert command("check", results, "--baseline", file, "--update").code == 0
    assert file.read_text() == first
    for reference in (file, results):
        report = check(cells(results), checks.load_baseline(reference), Thresholds(), "b")
        assert {(r["metric"], r["verdict"], r["changed"], r["recovery"], r["difference"]) for r in report.rows} == {
            (metric, "ok", 0, 1.0, 0) for metric in ("acc", "gold_ll", "word_perplexity")
        }


def test_values_that_are_not_finite_make_no_baseline(tmp_path):
    out = save(tmp_path / "out", answered("s", [{"rougeL": math.nan}] * N))
    done = command("check", out, "--baseline", tmp_path / "b.json", "--update")
    assert done.code == 2 and not (tmp_path / "b.json").exists()


def test_a_baseline_of_an_earlier_version_with_bleu_is_read_and_says_that_it_is_not_checked(results, file):
    data = json.loads(file.read_text())
    for cell in data["cells"]:
        if cell["inputs"]["method"] == "dense":
            cell["measures"] = [["arc", "bleu", True, ["arc"], False]]
            cell["documents"] = [[*line[:-1], {"bleu": [9] * 10}] for line in cell["documents"]]
    file.write_text(json.dumps(data))
    found = command("check", results, "--baseline", file)
    assert found.code == 0 and "Not checked: dense" in found.out


def test_a_fall_and_missing_rows_are_the_exit_code_and_in_every_report(file, tmp_path, monkeypatch):
    """One row fell, two are missing, two are ok: annotations of GitHub, its summary, JSON, and JUnit's XML."""
    values = [{**v, "gold_ll": -1 / 3 - i} for i, v in enumerate(right(0.4))]
    now = save(tmp_path / "now", answered("arc", values), answered("drift", perplexities(1.0), up=False))
    summary, report = tmp_path / "summary.md", tmp_path / "reports" / "junit.xml"
    words = ("check", now, "--baseline", file)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    assert command(*words, "--github").code == 2
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    found = command(*words, "--github", "--junit", report)
    assert found.code == 1
    lines = [line for line in found.out.splitlines() if line.startswith("::error ")]
    assert len(lines) == 3 and sum("FELL arc acc" in line for line in lines) == 1
    assert summary.read_text().startswith("before\n#")
    data = json.loads(command(*words, "--github", "--format", "json").out)
    verdicts = [row["verdict"] for row in data["rows"]]
    assert (data["verdict"], sorted(verdicts)) == ("FELL", ["FELL", "missing", "missing", "ok", "ok"])
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert (suite.get("tests"), suite.get("failures")) == ("5", "3")
    failures = [c.find("failure") for c in suite.iter("testcase") if c.find("failure") is not None]
    assert [f.get("type") for f in failures].count("FELL") == 1 and all(f.text for f in failures)
    assert {c.get("name") for c in suite.iter("testcase")} == {"arc acc", "arc gold_ll", "drift word_perplexity"}


@pytest.fixture(scope="module")
def taught(tmp_path_factory, tokenizer):
    """A tiny model whose FFNs, and nothing else, have learned what comes next: pruning the wrong neurons shows."""
    model = tiny("llama").float()
    model.config.max_position_embeddings = 1024
    optimiser = torch.optim.Adam([p for name, p in model.named_parameters() if "mlp" in name], lr=1e-2)
    text = torch.full((4, 32), 3)  # to this tokenizer every word of the smoke tasks is the unknown word
    text[:, 0] = 1
    for _ in range(40):
        optimiser.zero_grad()
        model(input_ids=text, labels=text).loss.backward()
        optimiser.step()
    path = tmp_path_factory.mktemp("models") / "taught"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.mark.slow
def test_a_planted_bug_fails_the_check_and_the_same_run_again_does_not(taught, tmp_path, monkeypatch):
    def run(name):
        config = config_from(None, {
            "model": taught, "output": str(tmp_path / name), "tasks": "smoke_drift,smoke_questions",
            "method": "dense,griffin", "sparsity": "0.5", "limit": 10,
        })  # fmt: skip
        assert not run_local(config, silent).failed
        return tmp_path / name

    file = tmp_path / "baseline.json"
    assert command("check", run("good"), "--baseline", file, "--update").code == 0
    again = command("check", run("again"), "--baseline", file)
    assert again.code == 0, again.out

    keep_best = Griffin.observe
    monkeypatch.setattr(Griffin, "observe", lambda *given: -keep_best(*given))  # keeps the lowest
    found = command("check", run("broken"), "--baseline", file, "--format", "json")
    assert found.code == 1
    rows = {(r["cell"], r["task"], r["metric"]): r for r in json.loads(found.out)["rows"]}
    fell = rows["griffin at 50 %", "smoke_drift", "word_perplexity"]
    assert fell["verdict"] == FELL and fell["recovery"] < 0.98 and fell["p_holm"] < 0.05
    assert {r["verdict"] for (name, *_), r in rows.items() if name == "dense"} == {"ok"}
    assert command("check", tmp_path / "broken", "--baseline", tmp_path / "good").code == 1  # a folder is one too
