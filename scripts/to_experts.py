"""Turn a dense Llama or Qwen2 model into a mixture of experts (Qwen2-MoE), after MoEfication (arXiv 2110.01786).

    python scripts/to_experts.py MODEL FOLDER
    python scripts/to_experts.py MODEL FOLDER --spread 1

Neurons of a layer that are active for the same tokens of the calibration text become one expert. The router is linear:
it is fitted by least squares to the norms of the experts' outputs on that text. The `--shared` most active neurons make
the shared expert, which the type must have.

- Router weights are a softmax over all experts. With `--spread 0` logits are so small that every weight is 1 / E in
  bfloat16, and only their order counts. Rows of down are multiplied by E. A token with all experts has the dense
  model's output, up to rounding.
- With a larger spread (the standard deviation of a token's logits) weights differ from expert to expert, as in trained
  mixtures. Each expert's down is scaled to be right on average (least squares), and no longer for each token.

No weight is trained. A converted model stands for mixtures of experts as far as its router does.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

from dart_eval.layers.ffn import FFN
from dart_eval.layers.find import find_ffns
from dart_eval.models.loading import ModelSpec, resolve
from dart_eval.pruning.calibration.calibration import Calibration, Passages

ROUNDS = 6  # of k-means
RIDGE = 1e-2  # of the mean square of x
SMALL = 2.0**-12  # largest logit on the text: weights then differ by less than bfloat16 shows


def alike(activity: Tensor, experts: int) -> Tensor:
    """Return [experts, n / experts], the neurons of each expert: spherical k-means with clusters of one size.

    Args:
        activity: [T, n], how active each neuron is for each token.
    """
    points = torch.nn.functional.normalize(activity.T - activity.T.mean(0), dim=1)
    size = len(points) // experts
    centres = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:experts]]
    for _ in range(ROUNDS):
        near = points @ centres.T
        best = near.topk(2, dim=1).values
        own = torch.full((len(points),), -1)
        room = [size] * experts
        order = near.argsort(dim=1, descending=True).tolist()
        for neuron in (best[:, 0] - best[:, 1]).argsort(descending=True).tolist():  # those that lose most go first
            own[neuron] = next(e for e in order[neuron] if room[e])
            room[own[neuron]] -= 1
        members = own.argsort(stable=True).view(experts, size)
        centres = torch.nn.functional.normalize(points[members].mean(1), dim=1)
    return members


def router(x: Tensor, norms: Tensor, spread: float) -> Tensor:
    """Return [E, D], whose products with x order experts as the norms of their outputs do.

    Args:
        x: [T, D]. norms: [T, E]. spread: standard deviation of a token's logits; 0: almost none.
    """
    wanted = norms - norms.mean(1, keepdim=True)
    gram = x.T @ x
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    weight = torch.linalg.solve(gram + ridge, x.T @ wanted).T
    logits = x @ weight.T
    return weight * (spread / logits.std(1).mean() if spread else SMALL / logits.abs().max())


def layer(ffn: FFN, x: Tensor, h: Tensor, settings: argparse.Namespace) -> dict[str, Tensor]:
    """Return the weights of an FFN as experts, by their names in the mixture. x: [T, D]. h: [T, F]."""
    gate, up, down = (ffn.matrix(m).detach() for m in ffn.projections)
    columns = down.float()
    activity = h.abs() * columns.norm(dim=0)
    ranked = activity.mean(0).argsort(descending=True)
    shared, rest = ranked[: settings.shared], ranked[settings.shared :].sort().values
    members = rest[alike(activity[:, rest], settings.experts)]
    norms = torch.stack([(h[:, m] @ columns[:, m].T).norm(dim=1) for m in members], 1)
    weight = router(x, norms, settings.spread).to(gate.dtype)
    scale = torch.full((settings.experts,), float(settings.experts))
    if settings.spread:
        given = (x @ weight.float().T).softmax(1)
        given = given * (given >= given.topk(settings.per_token, dim=1).values[:, -1:])
        scale = (given * norms.square()).sum(0) / (given * norms).square().sum(0)
    return {
        "gate.weight": weight,
        "experts.gate_up_proj": torch.cat([gate[members], up[members]], 1),
        "experts.down_proj": (columns[:, members].transpose(0, 1) * scale[:, None, None]).to(down.dtype),
        "shared_expert.gate_proj.weight": gate[shared],
        "shared_expert.up_proj.weight": up[shared],
        "shared_expert.down_proj.weight": down[:, shared] * 2,  # its own gate is sigmoid(0)
        "shared_expert_gate.weight": torch.zeros(1, gate.shape[1], dtype=gate.dtype),
    }


@torch.no_grad()
def converted(model: PreTrainedModel, tokenizer: object, settings: argparse.Namespace) -> PreTrainedModel:
    """Return the mixture of experts. settings: experts, per_token, shared, spread, tokens."""
    plain: dict[str, Any] = model.config.to_dict()
    inner = plain["intermediate_size"] - settings.shared
    if inner % (settings.experts * 8):  # torch's grouped products take rows of 16 bytes
        raise SystemExit(f"{inner} neurons are no {settings.experts} experts of 8, 16 ... each: give another --shared")
    ffns = find_ffns(model)
    seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in ffns]
    calibration = Calibration(model, tokenizer, passages=Passages(settings.tokens))
    calibration.visit(lambda at, x, h: seen[at].append((x.bfloat16(), h.bfloat16())))
    state = {name: value for name, value in model.state_dict().items() if ".mlp." not in name}
    for ffn, parts in zip(ffns, seen, strict=True):
        x, h = (torch.cat(some).float() for some in zip(*parts, strict=True))
        state |= {f"model.layers.{ffn.number}.mlp.{k}": v for k, v in layer(ffn, x, h, settings).items()}
        parts.clear()
    biases = "model.layers.0.self_attn.q_proj.bias" in state
    for name in ("architectures", "model_type", "quantization_config", "sliding_window", "layer_types"):
        plain.pop(name, None)
    config = Qwen2MoeConfig(
        **plain, qkv_bias=biases, num_experts=settings.experts, num_experts_per_tok=settings.per_token,
        norm_topk_prob=False, moe_intermediate_size=inner // settings.experts,
        shared_expert_intermediate_size=settings.shared,
    )  # fmt: skip
    mixture = Qwen2MoeForCausalLM(config).eval()
    mixture.load_state_dict(state, assign=True)
    mixture.generation_config = model.generation_config
    return mixture


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or GGUF file of a dense Llama or Qwen2 model")
    parser.add_argument("folder", help="where the mixture is written")
    parser.add_argument("--experts", type=int, default=16, help="of a layer")
    parser.add_argument("--per-token", type=int, default=12, help="experts of a token")
    parser.add_argument("--shared", type=int, default=128, help="neurons of the shared expert")
    parser.add_argument("--spread", type=float, default=0.0, help="standard deviation of a token's logits")
    parser.add_argument("--tokens", type=int, default=4096, help="of the calibration text")
    return parser


if __name__ == "__main__":
    given = arguments().parse_args()
    dense, own = resolve(ModelSpec(given.model, dtype="bfloat16")).load()
    converted(dense, own, given).save_pretrained(given.folder)
    own.save_pretrained(given.folder)
    print("wrote", given.folder)
