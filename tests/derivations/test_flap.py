"""FLAP (arXiv 2312.11983) on the FFN alone, its "AL-MM".

Of the tokens t of a calibration text, which the dense model reads, neuron j has the fluctuation

    s_j = 1/N sum_t (h_tj - m_j)^2 * ||d_j||_2^2,      m_j = 1/N sum_t h_tj,     d_j the neuron's column of down

Scores of different layers are made alike, z_j = (s_j - mean of the layer's) / their unbiased standard deviation, and
all neurons stand in one ranking: the k largest z are kept, k = (1 - sparsity) of all, every layer's best one first.
What the others add on average is a constant of every layer, for every text:

    b = sum over pruned j of d_j m_j

The authors' code has another quantity in place of the variance. It goes through passages p_1, p_2, ... of T tokens:

    mean <- mean * (n - 1) / n + mean of p_n / n
    s    <- s * (n - 2) / (n - 1) + sum_t (p_nt - mean)^2 / n     (the new mean; nothing for n = 1)
"""

import numpy as np
import pytest
import torch

from dart_eval.bench.overhead import measure
from dart_eval.layers.find import find_ffns
from dart_eval.layers.shape import shape_of
from dart_eval.pruning.calibration import Calibration
from dart_eval.pruning.cost import overhead
from dart_eval.pruning.methods.flap import Flap
from dart_eval.pruning.methods.griffin import WandaSP
from dart_eval.pruning.registry import make
from dart_eval.pruning.rows import nbytes
from dart_eval.pruning.session import prune
from tests.derivations import ours
from tests.derivations.plain import Plain
from tests.derivations.test_static import OneText, passages, rows_and_column
from tests.helpers.matrices import in_turn
from tests.helpers.models import biased, random_tokens, tiny

PROMPT, DECODED = random_tokens(8, seed=1), random_tokens(4, seed=2)


def code_variance(found):
    """What the authors' code computes."""
    mean, s = 0, 0
    for n, p in enumerate(found, 1):
        mean = mean * (n - 1) / n + p.mean(0) / n
        if n > 1:
            s = s * (n - 2) / (n - 1) + ((p - mean) ** 2).sum(0) / n
    return s


def ranked(scores, sparsity):
    """The masks of all layers from one ranking."""
    z = [(s - s.mean()) / s.std(ddof=1) for s in scores]
    kept = [{int(layer.argmax())} for layer in z]
    order = sorted(((value, i, j) for i, layer in enumerate(z) for j, value in enumerate(layer)), reverse=True)
    budget = round((1 - sparsity) * len(order)) - len(kept)
    for _, i, j in order:
        if budget and j not in kept[i]:
            kept[i].add(j)
            budget -= 1
    return [torch.tensor([j in some for j in range(len(layer))]) for some, layer in zip(kept, z, strict=True)]


@pytest.mark.parametrize(("family", "variance"), in_turn(["llama", "gemma3", "opt", "gpt2", "phi3"], ["true", "code"]))
def test_flap_is_its_formula(family, variance):
    model, sparsity, scores, constants = biased(family), 0.63, [], []
    text = passages(model)
    for i, found in enumerate(text):
        down = rows_and_column(model, i)[1]
        spread = np.concatenate(found).var(0) if variance == "true" else code_variance(found)
        scores.append(spread * (down**2).sum(1))
    masks = ranked(scores, sparsity)
    for i, found in enumerate(text):
        mean = np.concatenate(found).mean(0)
        constants.append(torch.from_numpy((mean * ~masks[i].numpy()) @ rows_and_column(model, i)[1]))
    found = ours.run(model, "flap", PROMPT, DECODED, sparsity, tokenizer=OneText(), **{"score.variance": variance})
    assert len({int(m.sum()) for m in masks}) > 1  # the ranking does spread
    found.check(masks, Plain(model).masked(PROMPT, DECODED, masks, constants), atol=2e-6)
    # Bytes by hand: of the masks' neurons all matrices, of the others none.
    assert found.read == pytest.approx([sum(int(m.sum()) for m in masks) / sum(map(len, masks))] * len(DECODED))


def test_its_bytes_and_flops_are_those_of_masks_and_constants():
    model = tiny("llama")
    with prune(model, "flap", 0.5, tokenizer=OneText()) as session:
        out = model(torch.tensor([PROMPT]), use_cache=True)
        before = session.state_bytes
        assert before == nbytes(session.rows)
        model(torch.tensor([DECODED[:1]]), use_cache=True, past_key_values=out.past_key_values)
        kept = session.ffns
        layers, width, size = len(kept), kept[0].width, kept[0].size
        assert session.method.nbytes() == layers * (size + 4 * width)  # a byte a neuron, fp32 constants
        assert session.rows.sums == [None] * layers
    added = overhead(make("flap"), shape_of(model, find_ffns(model)), 100, 0.5)
    assert (added.prefill, added.decode_step, added.remask) == (0, layers * width, 0)


def shifted(model, layer, by):
    """Have a constant added to a layer's h, and what it then writes taken away."""
    ffn = find_ffns(model)[layer]
    more = torch.full((ffn.size,), by, dtype=torch.float64)
    written = ffn.write(more)
    ffn.down.register_forward_pre_hook(lambda _m, args: (args[0] + more,))
    ffn.down.register_forward_hook(lambda _m, _args, out: out - written)


@pytest.mark.parametrize("method", [Flap(), Flap(score_variance="code"), WandaSP()], ids=lambda method: method.spec)
def test_a_constant_on_h_moves_wandas_score_and_not_flaps(method):
    def score(model):
        calibration = Calibration(model, OneText())
        method.fit(calibration.ffns, 0.5, calibration)
        return method.scores(calibration)[1]

    before, moved = score(tiny("llama")), tiny("llama")
    shifted(moved, 1, 5.0)
    assert torch.allclose(score(moved), before, rtol=1e-4) == isinstance(method, Flap)


def test_the_ranking_keeps_exactly_k_and_one_neuron_of_every_layer():
    heavy, flat = torch.tensor([100.0] + [0.0] * 19), torch.arange(20.0)
    for sparsity in (0.0, 0.3, 0.85, 0.9, 0.95, 0.97):
        method = Flap()
        method.sparsity = sparsity
        counts = [round(20 * share) for share in method.densities([heavy, flat, torch.ones(20)])]
        assert sum(counts) == round((1 - sparsity) * 60)
        assert min(counts) >= (1 if sum(counts) >= 3 else 0)


def test_what_it_keeps_is_counted_for_a_model_of_which_no_weights_are_at_hand():
    for method, constants in (("flap", 16 * 2048 * 4), ("wanda-sp", 0)):
        found = measure(make(method), "llama-3.2-1b", 0.5, prompts=(16,))
        assert (found.shared_bytes, found.parts["masks"]) == (16 * 8192 + constants, 0)
