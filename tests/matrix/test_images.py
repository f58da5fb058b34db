"""Models of images and text: their language models, for text tasks."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from tests.matrix.check import Tried, choices, generation, masked, scoring
from tests.matrix.types import IMAGES as SIDE
from tests.matrix.types import usual

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
    text_config = {**usual(CONFIG_MAPPING[text]), **more, "model_type": text}
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](text_config=text_config, vision_config=images)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.1 if p.dim() == 1 else 0.2))
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_language_model_is_pruned(kind):
    tried = Tried(tiny(kind))
    for check in (masked, generation, scoring, choices):
        check(tried)
