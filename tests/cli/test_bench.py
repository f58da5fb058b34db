"""`dart-eval bench`: what it measures is what it says; no test here depends on how fast anything is."""

import copy
import functools
import json
import platform
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from dart_eval.bench import decode, shapes
from dart_eval.bench.decode import Bench, twin
from dart_eval.kernels.cpu import build
from dart_eval.kernels.mask_rows import RowCopies
from dart_eval.layers.families import cache_argument
from dart_eval.layers.find import find_ffns
from dart_eval.layers.shape import shape_of
from dart_eval.models.loading import ModelSpec, resolve
from dart_eval.pruning.registry import make, parse
from dart_eval.results import speeds
from dart_eval.results.speeds import paired
from dart_eval.util.errors import UserError
from dart_eval.util.machine import hardware
from tests.helpers.commands import command
from tests.helpers.models import tiny
from tests.helpers.sessions import RESTLESS


def test_ratios_are_paired():
    """Two neighbours slow together: the ratio stays 2, where the ratio of medians would not."""
    found = paired([2.0, 20.0, 2.2, 4.0], [1.0, 10.0, 1.1, 2.0])
    assert (found.median, found.low, found.high, found.n) == (2.0, 2.0, 2.0, 4)
    assert paired([1.1], [1.0], 1.0).median == pytest.approx(0.1)
    two = paired([0.2, 1.5], [1.0, 1.0])  # quartiles of two lie within both
    assert (two.low, two.median, two.high) == (0.2, pytest.approx(0.85), 1.5)


def test_what_is_counted():
    model = tiny("llama", torch.float32)
    before = {n: p.clone() for n, p in model.named_parameters()}
    shape = shape_of(model, find_ffns(model))
    found = decode.measure(model, make("griffin"), 0.7, decode.Setting(20, 5, 2))
    assert found.weights_read == found.weights_executed == pytest.approx(0.3)
    phi = shape.ffn_weights / (shape.ffn_weights + shape.other_weights + shape.head_weights)
    assert found.ceiling == pytest.approx(1 / (1 - 0.7 * phi))
    assert found.achieved_over_ceiling == pytest.approx(found.speedup.median / found.ceiling)
    assert found.memory - found.state == 3 * 12 * (3 * 32 * 4 + 8)  # copies of rows, and each neuron's number
    assert found.state > 0
    assert found.speedup.n == found.control.n == found.overhead.n == 10  # the warm-up is not counted
    assert found.remask_masks_dense_steps is None
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense_is_the_untouched_model(dtype, monkeypatch):
    """Every forward that is timed as dense: the weights, and what comes out, are those of the model before."""
    model = tiny("llama", dtype)
    reference = copy.deepcopy(model)
    # Which forwards are timed, and as what, shows nowhere outside.
    dense, ran, timed, forward = [], [], decode.timed, LlamaForCausalLM.forward

    @functools.wraps(forward)
    def keep(module, **kwargs):
        output = forward(module, **kwargs)
        ran.append((module, kwargs["input_ids"], output.logits, kwargs.get(cache_argument(module))))
        return output

    def watched(work, device):
        ran.clear()
        found = timed(work, device)
        for module, ids, logits, cache in ran:
            # Torch shows in no public way whether a module has hooks.
            if not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in module.modules()):
                own = dict(module.named_parameters())
                if any(own[name].shape != parameter.shape for name, parameter in reference.named_parameters()):
                    continue  # copies of the kept rows, without the method's hooks
                dense.append((module, ids, logits, cache.get_seq_length() - ids.shape[1] if cache is not None else 0))
                for name, parameter in reference.named_parameters():
                    assert torch.equal(own[name], parameter) and own[name].stride() == parameter.stride(), name
        return found

    monkeypatch.setattr(LlamaForCausalLM, "forward", keep)
    monkeypatch.setattr(decode, "timed", watched)
    found = decode.measure(model, make("griffin"), 0.7, decode.Setting(20, 5, 2))
    # Three rounds: the prompt for each cache that begins dense (one is of our own product, in bfloat16), five tokens
    # twice; then before the changes of every re-mask, and before all rows are copied.
    own = found.over_kernel is not None
    assert own == (dtype == torch.bfloat16 and build.why_no_kernel() is None)
    assert len(dense) == 3 * (3 + own + 2 * 5) + 3 + 3
    ffn = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if ".mlp." in n)
    assert (found.twin_bytes, found.memory - found.state) == (ffn, 3 * 12 * (3 * 32 * dtype.itemsize + 8))
    for module, ids, logits, past in dense:
        assert module is not model
        if not past:
            assert torch.equal(logits, reference(input_ids=ids, logits_to_keep=1).logits)


