"""Read at batch B: what a step of B sequences reads, and one of k tokens of a sequence, unit by unit.

Every token reads so many bits of each unit (a neuron's rows and column; a column of a matrix). The codes are nested, so
a step reads of a unit the most bits that one of its tokens wants:

    sum over units of max over tokens of bits / bits of all FFN weights        mean over steps and groups

Groups are of consecutive sequences, and token t of each is in step t of 16: a sequence of n tokens has token t mod n
there. Groups of tokens are consecutive ones of the first 16 of a sequence.

neurons   a matrix has D weights of 16 bits a neuron. `cats` reads gate of all; of a taken neuron all three are read.
dart-plus 8-bit codes, of which every token reads 4 of gate and up; row errors, scales and norms; of an exact neuron the
          other 4 and 8 of down, of a previewed one 4 of down.
columns   `teal` reads the columns that it keeps, `grinqh` b bits of a column, and the scales.
"""

import statistics
from collections import defaultdict
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from dart_eval.evaluation.lm import PrunedLM
from dart_eval.evaluation.requests import Request
from dart_eval.evaluation.shard import Shard
from dart_eval.layers.families import cache_argument
from dart_eval.pruning.choices.choice import ChoiceLayer
from dart_eval.pruning.choices.dart_plus import DartPlus
from dart_eval.pruning.inputs.columns import GradedColumns
from dart_eval.pruning.inputs.teal import Above
from dart_eval.pruning.session.dense import DenseSession
from tests.helpers.models import random_tokens, tiny, word_tokenizer
from tests.helpers.requests import TextRequest, words
from tests.helpers.sessions import CHOOSING, FINER, REMASKED, RESTLESS, cache_of, open_session

D, F, LAYERS = 32, 40, 3
ALL = 16 * 3 * D * F * LAYERS  # bits
LENGTHS = (16, 5, 20, 9)  # of the sequences' continuations
TEXTS = [Request(random_tokens(12 + i, seed=i), random_tokens(n, seed=50 + i)) for i, n in enumerate(LENGTHS)]


def decoded(model, session, request):
    """Feed a sequence token by token; yields after each decoded one."""
    name = cache_argument(model)
    out = model(torch.tensor([request.context[:-1]]), use_cache=True)
    for token in (request.context[-1], *request.continuation[:-1]):
        yield None
        out = model(torch.tensor([[token]]), use_cache=True, **{name: cache_of(out)})
        yield session


class Watched:
    """What every token wants, by the package's own masks and choices: per token an array of bits, unit by unit."""

    def __init__(self, monkeypatch, method):
        self.calls, self.method = [], method
        for cls, name in [(ChoiceLayer, "choose"), (DartPlus, "approximated"), (Above, "columns_read"),
                          (GradedColumns, "chosen")]:  # fmt: skip
            monkeypatch.setattr(cls, name, self._watched(name, getattr(cls, name)))

    def _watched(self, name, own):
        def call(*args):
            found = own(*args)
            self.calls.append((name, found.reshape(-1).numpy()))
            return found

        return call

    def bits(self, session):
        """Of the last token, [units]."""
        calls, self.calls = self.calls, []
        if self.method in ("griffin", "dart"):
            return 16 * 3 * D * np.concatenate([mask[0].numpy() for mask in session.last]).astype(float)
        if self.method == "cats":
            return np.concatenate([16 * D * (1.0 + 2 * chosen) for _, chosen in calls])
        if self.method == "oracle-token":
            return np.concatenate([16 * 3 * D * chosen.astype(float) for _, chosen in calls])
        if self.method == "dart-plus":
            exact, rough = ([found for name, found in calls if name == which] for which in ("choose", "approximated"))
            always = 2 * (4 * D + 16 + 16) + 16 + 16 * D / F  # gate and up: codes, scale, error; a norm; scales of down
            both = zip(exact, rough, strict=True)
            return np.concatenate([always + np.maximum((2 * 4 + 8) * D * e, 4 * D * r) for e, r in both])
        rows = {D: F, F: D}  # of a matrix with so many columns
        if self.method == "teal":
            return np.concatenate([16.0 * rows[len(read)] * read for _, read in calls])
        levels = np.array([0, 2, 4, 6, 8])
        return np.concatenate([rows[len(at)] * (levels[at] + 16 / len(at)) for _, at in calls])


def together(tokens):
    """What a step of these tokens reads. tokens: of each, [units] bits."""
    return sum(max(wanted) for wanted in zip(*tokens, strict=True)) / ALL


def wanted(tokens):
    """By kind and size, the mean read. tokens: of each sequence, of each token, [units] bits."""
    made = {"sequences": defaultdict(list), "tokens": defaultdict(list)}
    for size in (1, 2, 4):
        for group in range(0, len(tokens), size):
            steps = [[seq[t % min(len(seq), 16)] for seq in tokens[group : group + size]] for t in range(16)]
            made["sequences"][size].append(statistics.mean(map(together, steps)))
    for size in (1, 2, 4, 8, 16):
        for seq in tokens:
            own = seq[:16]
            places = range(0, len(own) - size + 1, size)
            if places:
                made["tokens"][size].append(statistics.mean(together(own[i : i + size]) for i in places))
    return {kind: {str(n): reads for n, reads in sizes.items()} for kind, sizes in made.items()}


