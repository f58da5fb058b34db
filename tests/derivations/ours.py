"""The package on the same tokens: all that the derivations of methods ask of it."""

from dataclasses import dataclass

import torch

from dart_eval.pruning.registry import make
from dart_eval.pruning.session import prune
from tests.derivations.plain import cache_name


@dataclass
class Run:
    """What came out.

    Attributes:
        masks: after the prompt and after each decoded token, L x [F] bool.
        logprobs: [T, V], of the tokens of prompt and decoded.
        read: FFN weights that each decoded token reads / all of them.
        alarms: decoded tokens before each. remasks: the same.
        overlaps: per re-mask and layer, neurons in the old mask and the new / those in the old.
        signal, threshold: of the detector. copied: whether tokens ran on copies of the masks' rows.
    """

    masks: list
    logprobs: torch.Tensor
    read: list
    alarms: list
    remasks: list
    overlaps: list
    signal: list
    threshold: float
    copied: bool

    def check(self, masks, logprobs, atol=1e-9):
        """That all tokens ran under these masks of all layers, and said this."""
        assert all(same_masks(now, masks) for now in self.masks)
        assert torch.allclose(self.logprobs, logprobs, rtol=0, atol=atol)


@torch.no_grad()
def run(model, method, prompt, decoded, sparsity=0.5, execution="auto", tokenizer=None, **params):
    """Run a prompt, then feed tokens one at a time under `prune`. params: of the method, by their paths."""
    with prune(model, make(method, params), sparsity, tokenizer=tokenizer, execution=execution) as session:
        name, masks, rows, past = cache_name(model), [], [], {}
        for tokens in [list(prompt), *([token] for token in decoded)]:
            out = model(torch.tensor([tokens]), use_cache=True, **past)
            past = {name: getattr(out, name)}
            rows.append(out.logits[0].log_softmax(-1))
            masks.append([mask.clone() for mask in session.masks(0)])
        seen = session.trace(0) or {"signal": [], "threshold": None}
        return Run(
            masks=masks,
            logprobs=torch.cat(rows),
            read=[float(step.read[0]) for step in session.steps],
            alarms=[a["token"] for a in session.log.alarms],
            remasks=[e["token"] for e in session.events],
            overlaps=[e["overlap"] for e in session.events],
            signal=seen["signal"],
            threshold=seen["threshold"],
            copied=session.execution == "copied",
        )


def same_masks(ours, plain):
    """Whether two lists of masks of all layers hold the same neurons."""
    return len(ours) == len(plain) and all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
