"""`dart-eval bench` and `trace`: what they measure is what they say; speeds are kept, and read beside results.

No test here depends on how fast anything is.
"""

import copy
import dataclasses
import functools
import json
import os
import platform
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM

from dart_eval.bench import decode, overhead, shapes, tracing
from dart_eval.bench.decode import Bench, Setting, measure, twin
from dart_eval.bench.subject import Subject
from dart_eval.cli.trace import draw
from dart_eval.kernels.cpu import build
from dart_eval.kernels.fast import why_no_kernel
from dart_eval.kernels.mask_rows import RowCopies, Slot
from dart_eval.layers.families import cache_argument
from dart_eval.layers.find import find_ffns
from dart_eval.layers.shape import shape_of
from dart_eval.models.loading import ModelSpec, resolve
from dart_eval.pruning.registry import make, parse
from dart_eval.results import speeds
from dart_eval.results.speeds import Ratio, paired
from dart_eval.util.errors import UserError
from dart_eval.util.machine import hardware
from tests.helpers.commands import ROOT, command
from tests.helpers.models import random_tokens, tiny
from tests.helpers.sessions import RESTLESS
from tests.matrix import types


def test_ratios_are_paired():
    """Two neighbours slow together: the ratio stays 2, where the ratio of medians would not."""
    found = paired([2.0, 20.0, 2.2, 4.0], [1.0, 10.0, 1.1, 2.0])
    assert (found.median, found.low, found.high, found.n) == (2.0, 2.0, 2.0, 4)
    assert paired([1.1], [1.0], 1.0).median == pytest.approx(0.1)
    two = paired([0.2, 1.5], [1.0, 1.0])  # quartiles of two lie within both
    assert (two.low, two.median, two.high) == (0.2, pytest.approx(0.85), 1.5)


# -- what is timed -----------------------------------------------------------------------------------------------------


def test_what_is_counted():
    model = tiny("llama", torch.float32)
    before = {n: p.clone() for n, p in model.named_parameters()}
    shape = shape_of(model, find_ffns(model))
    found = measure(model, make("griffin"), 0.7, Setting(20, 5, 2))
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
    found = measure(model, make("griffin"), 0.7, Setting(20, 5, 2))
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


def test_a_twin_shares_all_but_the_ffns_or_its_lack_of_memory_is_said(monkeypatch):
    model = tiny("gemma3", torch.float32)
    own = {n: p.data_ptr() for n, p in twin(model).named_parameters()}
    for name, parameter in model.named_parameters():
        assert (own[name] != parameter.data_ptr()) == (".mlp." in name), name

    def deepcopy(*_):
        raise RuntimeError("CUDA out of memory. Tried to allocate 11.00 GiB")

    find_ffns(model)
    monkeypatch.setattr("dart_eval.bench.decode.copy.deepcopy", deepcopy)
    with pytest.raises(UserError, match="copy"):
        twin(model)


@pytest.mark.parametrize(("options", "setting", "timed", "masks"), [
    ({}, Setting(20, 5), 3 * 4, 3),  # a window of 3 tokens, an alarm in each: of 5 steps of a round one has a re-mask
    ({"remask.dense_tokens": 6}, Setting(20, 12, 1), 6, 0),  # of 12 the third alarms; the next 6 run dense
])  # fmt: skip
def test_steps_with_a_remask_and_dense_ones_are_left_out(options, setting, timed, masks):
    found = measure(tiny("llama", torch.float32), make("dart", {**RESTLESS, **options}), 0.5, setting)
    assert found.speedup.n == timed and found.weights_read == pytest.approx(0.5)
    assert not masks or found.remask_masks_dense_steps.n >= masks


def test_only_the_first_round_warms_up_whatever_its_length():
    """Steps with a re-mask are left out, so rounds differ in length."""
    lengths = iter([30, 27, 27])

    def round_(_run, times, _prompt, _steps):
        times.steps["dense"] += [float(n := next(lengths))] * n

    kept = Bench.rounds(SimpleNamespace(_round=round_), None, Setting(8, 30, 2))
    assert kept.steps["dense"] == [27.0] * 54