def measured(model, method, params, requests=TEXTS):
    """As a run measures it, and the scores."""
    lm = PrunedLM(model, word_tokenizer(), read_at_batch=True)
    session = open_session(model, method, execution="masked", **params) if method else nullcontext(DenseSession())
    with session as session:
        lm.begin(session, {})
        scores = lm._score(list(requests))
        return lm.unions.result(1.0), scores


EACH = [("griffin", {}), ("dart", RESTLESS), ("cats", {}), ("oracle-token", {}), ("dart-plus", {}), ("teal", {}),
        ("grinqh", {})]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(("method", "params"), EACH)
def test_a_step_reads_the_union_of_what_its_tokens_want(monkeypatch, method, params):
    model = tiny("llama")
    found, _ = measured(model, method, params)
    watched, tokens = Watched(monkeypatch, method), []
    with open_session(model, method, execution="masked", **params) as session:
        for request in TEXTS:
            tokens.append([])
            for after in decoded(model, session, request):
                if after is None:  # the masks that the next token runs under
                    watched.calls.clear()
                    session.last = [layer.mask.clone() for layer in session.state.layers]
                else:
                    tokens[-1].append(watched.bits(session))
    by_hand = wanted(tokens)
    for kind, sizes in by_hand.items():
        assert found[kind].keys() == sizes.keys()
        for size, reads in sizes.items():
            mean, error, n = found[kind][size]
            assert (mean, n) == (pytest.approx(statistics.mean(reads), rel=1e-9), len(reads))
            assert error == (pytest.approx(statistics.stdev(reads) / n**0.5, abs=1e-12) if n > 1 else None)
    assert found["sequences"]["4"][0] > found["sequences"]["1"][0] + 0.02
    changes = method != "griffin"  # whose mask of the prompt stays
    assert (found["tokens"]["4"][0] > found["tokens"]["1"][0] + 0.02) == changes


@pytest.mark.parametrize(
    ("method", "params"), [*REMASKED, *CHOOSING, *FINER, ("flap", {}), ("rounding", {}), (None, {})]
)
def test_one_sequence_reads_what_the_record_says_and_more_read_no_less(method, params):
    model = tiny("llama")
    texts = [Request(t.context, random_tokens(16, seed=i)) for i, t in enumerate(TEXTS)]
    found, scores = measured(model, method, params, texts)
    if method in ("prox", "graded-both"):  # their rows and columns are read together
        assert found is None
        return
    read = statistics.mean(1 - s.cost.not_read_sum / s.cost.tokens for s in scores)
    reads = {kind: [of[str(n)][0] for n in (1, 2, 4)] for kind, of in found.items()}
    for kind, values in reads.items():
        assert values[0] == pytest.approx(read, rel=1e-9), kind
        assert min(np.diff(values)) > -1e-9
        assert values[-1] <= max(1.0, read) + 1e-9
    flat = (
        method in (None, "flap", "rounding", "wanda", "magnitude", "wanda-sp", "bits-by-position")
        and "choice" not in params
    )
    assert (reads["sequences"][0] == pytest.approx(reads["sequences"][-1])) == flat


@pytest.mark.parametrize("method", ["griffin", None])
def test_neither_batches_nor_restarts_nor_shards_move_a_number(method):
    model, found = tiny("llama"), []
    texts = [*TEXTS, Request(TEXTS[1].context, (3, 4, 5))]  # of two with one context the first counts
    for rows in (1, 4):
        lm = PrunedLM(model, word_tokenizer(), batch_size=rows, read_at_batch=True)
        with open_session(model, method) if method else nullcontext(DenseSession()) as session:
            lm.begin(session, {})
            scores = lm._score(texts)
            found.append(lm.unions.result(1.0))
            lm.begin(session, {}, lm.journal)  # every answer is known already
            assert lm._score(texts) == scores
            found.append(lm.unions.result(1.0))
            lm.begin(session, {}, part=Shard(0, 2))
            assert lm.unions is None
    assert found[0] == found[1] == found[2] == found[3]
    assert found[0]["sequences"]["1"][2] == 4


def test_generated_texts_are_sequences_too():
    """Their first token is dense's. A text that ends begins again."""
    model = tiny("llama")
    lm = PrunedLM(model, word_tokenizer(), read_at_batch=True)
    requests = [TextRequest(words(random_tokens(9, seed=n)), n, tokens=6 + 20 * (n > 1)) for n in range(36)]
    with open_session(model, "oracle-token") as session:
        lm.begin(session, {})
        lm.generate_until(requests)
    found = lm.unions.result(1.0)
    assert {n: of[2] for n, of in found["sequences"].items()} == {"1": 32, "2": 16, "4": 8, "8": 4, "16": 2, "32": 1}
    assert {n: of[2] for n, of in found["tokens"].items()} == {"1": 32, "2": 32, "4": 32, "8": 30, "16": 30}
    assert found["sequences"]["1"][0] == pytest.approx(0.5)
    with open_session(model, "oracle-token") as session:  # no token of which is pruned
        lm.begin(session, {})
        lm.generate_until([TextRequest(words(random_tokens(9)), 0, tokens=1)])
        assert lm.unions.result(1.0) is None


def test_a_sequence_without_a_context_reads_all():
    """There is nothing to make its mask from."""
    found, _ = measured(tiny("llama"), "griffin", {}, [Request(random_tokens(1), random_tokens(6)), TEXTS[0]])
    assert found["sequences"] == {"1": (pytest.approx(0.75), pytest.approx(0.25), 2), "2": (1.0, None, 1)}
