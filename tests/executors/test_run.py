"""A whole run on a tiny saved model: records, resuming, failures, the Python surface."""

import dataclasses
import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaModel

import dart_eval
from dart_eval.pruning.registry import make
from dart_eval.results.store import Store
from dart_eval.sweep import run, worker
from dart_eval.sweep.options import RunConfig, config_from
from dart_eval.sweep.plan import Cell
from dart_eval.util.errors import UserError
from tests.helpers.commands import Watch, run_local

SWEEP = {"method": "dense,random,dart", "sparsity": "0.5,0.7", "tasks": "smoke_questions,smoke_summary", "limit": 3}


def _config(folder, output, **changes):
    return config_from(None, {**SWEEP, "model": folder, "output": str(output), **changes})


def _numbers(records):
    return [(r.inputs, r.metrics, r.tokens, r.effective_sparsity, r.remasks, r.flops) for r in records]


def test_a_sweep_and_its_records(saved_llama, tmp_path):
    view = Watch()
    result = run_local(_config(saved_llama, tmp_path / "out"), view)
    # dense once, the others at both sparsities, on both tasks
    assert len(result.records) == len(view.done) == 10
    assert not result.failed
    for record in result.records:
        sparsity = record.inputs["sparsity"]
        assert record.mask_sparsity == pytest.approx(sparsity)
        if record.inputs["task"] == "smoke_questions":
            assert record.effective_sparsity == pytest.approx(sparsity)
        else:
            assert (record.effective_sparsity < sparsity) == (sparsity > 0)
        assert record.weights_read == pytest.approx(1 - sparsity)
        assert all(m.n == 3 for m in record.metrics)
        assert record.memory["weights"] > 0
        assert record.measured["peak"] > record.memory["weights"]
        assert (record.memory["beside"] > record.memory["state"] > 0) == (sparsity > 0)
    names = {m.metric for r in result.records for m in r.metrics}
    distance = {"kl", "kl_p95", "kl_p99", "top1"}
    assert names == {"acc", "acc_norm", "rouge1", "rouge2", "rougeL", "bleu", "summary_words", "empty", *distance}
    lines = [json.loads(x) for f in (tmp_path / "out" / "samples").iterdir() for x in f.read_text().splitlines()]
    assert len(lines) == 30
    assert all(len(x["doc_hash"]) == len(x["prompt_hash"]) == 64 for x in lines)

    again = Watch()
    second = run_local(_config(saved_llama, tmp_path / "out"), again)
    assert again.done == []  # all skipped
    assert _numbers(second.records) == _numbers(result.records)


@pytest.mark.slow
def test_two_runs_give_the_same_numbers_at_any_batch_size(saved_llama, tmp_path):
    a, b, c = (
        run_local(_config(saved_llama, tmp_path / name, sparsity="0.5", batch_size=size), Watch())
        for name, size in (("a", 1), ("b", 1), ("c", 3))
    )
    assert _numbers(a.records) == _numbers(b.records)
    assert [r.key for r in a.records] == [r.key for r in c.records]
    for x, y in zip(a.records, c.records, strict=True):
        assert [m.value for m in x.metrics] == pytest.approx([m.value for m in y.metrics], abs=1e-4)


def test_a_failing_cell_does_not_stop_the_others(saved_llama, tmp_path, monkeypatch):
    evaluate = worker.evaluate_task

    def sometimes(lm, session, tasks, name, settings, journal):
        if session.prunes and session.method.name == "random" and session.sparsity == 0.5:
            raise RuntimeError("planted")
        return evaluate(lm, session, tasks, name, settings, journal)

    monkeypatch.setattr(worker, "evaluate_task", sometimes)
    view = Watch()
    result = run_local(_config(saved_llama, tmp_path / "out", tasks="smoke_questions"), view)
    ((name, error, where),) = view.broken
    assert (name, error) == ("smoke_questions-random-0.5", "RuntimeError: planted")
    assert where.parent == tmp_path / "out" / "failed" and "in sometimes" in where.read_text()
    assert len(result.records) == 4
    assert [c.name for c in result.failed] == ["smoke_questions-random-0.5"]
    monkeypatch.undo()
    after = Watch()
    assert not run_local(_config(saved_llama, tmp_path / "out", tasks="smoke_questions"), after).failed
    assert after.done == ["smoke_questions-random-0.5"]  # only what was missing
    assert not where.exists()


