"""A whole run on a tiny saved model: records, resuming, failures, the Python surface."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaModel

import dart_eval
from dart_eval.evaluation.costs import Distance, percentile
from dart_eval.pruning.registry import make
from dart_eval.results import metrics
from dart_eval.results.store import Store
from dart_eval.sweep import run, worker
from dart_eval.sweep.events import silent
from dart_eval.sweep.options import RunConfig, config_from
from dart_eval.sweep.plan import Cell
from tests.helpers import records
from tests.helpers.commands import Watch, run_local

SWEEP = {"method": "dense,random,dart", "sparsity": "0.5,0.7", "tasks": "smoke_questions,smoke_summary", "limit": 3,
         "gen_kwargs": "max_gen_toks=16"}  # fmt: skip

DISTANCES = ("kl", "kl_p50", "kl_p95", "kl_p99", "kl_reverse", "rms_dp", "top1")


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
    assert names == {"acc", "acc_norm", "rouge1", "rouge2", "rougeL", "bleu", "summary_words", "empty", *DISTANCES}
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
        run_local(_config(saved_llama, tmp_path / name, method="random,dart", sparsity="0.5", batch_size=size), Watch())
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
    asked = _config(saved_llama, tmp_path / "out", tasks="smoke_questions", sparsity="0.5")
    result = run_local(asked, view)
    ((name, error, where),) = view.broken
    assert (name, error) == ("smoke_questions-random-0.5", "RuntimeError: planted")
    assert where.parent == tmp_path / "out" / "failed" and "in sometimes" in where.read_text()
    assert len(result.records) == 2
    assert [c.name for c in result.failed] == ["smoke_questions-random-0.5"]
    monkeypatch.undo()
    after = Watch()
    assert not run_local(asked, after).failed
    assert after.done == ["smoke_questions-random-0.5"]  # only what was missing
    assert not where.exists()


def test_under_force_earlier_answers_are_dropped(tmp_path):
    store, cell = Store(tmp_path), Cell(make("griffin"), 0.5, "t", {"task": "t"})
    for force, kept in ((False, {"a": [1.0, True]}), (True, {})):
        store.journal(cell.name, cell.key).add({"a": [1.0, True]}, 0, 1.0)
        cell = dataclasses.replace(cell, config=RunConfig(force=force))
        with run.Sweep(None, store, Watch()).claim(cell) as journal:
            assert dict(journal) == kept


def test_what_another_process_has_ended_is_not_run_and_what_all_have_noted_is_told_once(tmp_path):
    store, view = Store(tmp_path), Watch()
    cells = [Cell(make(name), 0.5, "t", {"method": name}) for name in ("griffin", "dart", "cats")]
    first, second, broken = cells
    for cell in (first, second):
        record = dataclasses.replace(records.record(key=cell.key), settings={"notes": ["a model without BOS"]})
        store.save(cell.name, record)
    file = store.failed(broken.name, broken.key, "Traceback ...\nRuntimeError: planted\n")
    sweep = run.Sweep(None, store, view, since=0.0, cells={cell.key: cell for cell in cells})
    for cell in cells:
        with sweep.claim(cell) as journal:
            assert journal is None
    assert not sweep.todo and not list(tmp_path.rglob("partial/*"))
    assert (view.done, view.notes) == ([first.name, second.name], ["a model without BOS"])
    assert view.broken == [(broken.name, "RuntimeError: planted", file)]


@pytest.mark.parametrize(("method", "more", "ran", "left_out"), [
    # Two thirds of a gated FFN are all that can be left unread once gate has been read whole.
    ("griffin,cats", {"sparsity": "0.5,0.7"}, [("griffin", 0.5), ("griffin", 0.7), ("cats", 0.5)], ["cats"]),
    ("grinqh,decdec,griffin", {"sparsity": "0.3"}, [("griffin", 0.3)], ["grinqh", "decdec"]),
    ("rounding", {"ffn_bits": "16,4,3"}, [("rounding", 0.0)], ["rounding"] * 2),  # not rounded twice
])  # fmt: skip
def test_a_cell_out_of_a_methods_reach_is_left_out_with_a_word(saved_llama, tmp_path, method, more, ran, left_out):
    view, common = Watch(), {"tasks": "smoke_questions", "limit": 1}
    result = run_local(_config(saved_llama, tmp_path, method=method, **common, **more), view)
    assert [(r.inputs["method"], r.inputs["sparsity"]) for r in result.records] == ran
    assert not result.failed and not view.broken
    assert [note.split()[2] for note in view.notes] == left_out


def test_evaluate_returns_rows(saved_llama, tmp_path):
    rows = dart_eval.evaluate(
        model=saved_llama, tasks=["smoke_questions"], method=["dense", "griffin"], sparsity=[0.5], limit=2,
        output=str(tmp_path / "out"),
    )  # fmt: skip
    assert {(r["method"], r["metric"]) for r in rows} == {
        *(("dense", name) for name in ("acc", "acc_norm", "flips")),
        *(("griffin", name) for name in ("acc", "acc_norm", "flips", *DISTANCES)),
    }  # fmt: skip
    assert all(r["n"] == 2 and r["model"] == "tiny-llama" and r["scope"] == "scored" for r in rows)
    assert {r["dense"] for r in rows if r["metric"] == "acc"} == {r["value"] for r in rows[:1]}  # beside dense's


def test_the_chat_template_and_a_system_instruction_are_used_when_asked_for(saved_llama, tmp_path):
    chat = tmp_path / "chat"
    shutil.copytree(saved_llama, chat)
    with_template = AutoTokenizer.from_pretrained(saved_llama)
    with_template.chat_template = "w9 {{ messages[0].content }} w8"
    with_template.save_pretrained(chat)
    hashes, texts = set(), []
    for i, asked in enumerate(({}, {"chat_template": True}, {"system_instruction": "Be brief."})):
        output = tmp_path / str(i)
        config = _config(str(chat), output, tasks="smoke_summary", method="dense", **asked)
        (record,) = run_local(config, Watch()).records
        (samples,), (file,) = (output / "samples").iterdir(), (output / "texts").iterdir()
        hashes |= {json.loads(line)["prompt_hash"] for line in samples.read_text().splitlines()}
        texts.append(json.loads(file.read_text().splitlines()[0])["prompt"])
        assert {name: record.inputs[name] for name in asked} == asked
    assert len(hashes) == 9 and texts[1] == f"w9 {texts[0]} w8" and texts[2].startswith("Be brief.")


@pytest.mark.slow
@pytest.mark.parametrize(("task", "most", "halvings"), [("smoke_questions", 2, 3), ("smoke_summary", 2, 2)])
def test_where_memory_runs_out_batches_are_halved(saved_llama, tmp_path, monkeypatch, task, most, halvings):
    """Forwards of more rows do not fit: the numbers are those of small batches."""
    asked = {"tasks": task, "method": "dense,dart", "sparsity": "0.5"}
    wanted = run_local(_config(saved_llama, tmp_path / "small", batch_size=1, **asked), Watch())
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
    result = run_local(_config(saved_llama, tmp_path / "out", batch_size=8, **asked), Watch())
    assert not result.failed
    assert [r.settings["halved"] for r in result.records] == [halvings] * 2
    for a, b in zip(result.records, wanted.records, strict=True):
        assert [m.value for m in a.metrics] == pytest.approx([m.value for m in b.metrics], abs=1e-4)
        assert "halved" not in b.settings
    # Where one row is too much, the cell fails, and the next one begins with full batches.
    fitting[0] = 0
    view = Watch()
    assert len(run_local(_config(saved_llama, tmp_path / "none", **asked), view).failed) == 2
    assert all("OutOfMemoryError" in error for _, error, _ in view.broken)


def test_methods_run_on_rounded_weights_and_read_counts_their_bits(saved_llama, tmp_path):
    """In turn on the one model, which has its own weights in between."""
    config = config_from(None, {
        "model": saved_llama, "method": "griffin,dense", "sparsity": "0.46", "ffn_bits": "4,16,8", "limit": 2,
        "tasks": "smoke_questions", "output": str(tmp_path),
    })  # fmt: skip
    result = run_local(config, Watch())
    found = {(r.inputs["method"], r.inputs.get("ffn_bits")): r for r in result.records}
    bits = {"4": 4.6, "8": 8.6, None: 16}  # rows of 40 in down have two scales, where those of 32 have one
    assert set(found) == {(m, b) for m in ("griffin", "dense") for b in bits}
    for (method, own), record in found.items():
        whole = bits[own] / 16
        # the scales of down are read whole: .8 bits of a weight of one matrix of three
        scales = (0 if own is None else 0.8) / 3 / 16
        pruned = 0.54 * whole + 0.46 * scales
        assert record.weights_read == pytest.approx(whole if method == "dense" else pruned, rel=0.02)
        # two rows of 32 codes with a scale each, then a column of 32 codes, to the ends of their lines
        used, lines = {"4": (288 + 128, 512 + 512), "8": (544 + 256, 1024 + 512), None: (1, 1)}[own]
        ends = 0 if method == "dense" else (record.weights_read - scales) * (lines / used - 1)
        assert record.fetched == pytest.approx(record.weights_read + ends)
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
    asked = {"method": "wanda-sp", "sparsity": "0.5", "tasks": "smoke_questions"}
    alone = [run_local(_config(saved_llama, tmp_path / b.replace(":", "-"), ffn_bits=b, **asked), Watch()).records
             for b in ("16", "2")]  # fmt: skip
    for order in ("2,16", "16,2"):
        both = run_local(_config(saved_llama, tmp_path / order, ffn_bits=order, **asked), Watch()).records
        wanted = {r.key: [m.value for m in r.metrics] for some in alone for r in some}
        assert {r.key: [m.value for m in r.metrics] for r in both} == wanted


@pytest.mark.slow
def test_a_document_and_a_record_say_how_far_they_are_and_texts_have_their_tokens(saved_llama, tmp_path, tokenizer):
    given = {
        "model": saved_llama, "tasks": "smoke_questions,smoke_drift,smoke_summary", "method": "dense,random,griffin",
        "sparsity": "0.6", "limit": 7, "gen_kwargs": "max_gen_toks=5", "output": str(tmp_path),
    }  # fmt: skip
    records = run_local(config_from(None, given), silent).records
    assert len(records) == 9
    for record in records:
        task, method, samples = record.inputs["task"], record.inputs["method"], Store(tmp_path).samples(record)
        named = {m.metric: m for m in record.metrics}
        asked = method != "dense" and task != "smoke_summary"
        assert ("kl" in named, "kl_p95" in named, "kl" in samples[0]["metrics"]) == (asked,) * 3
        assert all(("kl_bins" in s, "token_ids" in s) == (asked, task == "smoke_summary") for s in samples)
        assert metrics.main(m for m in record.metrics if metrics.kind_of(m.metric).group == metrics.DISTANCE) == []
        for s in samples if task == "smoke_summary" else ():
            assert len(s["token_ids"]) == s["tokens"] > 0
            assert s["limited"] == (s["tokens"] == 5)
            assert s["responses"][0].strip() in tokenizer.decode(s["token_ids"], skip_special_tokens=True)
        if not asked:
            continue
        for name, up in (("kl", False), ("kl_reverse", False), ("rms_dp", False), ("top1", True)):
            x, w = np.array([s["metrics"][name] for s in samples]).T
            assert [s["tokens"] for s in samples] == w.tolist()
            value = x.sum() / w.sum()
            error = math.sqrt(len(x) / (len(x) - 1) * (((x - value * w) / w.sum()) ** 2).sum())
            if name == "rms_dp":
                value, error = math.sqrt(value), error / 2 / math.sqrt(value)
            found = named[name]
            assert (found.value, found.stderr) == pytest.approx((value, error))
            assert (found.n, found.higher_is_better) == (len(samples), up)
        assert named["kl"].value > 1e-4
        bins = sum((Distance(bins=s["kl_bins"]) for s in samples), Distance()).bins
        assert sum(bins.values()) == record.tokens
        assert named["kl_p99"].value == percentile(bins, 0.99) >= named["kl_p95"].value
        assert named["kl_p95"].value >= named["kl_p50"].value > 0
