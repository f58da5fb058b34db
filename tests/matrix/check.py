"""What this project does with a type of model: each claim is checked on a tiny random one, or has its refusal."""

import contextlib
import copy
import warnings
from dataclasses import dataclass, field

import torch

from dart_eval.evaluation.forwards import output_head
from dart_eval.evaluation.requests import Request
from dart_eval.evaluation.scoring import scorer
from dart_eval.layers.experts import routes
from dart_eval.layers.find import describe, find_ffns
from dart_eval.layers.projection import weight_matrix
from dart_eval.layers.shape import shape_of
from dart_eval.pruning.registry import make, parse
from dart_eval.pruning.session import Session
from dart_eval.util.errors import UserError
from tests.helpers.models import random_tokens
from tests.helpers.sessions import RESTLESS, decoded, generate, open_session
from tests.matrix.types import tiny

CLAIMS = ("masked", "generation", "scoring", "choices", "dart", "copied")
PROMPT, STEPS = 16, 6


@dataclass
class Row:
    """A type's row. claims: name -> what is said where it is refused, or nothing. refused: what is said of all."""

    type: str
    kind: str = ""
    claims: dict[str, str] = field(default_factory=dict)
    refused: str = ""


def row(name):
    """Check what holds of a type.

    Raises:
        AssertionError: a number is wrong. Any other error is one that a user would see as a traceback.
    """
    model = tiny(name)
    try:
        ffns = find_ffns(model)
    except UserError as error:
        return Row(name, refused=said(error))
    kind = "fused" if ffns[0].fused else "gated" if ffns[0].gated else "plain"
    found = Row(name, kind="experts" if any(f.routed for f in ffns) else kind)
    assert found.kind != "experts" or routes(model.config.to_dict())  # keys go by its settings
    for claim in CLAIMS:
        try:
            CHECKS[claim](model)
            found.claims[claim] = ""
        except UserError as error:
            found.claims[claim] = said(error)
    alike = set(found.claims.values())
    return Row(name, refused=alike.pop()) if len(alike) == 1 and "" not in alike else found


def said(error):
    """The line that a user sees."""
    return str(error).splitlines()[0]


def masked(model):
    """A decoded token under a mask is one of the model without these columns of down.

    Where a norm comes before down, it is one without these rows of up.
    """
    prompt = torch.tensor([random_tokens(PROMPT)])
    with open_session(model, "magnitude", 0.5, execution="masked") as session:
        ours = generate(model, prompt, 2)
        masks = session.masks(0)
    less = copy.deepcopy(model)

    def once_decoding(_model, _args, kwargs):
        if kwargs["input_ids"].shape[1] == 1:
            for ffn, mask in zip(describe(less), masks, strict=True):
                if ffn.norm is not None:
                    weight_matrix(ffn.up)[~mask] = 0
                elif ffn.routed is None:
                    weight_matrix(ffn.down)[:, ~mask] = 0
                else:
                    experts = ffn.routed.experts  # [E, D, I], or [E, I, D]
                    down = experts.down_proj.mT if experts.is_transposed else experts.down_proj
                    down *= mask.view(len(down), 1, -1)

    with torch.no_grad():
        less.register_forward_pre_hook(once_decoding, with_kwargs=True)
        apart(ours.logits[1], generate(less, prompt, 2).logits[1], generate(model, prompt, 2).logits[1])


def apart(ours, theirs, others):
    """Ours equals theirs, far better than it does others."""
    wrong, change = (ours - theirs).abs().max(), (ours - others).abs().max()
    assert wrong <= 1e-4 * change, f"off by {wrong:.1e}, where pruning changes {change:.1e}"


def generation(model):
    """Without sparsity it is the model itself, token by token; with it every decoded token reads its share."""
    prompt = torch.tensor([random_tokens(PROMPT)])
    dense = model.generate(prompt, max_new_tokens=STEPS, do_sample=False, pad_token_id=0)
    with open_session(model, "griffin", 0.0, execution="masked"):
        assert torch.equal(generate(model, prompt, STEPS).sequences, dense)
    with open_session(model, "griffin", 0.5) as session:
        generate(model, prompt, STEPS)
        assert all(abs(float(step.read[0]) - 0.5) < 0.02 for step in session.steps) and session.steps


