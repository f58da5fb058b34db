"""Re-masks, means and the depth-aware allocation of experts, by hand from what stock experts are given."""

from contextlib import contextmanager

import pytest
import torch

from dart_eval.layers.find import find_ffns
from dart_eval.pruning.registry import methods
from tests.helpers.sessions import RESTLESS, bits, generate, open_session, prompts_of, same
from tests.matrix.types import tiny

LAYER = 1


@contextmanager
def watching(model):
    """(x [N, D], experts [N, count], weights [N, count], answer [N, D]) of each forward of one layer's experts."""
    seen = []
    experts = model.model.layers[LAYER].mlp.experts
    hook = experts.register_forward_hook(lambda _m, args, out: seen.append((*args, out)))
    try:
        yield seen
    finally:
        hook.remove()


def hidden(experts, x, expert):
    """[I], h of one token in one expert, without the router's weight: SwiGLU, or gpt-oss's clamped gate."""
    if hasattr(experts, "gate_up_proj_bias"):
        made = x @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
        gate, up = made[::2].clamp(max=7.0), made[1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    gate, up = (experts.gate_up_proj[expert] @ x).chunk(2)
    return gate * torch.sigmoid(gate) * up


@torch.no_grad()
def of_token(experts, x, index, weights):
    """[E, I], h of one token with the router's weights; 0 for experts that it does not have."""
    found = [hidden(experts, x, e) * w for e, w in zip(index.tolist(), weights, strict=True)]
    h = torch.zeros(len(experts.down_proj), len(found[0]))
    for expert, part in zip(index.tolist(), found, strict=True):
        h[expert] = part
    return h


def columns(experts):
    """[E, D, I], down of every expert."""
    return experts.down_proj.mT if hasattr(experts, "gate_up_proj_bias") else experts.down_proj


def _row(row, *tensors):
    """What one of two sequences has in each of them."""
    return [t.view(2, -1, t.shape[-1])[row] for t in tensors]


EVERY = {"allocation": "uniform", **RESTLESS, "remask.blend": 0.2}
DENSE = {"allocation": "uniform", **RESTLESS, "remask.dense_tokens": 2, "remask.blend": 0.3}


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize(("params", "steps", "old", "recent"), [
    (EVERY, 3, 0.2, [-5, -4, -3, -2, -1]),  # two tokens of the prompt, three that were decoded
    ({**EVERY, "remask.blend": 0.0}, 3, 0.0, [-5, -4, -3, -2, -1]),
    (DENSE, 5, 0.3, [-2, -1]),  # an alarm after the third decoded token, then two dense ones
])  # fmt: skip
def test_a_new_mask_is_made_from_recent_tokens_under_their_own_experts(name, params, steps, old, recent):
    model, prompts = tiny(name), prompts_of(2, 9)
    experts, before = model.model.layers[LAYER].mlp.experts, bits(model)
    with watching(model) as seen, open_session(model, "dart", 0.5, "masked", **params) as session:
        seen.clear()  # the trial forwards
        generate(model, prompts, steps + 1)
        assert session.remasks == [1, 1]
        masks = session.rows.mask[LAYER]
        assert torch.equal(find_ffns(model)[LAYER].routed.index, seen[-1][1])  # of the forward before it
        first = [event["overlap"][LAYER] for event in session.events]
    assert same(model, before)
    for row in range(2):
        tokens = [t for x, at, w, _ in seen for t in zip(*_row(row, x, at, w), strict=True)]
        scores = []
        for token in tokens:
            h = of_token(experts, *token)
            scores.append(h.square())
        prompt, late = sum(scores[:9]) / 9, sum(scores[i] for i in recent) / len(recent)
        unseen = (late == 0).all(-1, keepdim=True)  # experts that no recent token had keep their old scores
        new = old * prompt + (1 - old) * torch.where(unseen, prompt, late)
        never = (new == 0).all(-1, keepdim=True)
        new = torch.where(never, columns(experts).norm(dim=1), new)
        best = torch.zeros_like(new, dtype=torch.bool)
        best.scatter_(1, new.topk(new.shape[1] // 2).indices, True)
        assert torch.equal(masks[row].view_as(best), best)
        assert 0 < first[row] < 1


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_depth_goes_by_what_all_experts_of_a_layer_add(name):
    model, prompt = tiny(name), prompts_of(1, 10)
    layer, found = model.model.layers[LAYER], {}
    with torch.no_grad(), open_session(model, "dart", 0.5, "masked") as session:
        hooks = [
            layer.post_attention_layernorm.register_forward_pre_hook(lambda _m, args: found.update(y=args[0][0])),
            layer.register_forward_hook(lambda _m, _a, out: found.update(after=out)),
        ]  # fmt: skip
        model(input_ids=prompt, use_cache=True)
        for hook in hooks:
            hook.remove()
        cosine, change = session.rows.change.cosine[0, LAYER], session.rows.change.change[0, LAYER]
    y, z = found["y"], torch.as_tensor(found["after"]).view(10, -1) - found["y"]
    wanted = [float((a @ b) / a.norm() / b.norm()) for a, b in zip(y, z, strict=True)]
    moved = [float((b - a).norm() / a.norm()) for a, b in zip(y, z, strict=True)]
    assert float(cosine) == pytest.approx(sum(wanted), rel=1e-3, abs=1e-3)
    assert float(change) == pytest.approx(sum(moved), rel=1e-3)


EVERY_METHOD = [cls() for cls in methods().values() if cls.prunes and not cls.looks_ahead and cls.fits_experts]


@pytest.mark.parametrize("method", [
    pytest.param(m, marks=[] if i % 5 == 0 else [pytest.mark.slow]) for i, m in enumerate(EVERY_METHOD)
], ids=lambda m: m.spec)  # fmt: skip
def test_every_method_runs_on_experts(method):
    """Without sparsity as dense; with it never above the label, the same alone and in a batch."""
    model, prompts = tiny("qwen3_moe"), prompts_of(2, 12)
    dense = generate(model, prompts, 5)
    if method.sized:
        with open_session(model, method, 0.0, "masked"):
            assert torch.equal(generate(model, prompts, 5).sequences, dense.sequences)
    sparsity = 0.5 if "bits" in method.granularity else 0.4  # weights of 8 bits are half
    with open_session(model, method, sparsity, "masked") as session:
        together = generate(model, prompts, 5)
        reads = torch.stack([step.read for step in session.steps])
    if method.sized:
        most = round((1 - sparsity) * 128) / 128
        assert bool((reads <= most + 1e-9).all()) and bool((reads >= 0.45).all())
    with open_session(model, method, sparsity, "masked"):
        alone = generate(model, prompts[1:], 5)
    logits = [torch.stack([step[row] for step in run.logits]) for run, row in ((together, 1), (alone, 0))]
    assert torch.allclose(*logits, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(together.logits[1], dense.logits[1])
