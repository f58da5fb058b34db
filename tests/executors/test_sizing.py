"""What a sweep will take: counted as the run counts it, and held against it afterwards."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dart_eval.evaluation.part import WHOLE, Call, Part, Pilot
from dart_eval.executors import jobs, sizing
from dart_eval.executors.sizing import CellSize, duration, held_against, keep
from dart_eval.executors.worker import Worker
from dart_eval.models import resolve
from dart_eval.plan import config_from
from dart_eval.results.journal import Journal
from tests.helpers.commands import run_local
from tests.helpers.models import save_tiny

PROGRAM = str(Path(sys.executable).with_name("dart-eval"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-llama", tokenizer)


def _config(folder, output, **changes):
    sweep = {"tasks": "smoke_questions,smoke_summary,smoke_stories", "method": "dense,dart", "limit": 5}
    return config_from(None, {**sweep, "model": str(folder), "output": str(output), "batch_size": 2, **changes})


def test_parts_cover_every_unit_once():
    for total in (0, 1, 5, 17):
        for count in (1, 2, 4, 30):
            taken = [n for i in range(count) for n in range(total) if Part(i, count).takes(n, 0, 0)]
            assert sorted(taken) == list(range(total))
    assert WHOLE.whole and not Part(0, 2).whole and not Pilot().whole


@pytest.mark.parametrize(
    ("total", "places"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (9, [0, 3, 7]), (101, [0, 26, 76])]
)
def test_a_pilot_takes_the_largest_unit_and_some_of_the_others(total, places):
    assert [n for n in range(total) if Pilot().takes(n + 1000, n, total)] == places


def test_extrapolation():
    sizes = [100, 50, 50, 20, 20, 10]
    call = Call("loglikelihood", 6, sizes, 0, {0: 9.0, 2: 5.0, 4: 2.0})
    assert sizing._extrapolated(call) == 9 + 150 * 7 / 70
    assert sizing._extrapolated(Call("loglikelihood", 1, [5], 5, {0: 2.0})) == 2
    assert sizing._extrapolated(Call("loglikelihood", 0, [], 0)) == 0


@pytest.mark.slow
def test_the_plan_counts_what_the_run_asks(folder, tmp_path, monkeypatch):
    config = _config(folder, tmp_path / "out")
    sizes = sizing.estimate([config], jobs.Silent())
    assert not (tmp_path / "out").exists()
    calls, answer = {}, Worker.run

    def run(self, job, journal, shrink=0):
        done = answer(self, job, journal, shrink)
        calls[job.cell.key] = self.lm.calls
        return done

    monkeypatch.setattr(Worker, "run", run)
    result = run_local(config, jobs.Silent())
    assert [s.key for s in sizes] == [r.key for r in result.records]
    for size in sizes:
        made = calls[size.key]
        assert size.requests == sum(c.requests for c in made) > 0
        assert all(len(c.seconds) == len(c.sizes) for c in made)
        # Dense, a context's last token runs with the context; pruned, with each answer: the plan counts it once.
        assert size.tokens == sum(c.tokens for c in made) > 0
        assert size.flops > 0 and size.memory > 0 and size.seconds > 0
        assert not size.finished
    again = sizing.estimate([config], jobs.Silent())
    assert all(s.finished for s in again)


@pytest.mark.slow
def test_what_a_method_takes_more_is_measured_once_for_each_kind_of_request(folder, tmp_path, monkeypatch):
    tried, pilot = [], sizing._pilot

    def slow(worker, job, ending=0.0):
        found = pilot(worker, job, ending)
        tried.append(f"{job.cell.task} {job.cell.method.name}")
        for call in found.calls:  # a second a unit; three under a method
            call.seconds = dict.fromkeys(call.seconds, 3.0 if job.cell.method.prunes else 1.0)
        return dataclasses.replace(found, beside=0.5)

    monkeypatch.setattr(sizing, "_pilot", slow)
    config = _config(folder, tmp_path / "out", tasks="smoke_questions,smoke_drift,smoke_summary", sparsity="0.5,0.7")
    sizes = sizing.estimate([config], jobs.Silent())
    assert tried.count("smoke_questions dart") == tried.count("smoke_summary dart") == 1
    assert [t for t in tried if t.endswith("dense")] == [
        f"{t} dense" for t in dict.fromkeys(s.title.split()[0] for s in sizes)
    ]
    by_title = {s.title: s.seconds for s in sizes}
    dense, dart = by_title["smoke_questions dense"], by_title["smoke_questions dart 0.7"]
    assert (dart - 0.5) / (dense - 0.5) == pytest.approx(3)


def test_a_part_answers_its_share_and_all_parts_everything(folder, tmp_path):
    """Parts 0 and 1 of 2, then the whole, which asks nothing more."""
    config = _config(folder, tmp_path / "out", method="dart", tasks="smoke_questions,smoke_summary")
    found, _ = jobs.plan_all([config], jobs.Silent(), False)
    worker = Worker(config, resolve(config.model_spec))
    for job in found.values():
        journal, plain = Journal(), Journal()
        worker.answer(job, journal, Part(0, 2))
        half = len(journal)
        worker.answer(job, journal, Part(1, 2))
        assert 0 < half < len(journal) == sum(c.requests for c in worker.lm.calls)
        merged, _ = worker.run(job, journal)
        assert all(not c.seconds for c in worker.lm.calls)
        whole, _ = worker.run(job, plain)
        assert plain.answers() == journal.answers()
        assert merged.samples == whole.samples and merged.metrics == whole.metrics


def test_a_plan_is_held_against_the_run(folder, tmp_path):
    result = run_local(_config(folder, tmp_path / "out", tasks="smoke_questions"), jobs.Silent())
    assert held_against(tmp_path / "out", result.records) is None
    sizes = [
        CellSize(r.key, r.key, f"cell {i}", 1, 1, 1.0, 1, 2 * r.seconds, False) for i, r in enumerate(result.records)
    ]
    keep(tmp_path / "out", [*sizes, CellSize("other", "other", "other", 1, 1, 1.0, 1, 999.0, False)], 1)
    line = held_against(tmp_path / "out", result.records)
    assert re.fullmatch(
        r"planned .* of work for 2 cells, took .* \(-50 %\); furthest off: cell [01], .* instead of .*", line
    )
    (tmp_path / "out" / "plan.json").write_text("{")
    assert held_against(tmp_path / "out", result.records) is None


def test_durations():
    assert [duration(s) for s in (3.4, 89, 100, 5000, 9000)] == ["3 s", "89 s", "2 min", "83 min", "2.5 h"]


@pytest.mark.process
@pytest.mark.slow
def test_at_a_terminal(folder, tmp_path):
    command = [PROGRAM, "run", "--model", str(folder), "--tasks", "smoke_questions", "--method", "dense,dart",
               "--limit", "4", "--output", str(tmp_path / "out")]  # fmt: skip
    planned = subprocess.run([*command, "--plan"], capture_output=True, text=True, check=True)
    assert "smoke_questions dart 0.5" in planned.stdout and "2 to run" in planned.stdout
    assert not (tmp_path / "out" / "cells").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search(r"planned .* of work for 2 cells, took", done.stdout)
