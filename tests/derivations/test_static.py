"""The rivals with one mask for all texts, which no prompt changes. Each keeps the same share in every layer.

`magnitude`, the static baseline of GRIFFIN (arXiv 2404.01365): rows of gate and up, w_j and v_j, or up alone, have

    s_j = ||w_j||_2 * ||v_j||_2

`static` is GRIFFIN's score with the tokens t of a calibration text in place of those of a prompt:

    s_j = || ( h_tj / ||h_t||_2 )_t ||_2
"""

import numpy as np
import pytest
import torch

from tests.derivations import ours
from tests.derivations.plain import Plain, alike
from tests.derivations.test_wanda_sp import OneText, passages
from tests.helpers.matrices import in_turn
from tests.helpers.models import biased, random_tokens


def rows_and_column(model, layer):
    """The matrices into h, [F, D] each, and down as [F, D]."""
    kind = model.config.model_type
    if kind == "gpt2":
        mlp = model.transformer.h[layer].mlp
        weights = [mlp.c_fc.weight.T], mlp.c_proj.weight
    elif kind == "opt":
        block = model.model.decoder.layers[layer]
        weights = [block.fc1.weight], block.fc2.weight.T
    else:
        mlp = model.model.layers[layer].mlp
        both = mlp.gate_up_proj.weight.chunk(2) if kind == "phi3" else (mlp.gate_proj.weight, mlp.up_proj.weight)
        weights = list(both), mlp.down_proj.weight.T
    return [w.detach().numpy() for w in weights[0]], weights[1].detach().numpy()


def magnitude(model, layer):
    rows, _ = rows_and_column(model, layer)
    return np.prod([np.sqrt((w**2).sum(1)) for w in rows], axis=0)


def static(model, layer):
    votes = (h / np.sqrt((h**2).sum(1, keepdims=True)) for h in passages(model)[layer])
    return np.sqrt(sum((v**2).sum(0) for v in votes))


@pytest.mark.parametrize(("family", "name"), in_turn(["llama", "opt", "gpt2", "phi3"], ["magnitude", "static"]))
def test_one_mask_for_all_texts_is_its_formula(family, name):
    model, sparsity = biased(family), 0.63
    score = {"magnitude": magnitude, "static": static}[name]
    masks = alike([torch.from_numpy(score(model, i)) for i in range(len(Plain(model).layers))], sparsity)
    for seed in (1, 2):  # whatever the prompt
        found = ours.run(model, name, random_tokens(8, seed), random_tokens(2, 9), sparsity, tokenizer=OneText())
        assert all(ours.same_masks(now, masks) for now in found.masks)