def scoring(model):
    """Answers in a batch, with padding and a shared context, score as each one alone does, and as plain forwards.

    What a run counts of the model is what its parameters are.
    """
    ffns = find_ffns(model)
    shape = shape_of(model, ffns)
    assert shape.weight_bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    assert shape.ffn_weights == sum(f.matrices * f.size * f.width for f in ffns) and 0 < shape.ffn_share < 1
    assert any(shape.attention_widths)
    contexts = [random_tokens(9), random_tokens(9), random_tokens(14, 1)]
    requests = [Request(c, random_tokens(4, 7 + i)) for i, c in enumerate(contexts)]
    head = output_head(model)
    dense = [a.logprob for a in scorer(model, head, Session(), 4, "scored").score(requests)]
    for request, found in zip(requests, dense, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*request.context, *request.continuation]])).logits[0].float()
        rows = logits.log_softmax(-1)[len(request.context) - 1 : -1]
        assert abs(float(rows.gather(1, torch.tensor(request.continuation)[:, None]).sum()) - found) < 1e-3
    with open_session(model, "griffin", 0.5, execution="masked") as session:
        together = [a.logprob for a in scorer(model, head, session, 4, "scored").score(requests)]
    for request, found in zip(requests, together, strict=True):
        with open_session(model, "griffin", 0.5, execution="masked") as session:
            (alone,) = scorer(model, head, session, 1, "scored").score([request])
        assert abs(alone.logprob - found) < 1e-3


def choices(model):
    """A choice per token: all of it is the model, and at half of the bytes a token reads half."""
    prompt = torch.tensor([random_tokens(PROMPT)])
    dense = model.generate(prompt, max_new_tokens=STEPS, do_sample=False, pad_token_id=0)
    for method in ("oracle-token", "m-countdown"):
        _chosen(model, method, prompt, dense, 0.4)
    _largest(model, prompt)


def _largest(model, prompt):
    """Every token of every layer keeps exactly the largest |h|, as what runs before and after the choice sees them."""
    ffns, before, after = find_ffns(model), {}, {}
    with contextlib.ExitStack() as hooks:
        for ffn in ffns:
            hooks.callback(_h(ffn, before).remove)
        with open_session(model, "oracle-token", 0.4, execution="masked") as session:
            for ffn in ffns:
                hooks.callback(_h(ffn, after).remove)
            generate(model, prompt, 2)
            counts = session.rows.counts[0, :, 1].tolist()
    for ffn, count in zip(ffns, counts, strict=True):
        h, kept = before[ffn.layer].abs(), after[ffn.layer] != 0
        assert int(kept.sum()) == min(count, int((h > 0).sum())) and bool(h[kept].min() >= h[~kept].max())


def _h(ffn, into):
    """Keep the h of the last token, [F], as it stands when the hooks that came before have run."""
    return ffn.into.register_forward_pre_hook(
        lambda _module, args: into.update({ffn.layer: args[0].detach().reshape(-1, args[0].shape[-1])[-1].clone()})
    )


def _chosen(model, method, prompt, dense, sparsity):
    with open_session(model, make(*parse(method)), 0.0):
        assert torch.equal(generate(model, prompt, STEPS).sequences, dense)
    with open_session(model, make(*parse(method)), sparsity, execution="masked") as session:
        generate(model, prompt, STEPS)
        assert all(abs(float(step.read[0]) - 1 + sparsity) < 0.03 for step in session.steps) and session.steps


def dart(model):
    """Layers keep as much as they change the stream, all of them their share, and new masks come while it decodes."""
    with open_session(model, "dart", 0.5, execution="masked", **RESTLESS) as session:
        generate(model, torch.tensor([random_tokens(PROMPT)]), 2 * STEPS)
        kept = [int(k) / f.size for k, f in zip(session.rows.counts[0, :, 0], session.ffns, strict=True)]
        assert all(abs(float(step.read[0]) - 0.5) < 0.03 for step in session.steps) and sum(session.remasks)
        assert len(session.ffns) == 1 or max(kept) > min(kept)


def copied(model):
    """The neurons that are kept, side by side in memory, give what masks give."""
    found = []
    for execution, runs in (("masked", "masked"), ("auto", "copied")):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            with open_session(model, "griffin", 0.5, execution) as session:
                found.append(decoded(model, session, [random_tokens(PROMPT)], STEPS)[0])
                if runs != session.execution:
                    raise UserError(str(warned[0].message))
    assert torch.allclose(*found, rtol=1e-4, atol=1e-4)


CHECKS = {
    "masked": masked, "generation": generation, "scoring": scoring, "choices": choices, "dart": dart,
    "copied": copied,
}  # fmt: skip