def test_a_fifth_of_the_kept_neurons_changes(monkeypatch):
    copied, original = [], RowCopies.select

    def select(self, mask):
        copied.append((original(self, mask), self.count))
        return copied[-1][0]

    monkeypatch.setattr(RowCopies, "select", select)
    measure(tiny("llama", torch.float32), make("magnitude"), 0.5, Setting(5, 2, 1))
    assert copied[-27:] == [(4, 20)] * 18 + [(20, 20)] * 9  # three times three layers, there and back; then all anew


@pytest.mark.parametrize(("name", "params"), [
    ("dense", {}), ("oracle", {}),
    ("dart", {"allocation": "uniform", **RESTLESS, "remask.window": 1}),  # every step makes masks: none is left to time
])  # fmt: skip
def test_what_cannot_be_timed_is_refused(name, params):
    with pytest.raises(UserError, match="timed"):
        measure(tiny("llama", torch.float32), make(name, params), 0.5, Setting(16, 3, 1))


@pytest.mark.parametrize(("method", "why"), [
    ("griffin", None), ("flap", None), ("grinqh", build.why_no_kernel()), ("grinqh:entries.group=32", "128"),
    ("cats", "cats"), ("wina", "wina"),
])  # fmt: skip
def test_which_methods_have_kernels(method, why):
    found = why_no_kernel(make(*parse(method)), find_ffns(tiny("llama", torch.float32)))
    assert found is None if why is None else why in found


def test_weights_that_cannot_be_copied_are_counted_and_not_timed():
    model = tiny("llama", torch.float32)
    model.model.layers[2].mlp = model.model.layers[0].mlp
    found = measure(model, make("griffin"), 0.7, Setting(8))
    assert found.weights_read == pytest.approx(0.3, abs=0.01) and "one FFN" in found.why and found.speedup is None


def test_what_does_not_fit_a_model_is_left_out():
    """A method that reads a text where there is no tokenizer, that allocates by depth, or that knows no experts."""
    reader = object()
    for model, tokenizer, method, fits in (
        (tiny("llama", torch.float32), None, "teal", False), (tiny("llama", torch.float32), reader, "teal", True),
        (tiny("llama", torch.float32), None, "griffin", True), (types.tiny("deepseek_v4"), reader, "dart", False),
        (types.tiny("qwen3_moe"), reader, "teal", False), (types.tiny("qwen3_moe"), reader, "griffin", True),
    ):  # fmt: skip
        refused = Subject(model, tokenizer, {"name": "tiny"}, "float32").refused(make(method), 0.5)
        assert (refused is None) == fits, method


# -- the command -------------------------------------------------------------------------------------------------------

SPEC = "dart:remask.window=3:allocation=uniform"
UNTIMED = ["graded-both", "oracle-token", "cats", "teal"]


