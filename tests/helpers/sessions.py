"""Sessions on tiny models: ways to re-mask, decoding by hand, what a model was before."""

import torch
from torch.overrides import TorchFunctionMode

from dart_eval.layers.families import cache_argument
from dart_eval.layers.find import find_ffns
from dart_eval.pruning.calibration import Calibration
from dart_eval.pruning.registry import make
from dart_eval.pruning.rows import Rows
from dart_eval.pruning.session import prune
from tests.helpers.models import random_tokens

# A detector that sees drift in every window, so that masks do change
RESTLESS = {
    "remask.window": 3, "remask.sigma": -1000.0, "remask.floor": -3.0, "remask.patience": 1, "remask.cooldown": 0,
    "remask.min_windows": 1, "remask.ring": 5,
}  # fmt: skip


# Every re-mask, often enough to be seen in a test.
REMASKED = [
    ("griffin", {}), ("dart", {}), ("dart", RESTLESS),
    ("dart-code", {**RESTLESS, "remask.dense_tokens": 2}),
    ("dart", {"allocation": "uniform", **RESTLESS}), ("griffin", {"draw": "sample"}),
]  # fmt: skip
CHOOSING = [("cats", {}), ("m-countdown", {}), ("oracle-token", {}), ("cats", {"choice.threshold": "calibrated"})]
# What leaves out something else than neurons.
FINER = [
    ("teal", {}), ("wina", {"entries.weigh": "all"}), ("rounding", {}), ("grinqh", {}),
    ("graded-both", {"entries.neurons": 0.4}),
]  # fmt: skip
# All of these: masks or choices that change while a sequence is decoded.
VARIED = [*REMASKED, *CHOOSING, *FINER]
PLAIN = ("gpt2", "opt")  # families without a gate


def fitting(method, family, sparsity):
    """The sparsity, or the nearest that a method allows: some read a matrix or a rotation whole, some serve 8 bits."""
    if method == "decdec":
        return min(max(sparsity, 0.56), 0.7)
    if method in ("graded-both", "grinqh"):
        return max(sparsity, 0.5)
    whole = ("cats", "m-countdown", "larosa")
    return min(sparsity, 0.5 if family in PLAIN else 0.66) if method in whole else sparsity


class RandomCalibration(Calibration):
    """Random tokens instead of a text."""

    def __init__(self, model, *_):
        super().__init__(model, lambda text, **_: {"input_ids": list(random_tokens(200, seed=5))})


def rows_of(method, model, sparsity=0.5, batch=1, shared=False, calibration=None, **params):
    """A method fitted to a model, and rows of new sequences. method: a name, with `params` by their paths."""
    fitted, ffns = make(method, params), find_ffns(model)
    fitted.fit(ffns, sparsity, calibration)
    rows = Rows(batch, ffns, torch.device("cpu"), shared)
    fitted.begin(rows)
    return fitted, rows


def open_session(model, method, sparsity=0.5, execution="auto", shared_mask=False, **params):
    """`prune` with a calibration that needs no tokenizer. method: a name, with `params` by path, or a `Method`."""
    made = make(method, params) if isinstance(method, str) else method
    calibration = RandomCalibration(model, None)
    return prune(model, made, sparsity, calibration=calibration, execution=execution, shared_mask=shared_mask)


def cache_of(output):
    """The KV cache in a model's output, whose name transformers 5 changes."""
    cache = getattr(output, "cache", None)
    return cache if cache is not None else output.past_key_values


def go_on(model, out, ids):
    """A forward of further tokens, on the cache of the last one."""
    return model(ids, use_cache=True, **{cache_argument(model): cache_of(out)})


@torch.no_grad()
def fed(model, out, tokens, before=lambda n: None):
    """Logits of tokens that are fed one by one after `out`, [B, T, V], and the last output.

    before: called with the number of tokens fed so far.
    """
    logits = []
    for n, token in enumerate(tokens):
        before(n)
        out = go_on(model, out, torch.full((len(out.logits), 1), token))
        logits.append(out.logits[:, -1])
    return torch.stack(logits or [out.logits[:, -1]], 1), out


def prompts_of(rows, length, seed=0):
    return torch.tensor([random_tokens(length, seed=seed + i) for i in range(rows)])


def generate(model, ids, tokens=12, attention_mask=None, **more):
    attention_mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    options = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True, **more}
    return model.generate(ids, attention_mask=attention_mask, max_new_tokens=tokens, **options)


@torch.no_grad()
def decoded(model, session, prompts, steps=24):
    """Logits of the prompt and of each greedily decoded token."""
    ids = torch.as_tensor(prompts)
    out = model(ids, use_cache=True)
    logits = [out.logits[:, -1]]
    for _ in range(steps):
        token = logits[-1].argmax(-1, keepdim=True)
        out = go_on(model, out, token)
        logits.append(out.logits[:, -1])
    return torch.stack(logits), list(session.events), session.effective_sparsity


def bits(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(model, before):
    now = model.state_dict()
    return now.keys() == before.keys() and all(
        torch.equal(now[n], t) and now[n].stride() == t.stride() for n, t in before.items()
    )


class Interrupt(TorchFunctionMode):
    """Ctrl-C before or after the n-th torch operation."""

    def __init__(self, at, after):
        super().__init__()
        self.left, self.after = at, after

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        if self.left == 0 and not self.after:
            raise KeyboardInterrupt
        result = func(*args, **(kwargs or {}))
        if self.left == 0:
            raise KeyboardInterrupt
        return result
