"""Models of images and text: their language models, for text tasks."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from dart_eval.models.loading import ModelSpec, resolve
from dart_eval.sweep.options import config_from
from tests.helpers.commands import Watch, run_local
from tests.matrix.check import CHECKS
from tests.matrix.types import _usual

SIDE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
PIXELS = {**SIDE, "image_size": 28, "patch_size": 14}
QWEN = {**SIDE, "depth": 1, "num_heads": 4, "out_hidden_size": 32, "num_position_embeddings": 16}
ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
# type -> the type of its text, more of it, and its images
KINDS = {
    "gemma3": ("gemma3_text", {}, SIDE),
    "llava": ("llama", {}, {**PIXELS, "model_type": "clip_vision_model"}),
    "mistral3": ("mistral", {}, {**PIXELS, "model_type": "pixtral", "head_dim": 8}),
    "qwen3_vl": ("qwen3_vl_text", ROTARY, {**QWEN, "deepstack_visual_indexes": [0]}),
    "qwen3_vl_moe": ("qwen3_vl_moe_text", ROTARY, {**QWEN, "deepstack_visual_indexes": [0]}),
}


def tiny(kind):
    text, more, images = KINDS[kind]
    text_config = {**_usual(CONFIG_MAPPING[text]), **more, "model_type": text}
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](text_config=text_config, vision_config=images)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.1 if p.dim() == 1 else 0.2))
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.slow
@pytest.mark.parametrize("claim", ["masked", "generation", "scoring", "choices"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_language_model_is_pruned(kind, claim):
    CHECKS[claim](tiny(kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mistral3", "qwen3_vl"])
def test_a_run_loads_it_for_text_tasks(kind, tmp_path, tokenizer):
    model = tiny(kind)
    model.config.get_text_config().max_position_embeddings = 1024
    model.save_pretrained(tmp_path / kind)
    tokenizer.save_pretrained(tmp_path / kind)
    found = resolve(ModelSpec(str(tmp_path / kind)))
    assert type(found.load()[0]) is type(found.outline()) is type(model)
    given = {"method": "dense,griffin", "sparsity": 0.5, "tasks": "smoke_questions,smoke_summary", "limit": 2}
    given |= {"model": str(tmp_path / kind), "output": str(tmp_path / "out")}
    result = run_local(config_from(None, given), Watch())
    assert not result.failed and len(result.records) == 4
    assert all(r.weights_read == pytest.approx(1 - r.inputs["sparsity"], abs=0.01) for r in result.records)
