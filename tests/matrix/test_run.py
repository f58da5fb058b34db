"""A whole run on tiny checkpoints of hybrids and of mixtures of experts: scored and generated, from a folder."""

import pytest

from dart_eval.sweep.options import config_from
from dart_eval.util.errors import UserError
from tests.helpers.commands import Watch, run_local
from tests.matrix.types import tiny

METHODS = ("dense", "griffin", "dart")  # other choices of tokens: test_matrix.py
# Where depth has no meaning (docs/models.md).
UNIFORM = {"dart": "dart:allocation=uniform"}
OTHERWISE = {"deepseek_v4": UNIFORM, "inkling2_text": UNIFORM}

# Hybrids, a recurrence that takes one token at a time, no padding, a norm of neurons, experts of all forms, words that
# embeddings alone know.
TYPES = [
    "qwen3_5_text", "lfm2", "gemma4_text", "gemma4_text with experts", "qwen3_moe", "gpt_oss", "deepseek_v3",
    "deepseek_v4", "llama4_text", "jamba", "bitnet", "inkling2_text",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", TYPES)
def test_a_run_scores_and_generates(name, tmp_path, tokenizer):
    model = tiny(name)
    model.config.max_position_embeddings = 1024
    model.save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / name)
    methods = [OTHERWISE.get(name, {}).get(method, method) for method in METHODS]
    config = {"method": methods, "sparsity": 0.5, "tasks": "smoke_questions,smoke_summary", "limit": 2}
    config |= {"gen_kwargs": "max_gen_toks=16", "model": str(tmp_path / name), "output": str(tmp_path / "out")}
    result = run_local(config_from(None, config), Watch())
    assert not result.failed and len(result.records) == 2 * len(METHODS)
    for record in result.records:
        # Never more than the label, to the neuron that it is rounded to; less by less than a neuron of each expert.
        read = 1 - record.inputs["sparsity"]
        assert read - 0.02 < record.weights_read < read + 0.005
        assert all(m.n == 2 for m in record.metrics)


def test_what_is_not_made_for_experts_is_left_out_with_a_line(tmp_path, tokenizer):
    """Before anything runs; where nothing else was asked for, the run ends with that line."""
    tiny("qwen3_moe").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    given = {"method": "griffin,flap,teal", "sparsity": 0.5, "tasks": "smoke_questions", "limit": 1}
    given |= {"model": str(tmp_path / "model"), "output": str(tmp_path / "out")}
    watch = Watch()
    result = run_local(config_from(None, given), watch)
    assert not result.failed and [r.inputs["method"] for r in result.records] == ["griffin"]
    assert [note for note in watch.notes if "left out" in note] == [
        f"left out: {title}: {part} is not made for experts yet; take another method, or a dense model"
        for title, part in (
            ("flap at sparsity 0.5", "flap"),
            ("teal at sparsity 0.5", "teal"),
        )
    ]
    with pytest.raises(UserError, match=r"flap at sparsity 0\.5: flap is not made for experts yet"):
        run_local(config_from(None, given | {"method": "flap"}), Watch())


def test_what_does_not_fit_a_norm_of_neurons_is_left_out_too(tmp_path, tokenizer):
    tiny("bitnet").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    given = {"method": "griffin,teal", "sparsity": 0.5, "tasks": "smoke_questions", "limit": 1}
    watch = Watch()
    result = run_local(
        config_from(None, given | {"model": str(tmp_path / "model"), "output": str(tmp_path / "out")}), watch
    )
    assert not result.failed and [r.inputs["method"] for r in result.records] == ["griffin"]
    assert any(
        "left out: teal at sparsity 0.5: teal does not fit an FFN that has a norm" in note for note in watch.notes
    )
