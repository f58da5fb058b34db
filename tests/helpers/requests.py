"""Questions to be scored and prompts to be continued."""

import contextlib
import functools

from dart_eval.evaluation.forwards import output_head
from dart_eval.evaluation.requests import Request
from dart_eval.pruning.session import Session
from tests.helpers.models import random_tokens


def questions():
    """Questions with shared contexts of many lengths, one-token answers, long answers, repeats."""
    found = []
    for q, length in enumerate((3, 40, 11, 25, 11)):
        context = random_tokens(length, seed=q)
        for c in range(3):
            found.append(Request(context, random_tokens(1 if q % 2 else 2 + 5 * c, seed=100 * q + c)))
    found.append(Request(random_tokens(1, seed=77), random_tokens(4, seed=78)))  # nothing to build a mask from
    found.append(found[4])
    return found


def output_head_of(model, session=None):
    """The model's output head, also where a session is at work on it: it is checked with forwards of its own."""
    with session.paused() if isinstance(session, Session) else contextlib.nullcontext():
        return _head_of(model)


_head_of = functools.lru_cache(maxsize=1)(output_head)  # one check per model is enough


class TextRequest:
    """What lm-eval hands to `generate_until`."""

    def __init__(self, prompt, doc_id, until=(), tokens=8, doc=None):
        self.args = (prompt, {"until": list(until), "max_gen_toks": tokens, "do_sample": False})
        self.task_name, self.doc_id, self.doc = "t", doc_id, doc or {}


def words(tokens):
    return " ".join(f"w{t}" for t in tokens)
