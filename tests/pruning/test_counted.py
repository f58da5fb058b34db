"""What is charged is what is read: without a context, after a release, on published shapes."""

import json

import pytest
import torch
from transformers import LlamaConfig

from dart_eval.bench import overhead, shapes, tracing
from dart_eval.evaluation.costs import Cost
from dart_eval.evaluation.requests import Request
from dart_eval.evaluation.scoring import scorer
from dart_eval.pruning.registry import BUILT_IN, make, parse
from tests.helpers.commands import command
from tests.helpers.models import SMALL, random_tokens, save_tiny, tiny, word_tokenizer
from tests.helpers.requests import output_head_of
from tests.helpers.sessions import open_session


def test_tokens_without_a_context_read_all_weights():
    model = tiny("llama", torch.float32)
    with open_session(model, "dart", 0.5, remask="never") as session:
        scoring = scorer(model, output_head_of(model, session), session, 2)
        costs = []
        for context in (1, 9):  # all but the last token of a context make its densities
            asked = [Request(random_tokens(context, seed=1), random_tokens(4, seed=2))]
            costs.append(sum((a.cost for u in scoring.units(asked) for _, a in scoring.run(u)), Cost()))
    assert (costs[0].pruned_tokens, costs[0].not_read_sum, costs[0].outside_sum) == (0, 0, 0)
    assert costs[1].pruned_tokens == 4 and costs[1].read == pytest.approx(0.5, abs=0.01)
    assert sum(costs, Cost()).read == costs[1].read


def test_a_pruned_token_reads_no_more_after_its_masks_are_released():
    prompt = " ".join(f"w{4 + i}" for i in range(30))
    model = tiny("llama", torch.float32)
    found = tracing.trace(
        model, word_tokenizer(), make("dart", {"remask": "never", "remask.release": 4}), 0.7, prompt, None, tokens=12
    )
    assert found["weights_read"] == pytest.approx(0.3)
    assert found["effective_sparsity"] == pytest.approx(4 * (1 - found["weights_read"]) / 12)


@pytest.mark.parametrize("spec", [*(name for name in BUILT_IN if name != "dense"), "rounding:entries.bits=4"])
def test_every_method_is_counted_on_a_shape(spec, monkeypatch):
    monkeypatch.setitem(
        shapes.SHAPES, "small", lambda: LlamaConfig(**{**SMALL, "hidden_size": 256, "intermediate_size": 512})
    )
    found = overhead.measure(make(*parse(spec)), "small", 0.6, (16, 40), 40)
    assert all(n >= 0 for n in found.parts.values()) and found.state_bytes[40] == sum(found.parts.values())


def test_a_prompt_longer_than_a_models_positions_is_refused(tmp_path):
    folder = save_tiny(tmp_path / "model", word_tokenizer(), "gpt2")
    (tmp_path / "model" / "config.json").write_text(
        json.dumps({**json.loads((tmp_path / "model" / "config.json").read_text()), "n_positions": 256})
    )
    done = command("bench", "decode", "--model", folder, "--method", "griffin", "--prompt", "250", "--steps", "7")
    assert done.code == 2 and "257 tokens, the model takes 256; give a shorter --prompt" in done.err