def test_under_force_earlier_answers_are_dropped(tmp_path):
    store, cell = Store(tmp_path), Cell(make("griffin"), 0.5, "t", {"task": "t"})
    for force, kept in ((False, {"a": [1.0, True]}), (True, {})):
        store.journal(cell.name, cell.key).add({"a": [1.0, True]}, 0, 1.0)
        cell = dataclasses.replace(cell, config=RunConfig(force=force))
        with run.Sweep(None, store, Watch()).claim(cell) as journal:
            assert dict(journal) == kept


def test_a_sparsity_out_of_a_methods_reach_is_left_out_with_a_word(saved_llama, tmp_path):
    """Two thirds of a gated FFN are all that can be left unread once gate has been read whole."""
    view = Watch()
    config = _config(saved_llama, tmp_path, method="griffin,cats", sparsity="0.5,0.7", tasks="smoke_questions")
    result = run_local(config, view)
    cells = [(r.inputs["method"], r.inputs["sparsity"]) for r in result.records]
    assert cells == [("griffin", 0.5), ("griffin", 0.7), ("cats", 0.5)]
    assert not result.failed and not view.broken
    (said,) = view.notes
    assert said.startswith("left out: cats at sparsity 0.7: cats reads 1 of the FFN's 3 matrices whole")
    assert "use a sparsity up to 0.66" in said
    view, others = Watch(), "grinqh,decdec,griffin"
    config = _config(saved_llama, tmp_path / "other", method=others, sparsity="0.3", tasks="smoke_questions")
    assert len(run_local(config, view).records) == 1 and not view.broken
    assert [note.split()[2] for note in view.notes] == others.split(",")[:2]
    alone = _config(saved_llama, tmp_path, method="cats", sparsity="0.7", tasks="smoke_questions")
    with pytest.raises(UserError, match=r"cats at sparsity 0\.7: cats reads 1 of the FFN.s 3 matrices"):
        run_local(alone, Watch())


def test_weights_are_not_rounded_twice_and_a_word_says_so(saved_llama, tmp_path):
    view = Watch()
    found = run_local(
        _config(saved_llama, tmp_path, method="rounding", ffn_bits="16,4,3", tasks="smoke_questions"), view
    )
    assert [r.inputs.get("ffn_bits") for r in found.records] == [None] and not found.failed
    for note, bits in zip(view.notes, (4, 3), strict=True):
        assert note.startswith(f"left out: rounding on {bits} bits at sparsity 0: what is rounded are 16-bit weights")


def test_a_run_says_what_it_makes_before_a_cell_has_answers(saved_llama, tmp_path):
    said = []

    class Told(Watch):
        def waits(self, text):
            said.append(text)

    changes = {"method": "dense,griffin,wanda-sp", "ffn_bits": "16,4", "tasks": "smoke_questions", "sparsity": "0.46"}
    run_local(_config(saved_llama, tmp_path, dtype="bfloat16", limit=1, **changes), Told())
    said = said[len(said) - said[::-1].index("looking at the model's layers") :]
    cells = ["running smoke_questions dense", "running smoke_questions griffin 46 %"]
    plus = ["calibrating wanda-sp", "running smoke_questions wanda-sp 46 %"]
    on4 = [f"{text} on 4-bit weights" if text.startswith("running") else text for text in (*cells, *plus)]
    assert said == [
        cells[0], "rounding the FFN weights to 4 bits", on4[0], "preparing griffin",
        cells[1], "preparing griffin", on4[1], *plus, *on4[2:],
    ]  # fmt: skip


