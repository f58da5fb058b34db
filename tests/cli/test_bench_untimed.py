"""`bench decode` where no kernel makes bytes into time: a row that says so, beside the methods that are timed."""

import json

import pytest
import torch

from dart_eval.bench.decode import Setting, measure
from dart_eval.bench.subject import Subject
from dart_eval.kernels.cpu import build
from dart_eval.kernels.fast import why_no_kernel
from dart_eval.layers.find import find_ffns
from dart_eval.pruning.registry import make, parse
from dart_eval.util.errors import UserError
from tests.helpers.commands import command
from tests.helpers.models import tiny
from tests.matrix import types

FEW = ("--prompt", "16", "--steps", "2", "--rounds", "1", "--sparsity", "0.5")
UNTIMED = "graded-both,oracle-token,cats,teal"


def test_rows_without_times_stand_among_those_with(saved_llama, tmp_path):
    words = ("bench", "decode", "--model", saved_llama, *FEW, "--method", f"griffin,{UNTIMED}")
    done = command(*words, "--format", "json", "--output", tmp_path)
    assert done.code == 0, done.err
    griffin, *others = json.loads(done.out)
    assert griffin["speedup"] > 0 and griffin["why"] is None
    assert [r["method"] for r in others] == UNTIMED.split(",")
    for row in others:
        assert (row["speedup"], row["control"], row["overhead"]) == (None, None, None)
        assert 0.2 < row["weights_read"] < 0.75 and row["ceiling"] > 1 and row["why"] and row["memory"] >= row["state"]
    assert others[2]["weights_read"] == pytest.approx(0.5, abs=0.01)
    assert others[0]["ceiling"] == pytest.approx(griffin["ceiling"], rel=0.02)  # bytes that are nearly as many
    files = [json.loads(file.read_text()) for file in (tmp_path / "bench").iterdir()]
    found = {speed["method"]: speed for speed in files}
    assert (found["cats"]["speedup"], found["cats"]["times"]) == (None, "bytes only")
    assert (found["griffin"]["speedup"]["median"], found["griffin"]["times"]) == (griffin["speedup"], "measured")
    assert found["teal"]["more"]["why"] == "teal has no kernel"
    table = command(*words, "--format", "md").out
    assert table.count("| bytes only ") == 4 and "cats chooses" in table
    assert "| memory MB | state MB |" in table


def test_where_nothing_can_be_timed_a_line_says_so(saved_llama):
    words = (
        "bench",
        "decode",
        "--model",
        saved_llama,
        *FEW,
        "--method",
        "graded-both,oracle-token",
        "--format",
        "md",
    )
    done = command(*words)
    assert done.code == 0 and "No method here can be timed." in done.out and "| overhead" not in done.out


def test_a_sparsity_out_of_reach_leaves_one_method_out(saved_llama):
    words = ("bench", "decode", "--model", saved_llama, *FEW, "--sparsity", "0.7", "--format", "json")
    done = command(*words, "--method", "griffin,cats")
    assert [r["method"] for r in json.loads(done.out)] == ["griffin"]
    assert "cats at sparsity 0.7 is left out: cats reads 1 of the FFN's 3 matrices whole" in done.err
    alone = command(*words, "--method", "cats")
    assert (alone.code, alone.out) == (2, "") and "error: cats at sparsity 0.7: cats reads 1" in alone.err


def refused(model, method, tokenizer=None):
    return Subject(model, tokenizer, {"name": "tiny"}, "float32").refused(make(method), 0.5)


def test_a_text_that_nothing_can_read_leaves_one_method_out():
    model = tiny("llama", torch.float32)
    assert "no tokenizer" in str(refused(model, "teal"))
    assert refused(model, "teal", object()) is refused(model, "griffin") is None


def test_what_does_not_fit_a_model_is_left_out_too():
    assert "allocation=depth does not fit this model" in str(refused(types.tiny("deepseek_v4"), "dart", object()))
    model = types.tiny("qwen3_moe")
    assert "teal is not made for experts" in str(refused(model, "teal", object()))
    assert refused(model, "griffin", object()) is None


@pytest.mark.parametrize(("method", "why"), [
    ("griffin", None), ("flap", None), ("grinqh", build.why_no_kernel()),
    ("grinqh:entries.group=32", "scales of 128 weights"),
    ("cats", "rows that cats chooses"), ("wina", "wina has no kernel"),
])  # fmt: skip
def test_which_methods_have_kernels(method, why):
    model = tiny("llama", torch.float32)
    found = why_no_kernel(make(*parse(method)), find_ffns(model))
    assert found is None if why is None else why in found


def test_weights_that_cannot_be_copied_are_counted_and_not_timed():
    model = tiny("llama", torch.float32)
    model.model.layers[2].mlp = model.model.layers[0].mlp
    assert "have one FFN" in why_no_kernel(make("griffin"), find_ffns(model))
    found = measure(model, make("griffin"), 0.7, Setting(8))
    assert found.weights_read == pytest.approx(0.3, abs=0.01) and "have one FFN" in found.why


def test_what_neither_prunes_nor_knows_only_the_past_is_refused():
    with pytest.raises(UserError, match="oracle cannot be timed"):
        measure(tiny("llama", torch.float32), make("oracle"), 0.5)
