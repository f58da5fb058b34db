"""What a sweep will take: counted as the run counts it, and held against it afterwards."""

import json
import re

import pytest

from dart_eval.evaluation.shard import WHOLE, Call, Pilot, Shard
from dart_eval.models.loading import resolve
from dart_eval.results.journal import Journal
from dart_eval.sweep import jobs, sizing
from dart_eval.sweep.config import config_from
from dart_eval.sweep.sizing import CellSize, duration, held_against, keep
from dart_eval.sweep.worker import Worker
from dart_eval.util.errors import UserError
from tests.helpers.commands import command, run_local


def _config(folder, output, **changes):
    sweep = {"tasks": "smoke_questions,smoke_summary,smoke_stories", "method": "dense,dart", "limit": 5}
    return config_from(None, {**sweep, "model": str(folder), "output": str(output), "batch_size": 2, **changes})


def test_parts_cover_every_unit_once():
    for total in (0, 1, 5, 17):
        for count in (1, 2, 4, 30):
            taken = [n for i in range(count) for n in range(total) if Shard(i, count).takes(n, 0, 0)]
            assert sorted(taken) == list(range(total))
    assert WHOLE.unsharded and not Shard(0, 2).unsharded and not Pilot().unsharded


@pytest.mark.parametrize(
    ("total", "places"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (9, [0, 3, 7]), (101, [0, 26, 76])]
)
def test_a_pilot_takes_the_largest_unit_and_some_of_the_others(total, places):
    assert [n for n in range(total) if Pilot().takes(n + 1000, n, total)] == places


def test_extrapolation():
    """The formula alone: what is public adds measured times to it, which no test can know."""
    sizes = [100, 50, 50, 20, 20, 10]
    call = Call("loglikelihood", 6, sizes, 0, {0: 9.0, 2: 5.0, 4: 2.0})
    assert sizing._extrapolated(call) == 9 + 150 * 7 / 70
    assert sizing._extrapolated(Call("loglikelihood", 1, [5], 5, {0: 2.0})) == 2
    assert sizing._extrapolated(Call("loglikelihood", 0, [], 0)) == 0


@pytest.mark.slow
def test_the_plan_counts_what_the_run_asks(saved_llama, tmp_path, monkeypatch):
    config = _config(saved_llama, tmp_path / "out")
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
def test_what_a_method_takes_more_is_measured_once_for_each_kind_of_request(saved_llama, tmp_path, monkeypatch):
    tried, answer = [], Worker.answer
    seconds = {"dense": 1.0, "griffin": 2.0, "dart": 4.0}  # a unit

    def slow(self, job, *args):
        answer(self, job, *args)
        tried.append(f"{job.cell.task} {job.cell.method.name}")
        for call in self.lm.calls:
            call.seconds = dict.fromkeys(call.seconds, seconds[job.cell.method.name])

    monkeypatch.setattr(Worker, "answer", slow)
    tasks = ("smoke_questions", "smoke_drift", "smoke_summary")
    config = _config(
        saved_llama, tmp_path / "out", tasks=",".join(tasks), method="dense,griffin,dart", sparsity="0.5,0.7"
    )
    by_title = {s.title: s.seconds for s in sizing.estimate([config], jobs.Silent())}
    assert sorted(t for t in tried if t.endswith("dense")) == sorted(f"{t} dense" for t in tasks)
    for task in ("smoke_questions", "smoke_summary"):
        assert tried.count(f"{task} griffin") == tried.count(f"{task} dart") == 1
    for task in tasks:  # what a cell takes beside its units is the same under all methods
        dense, *pruned = (by_title[f"{task} {m}"] for m in ("dense", "griffin 50 %", "griffin 70 %", "dart 70 %"))
        assert [(p - dense) / (pruned[0] - dense) for p in pruned] == pytest.approx([1, 1, 3])


@pytest.mark.slow
def test_a_part_answers_its_share_and_all_parts_everything(saved_llama, tmp_path):
    """Parts 0 and 1 of 2, then the whole, which asks nothing more."""
    config = _config(saved_llama, tmp_path / "out", method="dart", tasks="smoke_questions,smoke_summary")
    found, _ = jobs.plan_all([config], jobs.Silent(), False)
    worker = Worker(config, resolve(config.model_spec))
    for job in found.values():
        journal, plain = Journal(), Journal()
        worker.answer(job, journal, Shard(0, 2))
        half = len(journal)
        worker.answer(job, journal, Shard(1, 2))
        assert 0 < half < len(journal) == sum(c.requests for c in worker.lm.calls)
        merged, _ = worker.run(job, journal)
        assert all(not c.seconds for c in worker.lm.calls)
        whole, _ = worker.run(job, plain)
        assert plain == journal
        assert merged.samples == whole.samples and merged.metrics == whole.metrics


def test_a_plan_is_held_against_the_run(saved_llama, tmp_path):
    result = run_local(_config(saved_llama, tmp_path / "out", tasks="smoke_questions"), jobs.Silent())
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


def test_a_cell_that_cannot_be_tried_is_named_in_a_line(saved_llama, tmp_path, monkeypatch):
    def broken(*_):
        raise ValueError("no judge")

    monkeypatch.setattr(Worker, "run", broken)
    with pytest.raises(UserError, match=r"questions dense cannot be tried \(ValueError: no judge\); leave it out"):
        sizing.estimate([_config(saved_llama, tmp_path, tasks="smoke_questions")], jobs.Silent())


def test_durations():
    assert [duration(s) for s in (3.4, 89, 100, 5000, 9000)] == ["3 s", "89 s", "2 min", "83 min", "2.5 h"]


@pytest.mark.process
@pytest.mark.slow
def test_a_plan_at_the_command_line_and_the_run_that_follows_it(saved_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("run", "--model", saved_llama, "--tasks", "smoke_questions", "--method", "dense,dart", "--limit", 4)
    planned = command(*words, "--output", "out", "--plan")
    assert planned.code == 0
    assert "smoke_questions dart 50 %" in planned.out and "2 to run" in planned.out
    assert not (tmp_path / "out" / "cells").exists()
    cells = json.loads(command(*words, "--output", "out", "--plan", "--format", "json").out)
    assert [(c["title"], c["requests"]) for c in cells] == [
        ("smoke_questions dense", 5),
        ("smoke_questions dart 50 %", 5),
    ]
    done = command(*words, "--output", "out")
    assert done.code == 0
    assert re.search(r"planned .* of work for 2 cells, took", done.err)
