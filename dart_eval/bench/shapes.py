"""Shapes of published models, built without memory or with random weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen2Config

from dart_eval.util.errors import UserError, nearest

# From the models' published configurations.
SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama-3.1-8b": lambda: LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072, rms_norm_eps=1e-5,
    ),
    "llama-3.2-3b": lambda: LlamaConfig(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, head_dim=128,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072, rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    ),
    "llama-3.2-1b": lambda: LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, head_dim=64,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072, rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    ),
    "qwen2.5-1.5b": lambda: Qwen2Config(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, vocab_size=151936, max_position_embeddings=131072, tie_word_embeddings=True,
    ),
}  # fmt: skip


def config(name: str, layers: int | None = None) -> PretrainedConfig:
    """Return the configuration of a shape, perhaps with fewer layers.

    Raises:
        UserError: unknown name.
    """
    if name not in SHAPES:
        raise UserError(f"unknown shape {name!r}", nearest(name, SHAPES))
    shape = SHAPES[name]()
    if layers is not None:
        if layers < 1:
            raise UserError(f"--layers {layers} must be at least 1")
        shape.num_hidden_layers = layers
    return shape


def without_weights(name: str, layers: int | None = None) -> PreTrainedModel:
    """Return the model on torch's meta device, without memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config(name, layers), dtype=torch.bfloat16)


@torch.no_grad()
def with_random_weights(
    name: str, layers: int | None = None, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Return the model with random initial weights: of the right size and speed, but of no use.

    Raises:
        UserError: unknown name.
    """
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config(name, layers), dtype=dtype)
    model.generation_config.eos_token_id = None  # it must not stop by chance
    return model.eval()
