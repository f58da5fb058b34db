"""A whole run on tiny checkpoints of hybrids and of mixtures of experts: scored and generated, from a folder."""

from dataclasses import replace

import pytest

from dart_eval.cluster.run import run_cell
from dart_eval.models.loading import ModelSpec, resolve
from dart_eval.results.store import Journal
from dart_eval.sweep.events import silent
from dart_eval.sweep.options import config_from
from dart_eval.sweep.run import begin_sweep
from dart_eval.util.errors import UserError
from tests.helpers.commands import Watch, run_local
from tests.matrix import test_images
from tests.matrix.types import tiny

# Where depth has no meaning (docs/models.md).
OTHERWISE = dict.fromkeys(("deepseek_v4", "inkling2_text"), "griffin,dart:allocation=uniform")

# Hybrids, a recurrence that takes one token at a time, no padding, a norm of neurons, experts of all forms, words that
# embeddings alone know, images beside text.
TYPES = [
    "qwen3_5_text", "lfm2", "gemma4_text", "gemma4_text with experts", "qwen3_moe", "gpt_oss", "deepseek_v3",
    "deepseek_v4", "llama4_text", "jamba", "bitnet", "inkling2_text", "mistral3", "qwen3_vl",
]  # fmt: skip


@pytest.fixture
def config(tmp_path, tokenizer):
    """Makes the configuration of a run of a type, whose model it saves."""

    def made(name, **given):
        model = test_images.tiny(name) if name in test_images.KINDS else tiny(name)
        model.config.get_text_config().max_position_embeddings = 1024
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        found = resolve(ModelSpec(str(tmp_path / "model")))
        assert type(found.outline()) is type(model)
        asked = {"sparsity": 0.5, "tasks": "smoke_questions", "limit": 1, "output": str(tmp_path / "out")}
        return config_from(None, {**asked, "model": str(tmp_path / "model"), **given})

    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", TYPES)
def test_a_run_scores_and_generates(name, config):
    more = {"tasks": "smoke_questions,smoke_summary", "limit": 2, "gen_kwargs": "max_gen_toks=4"}
    result = run_local(config(name, method=OTHERWISE.get(name, "griffin,dart"), **more), Watch())
    assert not result.failed and len(result.records) == 4
    for record in result.records:
        # Never more than the label, to the neuron that it is rounded to; less by less than a neuron of each expert.
        assert 0.48 < record.weights_read < 0.505
        assert all(m.n == 2 for m in record.metrics)


@pytest.mark.parametrize(("name", "fits_not"), [
    ("qwen3_moe", ["flap", "teal"]), ("bitnet", ["teal"]),
    ("doge", ["dart"]), ("hrm_text", ["dart"]),  # what the loaded model shows
])  # fmt: skip
def test_methods_that_do_not_fit_the_ffns_are_left_out_and_the_others_run(name, fits_not, config):
    """Where nothing else was asked for, there is no run."""
    watch, asked = Watch(), config(name, method=["griffin", *fits_not])
    result = run_local(asked, watch)
    assert not result.failed and [r.inputs["method"] for r in result.records] == ["griffin"]
    assert [note.split()[2] for note in watch.notes if "left out" in note] == fits_not
    with pytest.raises(UserError, match=fits_not[0]):
        run_local(config(name, method=fits_not[0]), Watch())


def test_a_node_of_a_cluster_says_so_too(config):
    asked = config("doge", method="dart")
    (key,) = begin_sweep([asked], silent).cells
    made = run_cell(asked, key, Journal(), replace(asked, device="cpu"), ".")
    assert made.misfit is not None and made.record is None and made.failure == ("", "")