def test_a_twin_shares_all_but_the_ffns():
    model = tiny("gemma3", torch.float32)
    own = {n: p.data_ptr() for n, p in twin(model).named_parameters()}
    for name, parameter in model.named_parameters():
        assert (own[name] != parameter.data_ptr()) == (".mlp." in name), name


def test_no_memory_for_a_twin_is_told(monkeypatch):
    def deepcopy(*_):
        raise RuntimeError("CUDA out of memory. Tried to allocate 11.00 GiB")

    model = tiny("llama", torch.float32)
    find_ffns(model)
    monkeypatch.setattr("dart_eval.bench.decode.copy.deepcopy", deepcopy)
    with pytest.raises(UserError, match="second copy of the FFN weights"):
        twin(model)


def test_steps_with_a_remask_are_left_out():
    """A window of 3 tokens, an alarm in every one: of 5 steps of a round one has a re-mask."""
    restless = ":".join(f"{k}={v}" for k, v in RESTLESS.items())
    method = make(*parse(f"dart:{restless}"))
    found = decode.measure(tiny("llama", torch.float32), method, 0.5, decode.Setting(20, 5))
    assert found.speedup.n == 3 * 4
    assert found.remask_masks_dense_steps.n >= 3


def test_a_fifth_of_the_kept_neurons_changes(monkeypatch):
    copied = []
    original = RowCopies.select

    def select(self, mask):
        copied.append((original(self, mask), self.count))
        return copied[-1][0]

    monkeypatch.setattr(RowCopies, "select", select)
    decode.measure(tiny("llama", torch.float32), make("magnitude"), 0.5, decode.Setting(5, 2, 1))
    assert copied[-27:] == [(4, 20)] * 18 + [(20, 20)] * 9  # three times three layers, there and back; then all anew


def test_steps_that_all_make_masks_leave_none_to_time():
    method = make("dart", {"allocation": "uniform", **RESTLESS, "remask.window": 1})
    with pytest.raises(UserError, match="every timed step makes new masks"):
        decode.measure(tiny("llama", torch.float32), method, 0.5, decode.Setting(16, 3, 1))


def test_what_cannot_be_timed_is_refused():
    model = tiny("llama", torch.float32)
    for name in ("dense", "oracle"):
        with pytest.raises(UserError, match=f"{name} cannot be timed"):
            decode.measure(model, make(name), 0.5)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "small", lambda: tiny("llama").config)


def test_random_weights_of_a_shape(small):
    model = shapes.with_random_weights("small", layers=2)
    assert len(model.model.layers) == 2
    assert next(model.parameters()).dtype == torch.bfloat16
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()


def test_a_folder_with_a_random_model(tmp_path, monkeypatch, capsys):
    made, shape = tmp_path / "made", tiny("llama").config
    shape.vocab_size = 300  # every byte has a token
    monkeypatch.setitem(shapes.SHAPES, "small", lambda: shape)
    monkeypatch.setattr(sys, "argv", ["random_model.py", "small", str(made), "2"])
    script = Path(__file__).parents[2] / "scripts" / "random_model.py"
    runpy.run_path(str(script), run_name="__main__")
    assert f"{made}: small, 0.00 billion random weights" in capsys.readouterr().out
    model, tokenizer = AutoModelForCausalLM.from_pretrained(made), AutoTokenizer.from_pretrained(made)
    assert (len(model.model.layers), model.dtype) == (2, torch.bfloat16)
    text = "The quick brown fox, ünusually slow"
    tokens = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    assert tokenizer.decode(tokens["input_ids"][0]) == text
    assert model.generate(**tokens, max_new_tokens=5, do_sample=False).shape[1] == tokens["input_ids"].shape[1] + 5
    with pytest.raises(SystemExit, match="is there already"):
        runpy.run_path(str(script), run_name="__main__")


def test_what_computed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {'AAB'[device.index]}")
    assert hardware({torch.device("cuda", i) for i in range(3)})["gpu"] == "2 x Card A, Card B"
    assert hardware({torch.device("cuda", 2)}) == {"machine": platform.machine(), "gpu": "Card B"}
    assert hardware({torch.device("cpu")}) == {"machine": platform.machine(), "threads": str(torch.get_num_threads())}


