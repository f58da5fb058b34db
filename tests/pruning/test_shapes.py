"""Shapes of published models: their sizes, and no more layers than are asked for."""

import pytest

from dart_eval.bench import shapes
from dart_eval.util.errors import UserError


def test_shapes_have_the_sizes_of_their_models():
    for name, billions in (
        ("llama-3.1-8b", 8.03),
        ("llama-3.2-3b", 3.213),
        ("llama-3.2-1b", 1.236),
        ("qwen2.5-1.5b", 1.544),
    ):
        model = shapes.without_weights(name)
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.005)
    assert len(shapes.without_weights("llama-3.1-8b", 2).model.layers) == 2
    with pytest.raises(UserError, match="did you mean llama"):
        shapes.config("llama-3.1-8B")
