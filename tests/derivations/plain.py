"""A model run by hand, one sequence at a time: what its FFNs see and make, and which neurons count. Nothing of ours.

Of the last forward of a `Plain` each layer's `seen` has, for its T tokens, D features and F neurons,

    x     [T, D]  what enters the FFN
    a, u  [T, F]  act(gate x) and up x; of an FFN without a gate act(up x), and None
    h     [T, F]  a * u, or a: the activations of the neurons, which the down projection multiplies
    y, z  [T, D]  the residual stream before the FFN, and what the FFN adds to it
    o     [T, D]  the attention's output, after its projection
"""

import inspect
import math
from types import SimpleNamespace

import torch


def layers_of(model):
    """Per layer: where x, y, z and o are to be seen, x -> (a, u), and the down projection."""
    kind = model.config.model_type
    if kind == "gpt2":
        return [
            SimpleNamespace(
                x=layer.mlp, y=layer.ln_2, z=layer.mlp.c_proj, o=layer.attn.c_proj, down=layer.mlp.c_proj,
                parts=lambda x, mlp=layer.mlp: (mlp.act(mlp.c_fc(x)), None),
            )
            for layer in model.transformer.h
        ]  # fmt: skip
    if kind == "opt":
        return [
            SimpleNamespace(
                x=layer.fc1, y=layer.final_layer_norm, z=layer.fc2, o=layer.self_attn.out_proj, down=layer.fc2,
                parts=lambda x, layer=layer: (layer.activation_fn(layer.fc1(x)), None),
            )
            for layer in model.model.decoder.layers
        ]  # fmt: skip
    made = []
    for layer in model.model.layers:
        mlp, y, z = layer.mlp, layer.post_attention_layernorm, layer.mlp.down_proj
        if kind == "gemma3_text":  # norms before and after the FFN
            y, z = layer.pre_feedforward_layernorm, layer.post_feedforward_layernorm
        made.append(SimpleNamespace(x=mlp, y=y, z=z, o=layer.self_attn.o_proj, down=mlp.down_proj, parts=gated(mlp)))
    return made


def cache_name(model):
    """What the KV cache is called, which transformers 5 has changed."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def gated(mlp):
    """x -> act(gate x), up x, of a Llama's FFN or a Phi-3's, whose first matrix is both."""

    def parts(x):
        if hasattr(mlp, "gate_up_proj"):
            gate, up = mlp.gate_up_proj(x).chunk(2, dim=-1)
            return mlp.activation_fn(gate), up
        return mlp.act_fn(mlp.gate_proj(x)), mlp.up_proj(x)

    return parts


def counts(wanted, total):
    """Whole numbers that sum to `total`: each `wanted` rounded down, then one more where most was cut off.

    If that is too few or too many still (shares of a budget that were clipped), so on, one by one.
    """
    found = [math.floor(w + 1e-9) for w in wanted]  # (1 - 0.7) * 10 is 2.9999999999999996 or 3.0000000000000004
    while sum(found) != total:
        step = 1 if sum(found) < total else -1
        left = [step * (w - n) for w, n in zip(wanted, found, strict=True)]
        found[left.index(max(left))] += step
    return found


def largest(scores, count):
    """[F] bool: the `count` largest scores, of equal ones the first."""
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[scores.argsort(descending=True, stable=True)[:count]] = True
    return mask


def alike(scores, sparsity, choose=lambda scores, count, layer: largest(scores, count)):
    """Masks that keep the same share of every layer, of the neurons with the largest scores."""
    sizes = [len(s) for s in scores]
    keep = counts([(1 - sparsity) * f for f in sizes], round((1 - sparsity) * sum(sizes)))
    return [choose(s, k, layer) for layer, (s, k) in enumerate(zip(scores, keep, strict=True))]


class Plain:
    """A model that is fed one sequence through its KV cache."""

    def __init__(self, model):
        self.model, self.layers, self.cache, self.seen = model, layers_of(model), None, None
        self.cache_name = cache_name(model)

    @torch.no_grad()
    def run(self, tokens, change=None, constants=None):
        """Feed these tokens; log-probabilities of what follows each, [T, V].

        change: (index of the layer, h) -> the h that is multiplied. constants: per layer, added to the FFN's output.
        """
        self.seen = [SimpleNamespace() for _ in self.layers]
        hooks = [hook for i in range(len(self.layers)) for hook in self._hooks(i, change, constants)]
        past = {} if self.cache is None else {self.cache_name: self.cache}
        out = self.model(torch.tensor([tokens]), use_cache=True, **past)
        self.cache = getattr(out, self.cache_name)
        for hook in hooks:
            hook.remove()
        return out.logits[0].log_softmax(-1)

    def masked(self, prompt, decoded, masks, constants=None):
        """The same of a prompt that runs dense, and of tokens that run under one mask for each layer."""
        rows = [self.run(prompt), *(self.run([t], lambda i, h: h * masks[i], constants) for t in decoded)]
        return torch.cat(rows)

    def _hooks(self, index, change, constants):
        layer, seen = self.layers[index], self.seen[index]

        def keep(name, value):
            setattr(seen, name, value.reshape(-1, value.shape[-1]))

        def before_down(_module, args):
            keep("h", args[0])
            seen.a, seen.u = layer.parts(seen.x)
            return None if change is None else (change(index, seen.h).view(args[0].shape),)

        def after_down(_module, _args, out):
            return None if constants is None else out + constants[index]

        return [
            layer.x.register_forward_pre_hook(lambda _module, args: keep("x", args[0])),
            layer.y.register_forward_pre_hook(lambda _module, args: keep("y", args[0])),
            layer.o.register_forward_hook(lambda _module, _args, out: keep("o", out)),
            layer.down.register_forward_pre_hook(before_down),
            layer.down.register_forward_hook(after_down),
            layer.z.register_forward_hook(lambda _module, _args, out: keep("z", out)),
        ]