def test_the_command_shows_what_it_measures(saved_llama):
    few = ("--model", saved_llama, "--prompt", "16", "--steps", "3", "--rounds", "1", "--method", "griffin,dart")
    done = command("bench", "decode", *few, "--format", "json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert [f["method"] for f in found] == ["griffin", "dart"]
    for key in ("achieved_over_ceiling", "speedup", "ceiling", "remask_moves_dense_steps", "overhead"):
        assert isinstance(found[0][key], float)
    assert 0 < found[0]["state"] < found[0]["memory"] < found[0]["twin_bytes"] / 2
    assert found[0]["speedup_quartiles"][0] <= found[0]["speedup"] <= found[0]["speedup_quartiles"][1]
    assert found[0]["speedup_n"] == 3
    assert (found[0]["remask_masks_dense_steps"] is None, found[1]["remask_masks_dense_steps"] > 0) == (True, True)
    shown = command("bench", "decode", *few).out
    for word in ("griffin", "speed-up", "ceiling", "control", "thread", "prompt", "memory MB"):
        assert word in shown


@pytest.mark.parametrize(("words", "said"), [
    (("--shape", "llama", "--model", "x"), "both given"),
    (("--steps", "0"), "invalid value for '--steps'"),
    (("--layers", "2"), "--layers is for a shape"),
    (("--shape", "llama-3.1"), "did you mean"),
    (("--method", "griffin,oracle"), "oracle cannot be timed"),
    (("--format", "xml"), "unknown format 'xml'; known: csv, json, md, table, tex"),
])  # fmt: skip
def test_wrong_input_is_refused_in_one_line(words, said):
    done = command("bench", "decode", *words)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_an_empty_list_of_methods_is_none():
    for methods in (" , ", ""):
        done = command("bench", "overhead", "--method", methods)
        assert done.code == 2 and "must have at least 1 item" in done.err


def test_what_was_measured_is_kept_beside_results(tmp_path, saved_llama):
    few = ("--model", saved_llama, "--prompt", "16", "--steps", "3", "--rounds", "1", "--dtype", "float32")
    spec = "dart:remask.window=4:allocation=uniform"
    done = command("bench", "decode", *few, "--method", f"{spec},rounding", "--format", "json", "--output", tmp_path)
    assert done.code == 0, done.err
    assert {f"wrote {file}" for file in (tmp_path / "bench").iterdir()} < {*done.err.splitlines()}
    pruned, top = sorted((json.loads(f.read_text()) for f in (tmp_path / "bench").iterdir()), key=lambda s: s["method"])
    rows = json.loads(done.out)  # what was written is said elsewhere
    assert (pruned["method"], pruned["sparsity"], pruned["dtype"], pruned["device"]) == (spec, 0.7, "float32", "cpu")
    assert (pruned["params"]["remask.window"], pruned["compiled"], pruned["prompt_tokens"]) == (4, None, 16)
    assert pruned["hardware"].startswith(f"{torch.get_num_threads()} thread")
    assert (pruned["control"]["n"], pruned["ceiling"]) == (3, rows[0]["ceiling"])
    speedup = pruned["speedup"]
    assert (speedup["median"], speedup["low"], speedup["high"]) == (rows[0]["speedup"], *rows[0]["speedup_quartiles"])
    assert pruned["more"]["overhead"]["median"] == rows[0]["overhead"] and pruned["more"]["steps"] == 3
    assert top["sparsity"] == 0  # as in the cells of a method without one
    identity = resolve(ModelSpec(saved_llama)).identity.to_json()
    inputs = {"model": identity, "dtype": "float32", "params": make(*parse(spec)).params(), "sparsity": 0.7}
    assert speeds.of_cell(speeds.load_speeds(tmp_path), inputs).speedup.median == speedup["median"]


def test_steps_that_run_dense_after_an_alarm_are_not_timed():
    """Of 12 steps windows of 3 alarm after the third; the next 6 run dense, up to a re-mask."""
    spec = ":".join(["dart", *(f"{k}={v}" for k, v in {**RESTLESS, "remask.dense_tokens": 6}.items())])
    found = decode.measure(tiny("llama", torch.float32), make(*parse(spec)), 0.5, decode.Setting(20, 12, 1))
    assert found.speedup.n == 6 and found.weights_read == pytest.approx(0.5)


def test_only_the_first_round_warms_up_whatever_its_length():
    """Steps with a re-mask are left out, so rounds differ in length."""
    lengths = iter([30, 27, 27])

    def round_(_run, times, _prompt, _steps):
        times.steps["dense"] += [float(n := next(lengths))] * n

    kept = Bench.rounds(SimpleNamespace(_round=round_), None, decode.Setting(8, 30, 2))
    assert kept.steps["dense"] == [27.0] * 54