def test_an_interrupt_keeps_finished_cells_and_nothing_half_written(saved_llama, tmp_path, monkeypatch):
    evaluate, calls = worker.evaluate_task, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(worker, "evaluate_task", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_local(_config(saved_llama, tmp_path / "out", tasks="smoke_questions"), Watch())
    files = [f for kind in ("cells", "samples") for f in (tmp_path / "out" / kind).iterdir()]
    assert sorted(f.suffix for f in files) == [".json", ".json", ".jsonl", ".jsonl"]
    assert all(json.loads(f.read_text()) for f in files if f.suffix == ".json")


def test_a_corrupt_record_is_run_again(saved_llama, tmp_path):
    config = _config(saved_llama, tmp_path / "out", tasks="smoke_questions", method="dense")
    first = run_local(config, Watch())
    (file,) = (tmp_path / "out" / "cells").iterdir()
    file.write_text(file.read_text()[:100])
    view = Watch()
    assert _numbers(run_local(config, view).records) == _numbers(first.records)
    assert view.done == ["smoke_questions-dense"]


def test_evaluate_returns_rows(saved_llama, tmp_path):
    rows = dart_eval.evaluate(
        model=saved_llama, tasks=["smoke_questions"], method=["dense", "griffin"], sparsity=[0.5], limit=2,
        output=str(tmp_path / "out"),
    )  # fmt: skip
    assert {(r["method"], r["metric"]) for r in rows} == {
        *(("dense", name) for name in ("acc", "acc_norm", "flips")),
        *(("griffin", name) for name in ("acc", "acc_norm", "flips", "kl", "kl_p95", "kl_p99", "top1")),
    }  # fmt: skip
    assert all(r["n"] == 2 and r["model"] == "tiny-llama" and r["scope"] == "scored" for r in rows)
    assert {r["dense"] for r in rows if r["metric"] == "acc"} == {r["value"] for r in rows[:1]}  # beside dense's


def test_two_settings_of_one_method_are_two_cells(saved_llama, tmp_path):
    config = _config(
        saved_llama, tmp_path / "out", tasks="smoke_questions", sparsity=0.5, method="dart,dart:allocation=uniform"
    )
    result = run_local(config, Watch())
    assert len({r.key for r in result.records}) == 2
    assert [r.inputs["params"]["allocation"] for r in result.records] == ["depth", "uniform"]


def test_the_chat_template_is_used_when_asked_for(saved_llama, tmp_path):
    chat = tmp_path / "chat"
    shutil.copytree(saved_llama, chat)
    with_template = AutoTokenizer.from_pretrained(saved_llama)
    with_template.chat_template = "w9 {{ messages[0].content }} w8"
    with_template.save_pretrained(chat)
    hashes = {}
    for wanted in (False, True):
        output = tmp_path / str(wanted)
        config = _config(str(chat), output, tasks="smoke_summary", method="dense", chat_template=wanted)
        (record,) = run_local(config, Watch()).records
        (samples,) = (output / "samples").iterdir()
        hashes[wanted] = [json.loads(line)["prompt_hash"] for line in samples.read_text().splitlines()]
        assert record.inputs["chat_template"] is wanted
    assert not set(hashes[True]) & set(hashes[False])
    bare = tmp_path / "bare"  # refused before any weights are read
    shutil.copytree(saved_llama, bare)
    (bare / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="no chat template"):
        run_local(_config(str(bare), tmp_path / "none", chat_template=True), Watch())


@pytest.mark.slow
@pytest.mark.parametrize(("task", "most", "halvings"), [("smoke_questions", 2, 3), ("smoke_summary", 2, 2)])
def test_where_memory_runs_out_batches_are_halved(saved_llama, tmp_path, monkeypatch, task, most, halvings):
    """Forwards of more rows do not fit: the numbers are those of small batches."""
    wanted = run_local(_config(saved_llama, tmp_path / "small", tasks=task, batch_size=1), Watch())
    stock, fitting = LlamaModel.forward, [most]

    def full(self, input_ids=None, **more):
        if len(input_ids if input_ids is not None else more["inputs_embeds"]) > fitting[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return stock(self, input_ids=input_ids, **more)

    # What looks at a model tries it on its own; a batch runs in a cell alone.
    evaluate = worker.evaluate_task

    def inside(*args):
        with monkeypatch.context() as patched:
            patched.setattr(LlamaModel, "forward", full)
            return evaluate(*args)

    monkeypatch.setattr(worker, "evaluate_task", inside)
    monkeypatch.setattr("gc.collect", lambda: 0)  # at every halving: half a second
    result = run_local(_config(saved_llama, tmp_path / "out", tasks=task, batch_size=8), Watch())
    assert not result.failed
    assert [r.settings["halved"] for r in result.records] == [halvings] * 5
    for a, b in zip(result.records, wanted.records, strict=True):
        assert [m.value for m in a.metrics] == pytest.approx([m.value for m in b.metrics], abs=1e-4)
        assert "halved" not in b.settings
    # Where one row is too much, the cell fails, and the next one begins with full batches.
    fitting[0] = 0
    view = Watch()
    assert len(run_local(_config(saved_llama, tmp_path / "none", tasks=task), view).failed) == 5
    assert all("OutOfMemoryError" in error for _, error, _ in view.broken)


def test_methods_run_on_rounded_weights_and_read_counts_their_bits(saved_llama, tmp_path):
    """In turn on the one model, which has its own weights in between."""
    config = config_from(None, {
        "model": saved_llama, "method": "griffin,dense,magnitude", "sparsity": "0.46", "ffn_bits": "4,16,8", "limit": 2,
        "tasks": "smoke_questions", "output": str(tmp_path),
    })  # fmt: skip
    result = run_local(config, Watch())
    found = {(r.inputs["method"], r.inputs.get("ffn_bits")): r for r in result.records}
    bits = {"4": 4.6, "8": 8.6, None: 16}  # rows of 40 in down have two scales, where those of 32 have one
    assert set(found) == {(m, b) for m in ("griffin", "dense", "magnitude") for b in bits}
    for (method, own), record in found.items():
        whole = bits[own] / 16
        # the scales of down are read whole: .8 bits of a weight of one matrix of three
        pruned = 0.54 * whole + 0.46 * (0 if own is None else 0.8) / 3 / 16
        assert record.weights_read == pytest.approx(whole if method == "dense" else pruned, rel=0.02)
        assert record.effective_sparsity == pytest.approx(1 - record.weights_read)
        assert all(s["effective_sparsity"] == pytest.approx(1 - record.weights_read) for s in record.samples)
        command = record.settings["command"]
        assert (f"--ffn-bits {own}" in command) == (own is not None)
    alone = run_local(config_from(None, {
        "model": saved_llama, "method": "dense", "limit": 2, "tasks": "smoke_questions", "output": str(tmp_path / "b"),
    }), Watch())  # fmt: skip
    answers = {b: [s["responses"] for s in found["dense", b].samples] for b in bits}
    assert answers[None] == [s["responses"] for s in alone.records[0].samples] and answers["4"] != answers[None]


def test_a_calibration_is_that_of_the_weights_as_they_are_rounded(saved_llama, tmp_path):
    """Whatever the order of cells, each number is the one that its cell has alone."""
    asked = {"method": "flap,wanda-sp", "sparsity": "0.5", "tasks": "smoke_questions"}
    alone = [run_local(_config(saved_llama, tmp_path / b.replace(":", "-"), ffn_bits=b, **asked), Watch()).records
             for b in ("16", "2")]  # fmt: skip
    for order in ("2,16", "16,2"):
        both = run_local(_config(saved_llama, tmp_path / order, ffn_bits=order, **asked), Watch()).records
        wanted = {r.key: [m.value for m in r.metrics] for some in alone for r in some}
        assert {r.key: [m.value for m in r.metrics] for r in both} == wanted