def test_what_is_measured_is_shown_and_kept_beside_results(tmp_path, saved_llama):
    """Rows without times, of methods that no kernel makes faster, stand among those with."""
    few = ("--model", saved_llama, "--prompt", "16", "--steps", "4", "--rounds", "1", "--sparsity", "0.5")
    methods = ",".join(["griffin", SPEC, "rounding", *UNTIMED])
    done = command("bench", "decode", *few, "--method", methods, "--format", "json", "--output", tmp_path)
    assert done.code == 0, done.err
    rows = {row["method"]: row for row in json.loads(done.out)}
    assert [*rows] == methods.split(",")
    griffin, dart = rows["griffin"], rows[SPEC]
    for key in ("achieved_over_ceiling", "speedup", "ceiling", "remask_moves_dense_steps", "overhead"):
        assert isinstance(griffin[key], float)
    assert 0 < griffin["state"] < griffin["memory"] < griffin["twin_bytes"]
    assert griffin["speedup_quartiles"][0] <= griffin["speedup"] <= griffin["speedup_quartiles"][1]
    assert (griffin["speedup_n"], griffin["why"], griffin["remask_masks_dense_steps"]) == (4, None, None)
    for row in map(rows.get, UNTIMED):
        assert (row["speedup"], row["control"], row["overhead"]) == (None, None, None)
        assert 0.2 < row["weights_read"] < 0.75 and row["ceiling"] > 1 and row["why"] and row["memory"] >= row["state"]
    assert rows["cats"]["weights_read"] == pytest.approx(0.5, abs=0.01)
    assert rows["graded-both"]["ceiling"] == pytest.approx(griffin["ceiling"], rel=0.02)  # bytes nearly as many

    kept = {
        speed["method"]: speed for file in (tmp_path / "bench").iterdir() if (speed := json.loads(file.read_text()))
    }
    assert {*kept} == {*rows} and kept["rounding"]["sparsity"] == 0  # as in the cells of a method without one
    assert (kept["cats"]["speedup"], kept["cats"]["times"]) == (None, "bytes only")
    pruned = kept[SPEC]
    asked = {"sparsity": 0.5, "dtype": "float32", "device": "cpu", "prompt_tokens": 16, "compiled": None}
    assert asked.items() <= pruned.items() and (pruned["params"]["remask.window"], pruned["times"]) == (3, "measured")
    assert (pruned["control"]["n"], pruned["ceiling"]) == (dart["speedup_n"], dart["ceiling"])
    speedup = pruned["speedup"]
    assert (speedup["median"], speedup["low"], speedup["high"]) == (dart["speedup"], *dart["speedup_quartiles"])
    assert pruned["more"]["overhead"]["median"] == dart["overhead"] and pruned["more"]["steps"] == 4
    identity = resolve(ModelSpec(saved_llama)).identity.to_json()
    inputs = {"model": identity, "dtype": "float32", "params": make(*parse(SPEC)).params(), "sparsity": 0.5}
    assert speeds.of_cell(speeds.load_speeds(tmp_path), inputs).speedup.median == speedup["median"]
    left = command("bench", "decode", *few, "--sparsity", "0.7", "--format", "json", "--method", "griffin,cats")
    assert [row["method"] for row in json.loads(left.out)] == ["griffin"] and "cats" in left.err


def test_random_weights_of_a_shape_make_a_model(monkeypatch):
    shape = tiny("llama").config
    monkeypatch.setitem(shapes.SHAPES, "small", lambda: shape)
    model = shapes.with_random_weights("small", layers=2)
    assert (len(model.model.layers), next(model.parameters()).dtype) == (2, torch.bfloat16)
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()


def test_what_computed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {'AAB'[device.index]}")
    assert hardware({torch.device("cuda", i) for i in range(3)})["gpu"] == "2 x Card A, Card B"
    assert hardware({torch.device("cuda", 2)}) == {"machine": platform.machine(), "gpu": "Card B"}
    assert hardware({torch.device("cpu")}) == {"machine": platform.machine(), "threads": str(torch.get_num_threads())}


# -- speeds beside results ---------------------------------------------------------------------------------------------

MODEL = {"name": "tiny", "revision": None, "weights": "f00d"}
PARAMS = {"mask": "prompt", "remask": "drift", "remask.window": 8}
RATIO = {"median": 1.7, "low": 1.6, "high": 1.8, "n": 75}
SPEED = {
    "method": "griffin:remask=drift", "params": PARAMS, "sparsity": 0.7, "model": MODEL, "dtype": "bfloat16",
    "device": "cpu", "hardware": "2 threads", "compiled": None, "prompt_tokens": 128, "read": 0.3, "speedup": RATIO,
    "control": RATIO, "ceiling": 1.84, "created": "2026-01-02T00:00:00+00:00", "ffn_bits": None,
    "more": {"overhead": {"median": 0.02}, "state_bytes": 5}, "environment": {"torch": "2.9"},
}  # fmt: skip


