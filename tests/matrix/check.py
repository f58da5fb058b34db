"""What this project does with a type of model: each claim is checked on a tiny random one, or has its refusal."""

import contextlib
import copy
import functools
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
from dart_eval.pruning.session import Session
from dart_eval.util.errors import UserError
from tests.helpers.models import random_tokens
from tests.helpers.sessions import RESTLESS, generate, open_session
from tests.matrix.types import tiny

CLAIMS = ("masked", "generation", "scoring", "choices", "dart", "copied")
PROMPT, STEPS = 16, 3


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
    tried = Tried(model)
    for claim in CLAIMS:
        try:
            CHECKS[claim](tried)
            found.claims[claim] = ""
        except UserError as error:
            found.claims[claim] = said(error)
    with contextlib.suppress(UserError):  # it has no column
        tried.reads("grinqh", 2)
    alike = set(found.claims.values())
    return Row(name, refused=alike.pop()) if len(alike) == 1 and "" not in alike else found


def said(error):
    """The line that a user sees."""
    return str(error).splitlines()[0]


class Tried:
    """A model, and what it generates without a session."""

    def __init__(self, model):
        self.model, self.prompt = model, torch.tensor([random_tokens(PROMPT)])
        self.dense = self.generate()

    def generate(self, tokens=STEPS):
        return generate(self.model, self.prompt, tokens)

    @functools.cached_property
    def griffin(self):
        """[tokens, B, V]: logits under griffin's mask."""
        return self.reads("griffin", STEPS)[1]

    def same(self, method, tokens=STEPS):
        """Without sparsity it is the model itself, token by token."""
        with open_session(self.model, method, 0.0, "masked"):
            assert torch.equal(self.generate(tokens).sequences, self.dense.sequences[:, : PROMPT + tokens])

    def reads(self, method, tokens, **params):
        """Every decoded token reads half; the session, after it, and logits."""
        with open_session(self.model, method, 0.5, "masked", **params) as session:
            found = self.generate(tokens)
            assert read(session, 0.5, 0.03)
            return session, torch.stack(found.logits)


def read(session, share, within):
    """Whether there were decoded tokens, and each read its share."""
    return session.steps and all(abs(float(step.read[0]) - share) < within for step in session.steps)


def masked(tried):
    """A decoded token under a mask is one of the model without these columns of down.

    Where a norm comes before down, it is one without these rows of up.
    """
    less = copy.deepcopy(tried.model)
    with open_session(tried.model, "magnitude", 0.5, "masked") as session:  # layers that share weights share its masks
        ours, masks = tried.generate(2), session.masks(0)

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
        theirs = generate(less, tried.prompt, 2)
    wrong, change = ((ours.logits[1] - other.logits[1]).abs().max() for other in (theirs, tried.dense))
    assert wrong <= 1e-4 * change, f"off by {wrong:.1e}, where pruning changes {change:.1e}"


def generation(tried):
    """Without sparsity it is the model itself; with it every decoded token reads its share."""
    tried.same("griffin")
    assert len(tried.griffin) == STEPS


def scoring(tried):
    """Answers in a batch, with padding and a shared context, score as each one alone does, and as plain forwards.

    What a run counts of the model is what its parameters are.
    """
    model, ffns = tried.model, find_ffns(tried.model)
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
        for request, found in list(zip(requests, together, strict=True))[1:]:  # of the two that share, one
            (alone,) = scorer(model, head, session, 1, "scored").score([request])
            assert abs(alone.logprob - found) < 1e-3


def choices(tried):
    """A choice per token: all of it is the model, and at half of the bytes a token reads half.

    Every token of every layer keeps exactly the largest |h|, as what runs before and after the choice sees them.
    """
    tried.same("oracle-token", 2)
    ffns, before, after = find_ffns(tried.model), {}, {}
    with contextlib.ExitStack() as hooks:
        for ffn in ffns:
            hooks.callback(_h(ffn, before).remove)
        with open_session(tried.model, "oracle-token", 0.4, execution="masked") as session:
            for ffn in ffns:
                hooks.callback(_h(ffn, after).remove)
            tried.generate(2)
            counts = session.rows.counts[0, :, 1].tolist()
            assert read(session, 0.6, 0.03)
    for ffn, count in zip(ffns, counts, strict=True):
        h, kept = before[ffn.layer].abs(), after[ffn.layer] != 0
        assert int(kept.sum()) == min(count, int((h > 0).sum())) and bool(h[kept].min() >= h[~kept].max())


def _h(ffn, into):
    """Keep the h of the last token, [F], as it stands when the hooks that came before have run."""
    return ffn.into.register_forward_pre_hook(
        lambda _module, args: into.update({ffn.layer: args[0].detach().reshape(-1, args[0].shape[-1])[-1].clone()})
    )


def dart(tried):
    """Layers keep as much as they change the stream, all of them their share, and new masks come while it decodes."""
    session, _ = tried.reads("dart", 5, **RESTLESS)
    kept = [int(k) / f.size for k, f in zip(session.rows.counts[0, :, 0], session.ffns, strict=True)]
    assert sum(session.remasks) and (len(session.ffns) == 1 or max(kept) > min(kept))


def copied(tried):
    """The neurons that are kept, side by side in memory, give what masks give."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with open_session(tried.model, "griffin", 0.5) as session:
            if not session.fast.available:
                raise UserError(str(warned[0].message))
            found = torch.stack(tried.generate().logits)
            assert session.execution == "copied" and read(session, 0.5, 0.02)
    assert torch.allclose(found, tried.griffin, rtol=1e-4, atol=1e-4)


CHECKS = {
    "masked": masked, "generation": generation, "scoring": scoring, "choices": choices, "dart": dart,
    "copied": copied,
}  # fmt: skip
