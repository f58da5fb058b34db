"""All that golden numbers touch of the package. Where its surface changes, this changes, and no number does."""

import functools
import itertools
from contextlib import contextmanager, nullcontext

from dart_eval.evaluation.forwards import output_head
from dart_eval.evaluation.lm import PrunedLM
from dart_eval.evaluation.requests import Request
from dart_eval.evaluation.scoring import scorer
from dart_eval.layers.find import find_ffns
from dart_eval.layers.shape import shape_of
from dart_eval.pruning.cost import describe
from dart_eval.pruning.registry import make, parse
from dart_eval.pruning.rows import nbytes
from dart_eval.pruning.session import Session, prune
from tests.golden.cases import CALIBRATION
from tests.helpers.models import word_tokenizer
from tests.helpers.requests import TextRequest

SCOPES = ("scored", "all", "last")  # those of the file; the others are two of these, cut elsewhere

tokenizer = functools.cache(word_tokenizer)


@functools.cache  # packages are searched for methods at every call
def method_of(setting):
    return make(*parse(setting.method))


@contextmanager
def session_of(model, setting, execution="masked"):
    """The session of a setting's method on a model."""
    with prune(
        model, method_of(setting), setting.sparsity, tokenizer=tokenizer(), calibration=CALIBRATION,
        execution=execution, shared_mask=setting.shared_mask,
    ) as session:  # fmt: skip
        yield session


def masks(session, row):
    """Per layer [F] bool, the mask in force of one sequence; None without any."""
    return None if session.rows is None else [mask.numpy() for mask in session.masks(row)]


def seen_of(session, row):
    """What a session tells of one sequence: what its decoded tokens read, re-masks, alarms, the detector."""
    steps = [(float(step.read[row]), float(step.mask[row])) for step in session.steps]
    return {
        "read, in the mask, tokens": [[*step, len([*alike])] for step, alike in itertools.groupby(steps)],
        "events": [
            {"token": e["token"], "cause": "alarm", "overlap": e["overlap"]}
            for e in session.events
            if e["sequence"] == row
        ],
        "alarms": [a["token"] for a in session.log.alarms if a["sequence"] == row],
        "detector": session.trace(row),
    }


def seen_of_all(session):
    """What a session tells of all its sequences together."""
    return {
        "effective sparsity": session.effective_sparsity,
        "outside the mask": session.mask_sparsity,
        "read": session.weights_read,
        "state bytes": session.method.nbytes() + nbytes(session.rows),
        "re-masks": session.remasks,
    }


def scores(model, setting, questions):
    """Scope -> what came out for each (context, answer), and the bytes of the largest state."""
    head, requests, found = head_of(model), [Request(*question) for question in questions], {}
    with session_of(model, setting) as session:
        for scope in SCOPES:
            run = scorer(model, head, session if session.prunes else Session(), 4, scope)
            answers = run.score(requests)
            found[scope] = {
                "logprob": [a.logprob for a in answers],
                "greedy": [a.greedy for a in answers],
                **_used([a.cost for a in answers]),
                "state bytes": session.method.nbytes() + run.state_bytes,
            }
    return found


def costs(model, setting, context):
    """FLOPs and reads, counted at a context of that length."""
    return describe(method_of(setting), shape(model), context, 1 - setting.sparsity, remasks_per_token=0.1)


@functools.cache
def head_of(model):
    return output_head(model)


@functools.cache
def shape(model):
    return shape_of(model, find_ffns(model))


def run_as_lm(model, setting, prompts, text, stop):
    """As lm-eval's model: texts after prompts and the score of a text, with what each cost."""
    lm = PrunedLM(model, tokenizer(), batch_size=2, max_length=96, chunk=33)
    pruned = session_of(model, setting) if method_of(setting).prunes else nullcontext(Session())
    with pruned as session:
        lm.begin(session, {})
        texts = lm.generate_until([TextRequest(prompt, i, [stop], 16) for i, prompt in enumerate(prompts)])
        scored = {}
        if setting.scores:
            whole = TextRequest(text, len(prompts))
            whole.args = (text,)
            (rolling,) = lm.loglikelihood_rolling([whole])
            scored = {"logprob": float(rolling), "coverage": rolling.coverage}
    used = [cost for _, cost in sorted(lm.costs.items())]
    return {
        "texts": texts,
        **scored,
        "context tokens": [u.context_tokens for u in used],
        **_used(used),
    }


def _used(costs):
    """What answers cost, one entry each: tokens, those under a mask, shares summed over them, and the detector."""
    return {
        "tokens": [c.tokens for c in costs],
        "under a mask": [c.pruned_tokens for c in costs],
        "not read": [c.not_read_sum for c in costs],
        "outside the mask": [c.outside_sum for c in costs],
        "re-masks": [c.remasks for c in costs],
        "detector": [c.trace for c in costs],
    }