def read(**changes):
    """A speed as boards read it."""
    known = {**SPEED, **changes, "speedup": Ratio(**RATIO) if changes.get("speedup", RATIO) else None}
    return speeds.Speed(**{field.name: known[field.name] for field in dataclasses.fields(speeds.Speed)[:-1]})


def test_what_was_kept_is_read_back_oldest_first(tmp_path):
    assert speeds.load_speeds(tmp_path) == speeds.load_speeds(tmp_path / "none") == []
    earlier = {"sparsity": 0.5, "created": "2026-01-01T00:00:00+00:00", "method": "a/b:c=d"}
    untimed = {"speedup": None, "control": None, "times": "bytes only", "created": "2026-02-01", "sparsity": 0.4}
    for changes in ({}, untimed, earlier):
        path = speeds.keep(tmp_path, {**SPEED, **changes})
    assert speeds.load_speeds(tmp_path) == [read(**earlier), read(), read(**untimed)]
    assert json.loads(path.read_text()) == {**SPEED, **earlier, "schema": 1}


def test_measured_again_it_replaces_what_was_there_under_the_name_of_earlier_versions(tmp_path):
    speeds.keep(tmp_path, SPEED)
    again = speeds.keep(tmp_path, {**SPEED, "created": "2026-01-03", "environment": {"torch": "3.0"}})
    assert [speed.created for speed in speeds.load_speeds(tmp_path)] == ["2026-01-03"]
    others = {"hardware": "4 threads"}, {"prompt_tokens": 1024}, {"dtype": "float32"}, {"ffn_bits": "4:128"}
    names = [again.name, *(speeds.keep(tmp_path, {**SPEED, **change}).name for change in others)]
    assert len(speeds.load_speeds(tmp_path)) == 5
    assert names[0] == "decode-griffin-0.7-ddd1d70bc5598fae.json"
    assert names[4] == "decode-griffin-4-128bit-0.7-997e16a6e5de8c2e.json"


@pytest.mark.parametrize(("change", "fits"), [
    ({}, True), ({"device": "cuda"}, True), ({"model": {**MODEL, "name": "other"}}, True),
    ({"model": {**MODEL, "weights": "beef"}}, False), ({"params": {**PARAMS, "remask.window": 9}}, False),
    ({"params": {**PARAMS, "routing": "own"}}, True),  # as older versions did, which had no such part
    ({"params": {**PARAMS, "routing": "fewer"}}, False), ({"sparsity": 0.5}, False),
    ({"dtype": "float32"}, False), ({"model": {**MODEL, "weights": None}}, False), ({"ffn_bits": "4"}, False),
])  # fmt: skip
def test_a_speed_belongs_to_cells_of_its_method_and_model(change, fits):
    inputs = {"model": MODEL, "params": PARAMS, "sparsity": 0.7, "dtype": "bfloat16", "device": "cpu", "task": "arc"}
    assert (speeds.of_cell([read()], inputs | change) is not None) == fits


def test_a_cell_gets_what_was_measured_last_and_the_words_only_where_nothing_was():
    inputs = {"model": MODEL, "params": PARAMS, "sparsity": 0.7, "dtype": "bfloat16"}
    words, older, newer = read(speedup=None, device="cuda", created="2026-01-09"), read(), read(hardware="4 threads")
    assert speeds.of_cell([older, newer, words], inputs) is newer
    assert speeds.of_cell([words], inputs) is words and speeds.of_cell([words], inputs | {"sparsity": 0.5}) is None


