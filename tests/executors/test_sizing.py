"""Shards of a cell."""

import pytest

from dart_eval.evaluation.shard import WHOLE, Shard
from dart_eval.models.loading import resolve
from dart_eval.results.journal import Journal
from dart_eval.sweep import jobs
from dart_eval.sweep.config import config_from
from dart_eval.sweep.worker import Worker


def _config(folder, output, **changes):
    sweep = {"tasks": "smoke_questions,smoke_summary,smoke_stories", "method": "dense,dart", "limit": 5}
    return config_from(None, {**sweep, "model": str(folder), "output": str(output), "batch_size": 2, **changes})


def test_parts_cover_every_unit_once():
    for total in (0, 1, 5, 17):
        for count in (1, 2, 4, 30):
            taken = [n for i in range(count) for n in range(total) if Shard(i, count).takes(n)]
            assert sorted(taken) == list(range(total))
    assert WHOLE.unsharded and not Shard(0, 2).unsharded


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
        assert 0 < half < len(journal)
        merged, _ = worker.run(job, journal)
        whole, _ = worker.run(job, plain)
        assert plain == journal
        assert merged.samples == whole.samples and merged.metrics == whole.metrics