def test_a_damaged_file_is_named_and_left_out(tmp_path, capsys):
    other = speeds.keep(tmp_path, {**SPEED, "sparsity": 0.5})
    data = json.loads(speeds.keep(tmp_path, SPEED).read_text())
    lacking = {key: value for key, value in data.items() if key != "dtype"}
    for text in ("{", "[]", *map(json.dumps, ({**data, "schema": 2}, {**data, "speedup": 1.7}, lacking))):
        other.write_text(text)
        assert speeds.load_speeds(tmp_path) == [read()]
        assert str(other) in capsys.readouterr().err


# -- traces ------------------------------------------------------------------------------------------------------------


def words(count, seed=0):
    return " ".join(f"w{t}" for t in random_tokens(count, seed))


def traced(tokenizer, prompt, then=None, spec="dart", tokens=40, **params):
    model = tiny("llama").float()
    name, given = parse(spec)
    return model, tracing.trace(model, tokenizer, make(name, {**given, **params}), 0.5, prompt, then, tokens)


def test_a_given_text_is_fed_and_scored(tokenizer):
    model, found = traced(tokenizer, words(30), words(25, 1), **RESTLESS)
    assert (found["prompt_tokens"], found["tokens"]) == (30, words(25, 1).split())
    assert len(found["logprobs"]) == 25
    with torch.no_grad():  # the first comes from the dense prompt
        logits = model(torch.tensor([random_tokens(30)])).logits[0, -1].log_softmax(-1)
    assert found["logprobs"][0] == pytest.approx(float(logits[random_tokens(25, 1)[0]]), abs=1e-4)
    assert found["detector"]["alarms"] == [r["token"] for r in found["remasks"]] == list(range(3, 25, 3))
    assert sum(found["layers"]["kept"]) == 60
    assert all(len(r["overlap"]) == 3 for r in found["remasks"])


def test_what_is_read_is_of_pruned_tokens_whenever_the_text_ends(tokenizer):
    """After an alarm tokens run dense for a while; here one is raised by every window."""
    alarmed = {"remask.sigma": -1000.0, "remask.floor": -3.0, "remask.window": 3, "remask.dense_tokens": 6}
    found = [
        traced(tokenizer, words(30), words(25, 1), "dart-code", tokens, **alarmed)[1]["weights_read"]
        for tokens in (5, 8, 12, 16)
    ]
    assert found == pytest.approx([0.5] * 4, abs=0.01)


@pytest.mark.parametrize("tokens", [1, 2, 25])
def test_the_first_token_comes_from_the_dense_prompt(tokenizer, tokens):
    _, found = traced(tokenizer, words(20), words(25, 1), "griffin", tokens)
    assert len(found["tokens"]) == tokens
    assert found["effective_sparsity"] == pytest.approx(0.5 * (tokens - 1) / tokens)


def test_without_a_text_the_model_writes(tokenizer):
    model, found = traced(tokenizer, words(12), spec="griffin", tokens=5)
    assert len(found["tokens"]) == 5
    assert found["detector"] is None and found["remasks"] == []
    with torch.no_grad():
        logits = model(torch.tensor([random_tokens(12)])).logits
    assert found["tokens"][0] == tokenizer.decode([int(logits[0, -1].argmax())])


@pytest.mark.parametrize(("prompt", "spec", "params", "ending"), [
    (30, "griffin", {}, ".png"), (30, "dart", RESTLESS, ".svg"),
    (30, "dart", {"remask.act": False, "remask.window": 3}, ".png"), (5, "dart", {}, ".svg"),  # too short to detect
])  # fmt: skip
def test_pictures_of_every_kind(tokenizer, tmp_path, prompt, spec, params, ending):
    _, found = traced(tokenizer, words(prompt), words(25, 1), spec, **params)
    draw(found, tmp_path / f"a{ending}")
    assert (tmp_path / f"a{ending}").stat().st_size > 5000
    json.dumps(found, allow_nan=False)


def test_what_cannot_be_traced_is_refused(tokenizer):
    for spec, prompt, then, word in (
        ("random", words(9), None, "prompt"), ("oracle", words(9), None, "prompt"), ("dart", "w5", None, "two"),
        ("dart", words(9), "", "none"), ("dart", words(250), None, "256"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=word):
            traced(tokenizer, prompt, then, spec)


def test_the_command_writes_what_is_asked_for_and_the_table_can_be_used(saved_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompt.txt").write_text(words(40))
    common = ["trace", "--model", saved_llama, "--file", "prompt.txt", "--tokens", "12"]
    assert command(*common).code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["prompt.txt"]
    assert command(*common, "--output", "trace.json").code == 0
    found = json.loads((tmp_path / "trace.json").read_text())
    keep = [k / n for k, n in zip(*found["layers"].values(), strict=True)]
    (tmp_path / "layers.json").write_text(json.dumps({"keep": keep, "sizes": found["layers"]["sizes"]}))
    again = [*common, "--method", "dart:allocation=table:allocation.file=layers.json:remask=never"]
    assert command(*again, "--output", "again.json", "--plot", "again.svg").code == 0
    assert json.loads((tmp_path / "again.json").read_text())["layers"] == found["layers"]
    assert (tmp_path / "again.svg").exists()
    other = command(*again, "--sparsity", "0.7")  # the table is one of 0.5
    (tmp_path / "layers.json").write_text("{")
    for done in (other, command(*again)):
        assert done.code == 2 and "table" in done.err


# -- overhead ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["griffin", "dart", "dart-code"])
def test_overhead_is_that_of_the_real_state(monkeypatch, name):
    config = tiny("llama").config  # made here: a tiny model is made once, and where shapes are read it has no weights
    monkeypatch.setitem(shapes.SHAPES, "small", lambda: config)
    found = overhead.measure(make(name), "small", 0.5, prompts=(700, 1000))
    assert found.state_bytes[700] == found.state_bytes[1000] == sum(found.parts.values())
    neurons = 3 * 40
    assert (found.parts["masks"], found.parts["scores"], found.shared_bytes) == (neurons, neurons * 4, 0)
    # 24 inputs of each layer, which of them are real, and where the next one goes
    assert found.parts["recent inputs"] == (3 * 24 * 32 * 2 + 24 + 8 if name == "dart" else 0)
    assert (found.remask_tokens > 0) == (name != "griffin")
    if name == "dart-code":  # 30 dense tokens, each for what a pruned one saves
        model = tiny("llama")
        sizes = shape_of(model, find_ffns(model))
        saved = 1 - sizes.decode(1025, 0.5) / sizes.decode(1025)
        scoring = (30 * 5 + 3) * neurons / sizes.decode(1025)
        assert found.remask_tokens == pytest.approx(30 * saved + scoring)
    reads = {"dart": 2 / 3, "dart-code": 30 * 0.5}
    assert found.remask_read == pytest.approx(reads.get(name, 0))


@pytest.mark.parametrize("name", ["dart", "dart-code"])
def test_the_claim_of_ten_megabytes_and_a_thousandth_of_the_flops(name):
    """The paper's: under 10 MB whatever the prompt's length, overhead under 0.1 % of a dense token's FLOPs."""
    found = overhead.measure(make(name), "llama-3.1-8b", 0.7, prompts=(64, 704))
    assert max(found.state_bytes.values()) < 10**7
    assert found.decode_share < 0.001 and found.scoring_share < 0.001


# -- `make gpu-check`, on a CPU ----------------------------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch):
    """The script as a module; what importing it sets is undone."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    for name in ("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    import gpu_check

    yield gpu_check
    sys.modules.pop("gpu_check")


def test_a_wrong_product_is_seen(script, monkeypatch):
    """Down without two of its columns: the executions are told apart."""
    taken = Slot.taken

    def short(slot, neurons):
        part = taken(slot, neurons)
        if slot.dim == 1:
            part[:, -2:] = 0
        return part

    monkeypatch.setattr(Slot, "taken", short)
    with pytest.raises(AssertionError, match="griffin"):
        script.executions(dry=True)
