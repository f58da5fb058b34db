"""Bytes that are fetched: the matrices of tiny models at addresses, and the lines of 64 bytes that tokens touch.

Of every decoded token the test sees which neurons, columns and bits it chose, and touches their places. A piece of
memory that is skipped or read as one begins a line; what is read whole lies from end to end.

    neurons        gate's and up's rows side by side, and down's column: a line begins before each of the two
    columns        of every matrix on its own; their scales, which several columns share, are all read
    first bits     a column's first bits of all rows, then its next ones, as levels have them
    a second look  the same columns, at the bits of some rows; or all bits of these rows, in a copy by rows

Weights have 16 bits, as served, or those of a rounding. Shares are of all of these bits.
"""

import itertools
import math

import pytest
import torch
import transformers

import dart_eval
from dart_eval.layers.find import find_ffns
from dart_eval.pruning.method import Method
from dart_eval.pruning.methods.both import GradedBoth
from dart_eval.pruning.methods.columns import Nested
from dart_eval.pruning.registry import make
from dart_eval.util.bits import parse
from tests.helpers.models import SMALL, made, random_tokens
from tests.helpers.sessions import fed, fitting, generate, open_session, prompts_of

pytestmark = pytest.mark.slow
TOKENS = 8


def llama(width, neurons):
    return lambda: transformers.LlamaConfig(**{**SMALL, "hidden_size": width, "intermediate_size": neurons})


def gpt2(width, neurons):
    sizes = {"n_embd": width, "n_inner": neurons, "n_layer": 3, "n_head": 4, "n_positions": 256}
    return lambda: transformers.GPT2Config(vocab_size=96, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes)


FAMILIES = {"llama": llama, "gpt2": gpt2}  # with a gate, and plain
UNEVEN, EVEN = (40, 72), (256, 512)  # D, F: rows and columns end within lines; in 2 bits they still end with one


def model_of(family, sizes):
    return made(FAMILIES[family](*sizes), scale=3)


class Memory:
    """Places, in bits, and the lines that a token has touched."""

    def __init__(self):
        self.end, self.lines, self.whole = 0, set(), 0

    def place(self, bits):
        """Room for so many bits that begins a line."""
        at = self.end
        self.end += math.ceil(bits / 512) * 512
        return at

    def flow(self, bits):
        """Touch so many bits that every token reads: they lie from end to end with all others of this kind."""
        self.whole += bits

    def touch(self, at, bits):
        if bits:
            self.lines.update(range(int(at) // 512, math.ceil((at + bits) / 512)))

    def taken(self):
        """Lines of one token; the next one begins."""
        lines, self.lines, self.whole = len(self.lines) + self.whole / 512, set(), 0
        return lines


class Matrix:
    """[out, n] in codes of some bits, with scales of groups in a row."""

    def __init__(self, out, n, rounding=None):
        self.out, self.n, self.code = out, n, rounding.bits if rounding else 16
        self.scales = 16 * math.ceil(n / rounding.group) if rounding else 0  # of a row
        self.bits = out * (n * self.code + self.scales)


def matrices(ffn, rounding=None):
    into = [Matrix(ffn.size, ffn.width, rounding) for _ in range(ffn.matrices - 1)]
    return [*into, Matrix(ffn.width, ffn.size, rounding)]


class Spy:
    """What functions returned since the last token."""

    def __init__(self, patch, **functions):
        self.seen = {name: [] for name in functions}
        for name, owner in functions.items():
            patch.setattr(owner, name, self.watched(name, getattr(owner, name)))

    def watched(self, name, function):
        def call(*args, **kwargs):
            found = function(*args, **kwargs)
            self.seen[name].append((args, found))
            return found

        return call

    def taken(self, name):
        calls = self.seen[name][:]
        self.seen[name].clear()
        return calls


def shares(model, method, sparsity, lines_of, rounding=None, **params):
    """What the formula gives and what was counted, shares of the served bytes. lines_of: session, memory -> a token."""
    ffns = find_ffns(model)
    total = sum(m.bits for f in ffns for m in matrices(f, rounding))
    with open_session(model, method, sparsity, "masked", **params) as session:
        token, found = lines_of(session, memory := Memory()), []
        with torch.no_grad():
            out = model(prompts_of(1, 12), use_cache=True)
            for tokens in random_tokens(TOKENS, 3):
                out = fed(model, out, [tokens])[1]
                token()
                found.append(memory.taken() * 512 / total)
        read = torch.cat([step.read for step in session.steps]).mean().item()
        return session.method.fetched(read), sum(found) / len(found), read


def neurons(model, taken_of, whole=0, rounding=None):
    """Lines of neurons. taken_of: session, FFN -> whose rows, and whose column, are read. whole: matrices that are."""

    def lines_of(session, memory):
        places = []
        for f in find_ffns(model):
            *into, down = matrices(f, rounding)
            rows, column = sum(m.bits for m in into[whole:]) / f.size, f.width * down.code
            always = sum(m.bits for m in into[:whole]) + down.out * down.scales
            places.append(
                (f, always, rows, column, [(memory.place(rows), memory.place(column)) for _ in range(f.size)])
            )

        def token():
            for f, always, rows, column, pairs in places:
                taken, written = taken_of(session, f)
                memory.flow(always)
                for j in taken:
                    memory.touch(pairs[j][0], rows)
                for j in written:
                    memory.touch(pairs[j][1], column)

        return token

    return lines_of


def masked(session, ffn):
    return [session.masks(0)[ffn.layer].nonzero().flatten().tolist()] * 2


@pytest.mark.parametrize("sizes", [UNEVEN, EVEN])
@pytest.mark.parametrize(
    ("family", "method", "text"),
    [("llama", "griffin", None), ("gpt2", "griffin", None), ("llama", "dart", None), ("llama", "flap", None),
     ("gpt2", "random", None), ("llama", "griffin", "4:32"), ("gpt2", "static", "3:16")],
)  # fmt: skip
def test_a_mask_fetches_its_neurons(family, method, text, sizes):
    model, rounding = model_of(family, sizes), text and parse(text)
    with dart_eval.rounded_ffns(model, text or "16"):
        formula, counted, read = shares(model, method, 0.6, neurons(model, masked, rounding=rounding), rounding)
    assert formula == pytest.approx(counted) and (formula > 1.02 * read if sizes == UNEVEN else counted >= read - 1e-9)


@pytest.mark.parametrize("sizes", [UNEVEN, EVEN])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("method", "params"),
    [("cats", {}), ("m-countdown", {}), ("oracle-token", {}), ("cats", {"choice.threshold": "calibrated"})],
)
def test_a_choice_of_neurons_fetches_what_it_needs_whole_and_their_rows(family, method, params, sizes, monkeypatch):
    model, sparsity = model_of(family, sizes), fitting(method, family, 0.45)
    spy = Spy(monkeypatch, choose=type(make(method, params)))
    scores = Spy(monkeypatch, importance=type(make(method, params)))
    of_layer = {}

    def taken_of(session, ffn):
        if ffn.layer == 0:
            of_layer.update(enumerate(zip(scores.taken("importance"), spy.taken("choose"), strict=True)))
        (_, score), (_, written) = of_layer[ffn.layer]
        count = int(session.rows.counts[0, ffn.layer, 1])
        largest = score.flatten().topk(count).indices.tolist()
        chosen = written.flatten().nonzero().flatten().tolist()
        return (chosen if params else largest), chosen

    whole = min(make(method, params).whole, find_ffns(model)[0].matrices - 1)
    formula, counted, read = shares(model, method, sparsity, neurons(model, taken_of, whole), **params)
    assert formula == pytest.approx(counted) and formula >= read - 1e-9


def columns(model, chosen_of, rounding=None, beside=0):
    """Lines of columns. chosen_of: FFN, matrix -> those that a token reads. beside: bits of an FFN, read whole."""

    def lines_of(_session, memory):
        places = [
            (f, i, m, [memory.place(m.out * m.code) for _ in range(m.n)])
            for f in find_ffns(model) for i, m in enumerate(matrices(f, rounding))
        ]  # fmt: skip

        def token():
            for f, i, m, at in places:
                for j in chosen_of(f, i):
                    memory.touch(at[j], m.out * m.code)
                memory.flow(m.out * m.scales + beside / f.matrices)

        return token

    return lines_of


@pytest.mark.parametrize("sizes", [UNEVEN, EVEN])
@pytest.mark.parametrize(
    ("family", "method", "text"),
    [("llama", "teal", None), ("gpt2", "teal", None), ("llama", "teal", "4:32"), ("llama", "wina", None),
     ("gpt2", "wina", "6:16"), ("llama", "larosa", None), ("llama", "rsparse", None)],
)  # fmt: skip
def test_columns_are_fetched_to_their_last_line(family, method, text, sizes, monkeypatch):
    model, rounding = model_of(family, sizes), text and parse(text)
    spy, of_token = Spy(monkeypatch, columns=type(make(method, {}))), {}

    def chosen_of(ffn, matrix):
        if (ffn.layer, matrix) == (0, 0):
            of_token.update({call[1:3]: found for call, found in spy.taken("columns")})
        return of_token[ffn.layer, matrix].flatten().nonzero().flatten().tolist()

    f = find_ffns(model)[0]
    beside = 16 * f.width**2 if method == "larosa" else 0
    if method == "rsparse":
        beside = 16 * f.matrices * make(method, {}).rank(f, 0.5) * (f.size + f.width)
    with dart_eval.rounded_ffns(model, text or "16"):
        formula, counted, read = shares(model, method, 0.5, columns(model, chosen_of, rounding, beside), rounding)
    # Of a threshold the number of columns varies, and their ends are those of as many as were asked for.
    exact = sizes == EVEN or method in ("wina", "larosa")
    assert formula >= read - 1e-9 and formula == pytest.approx(counted, abs=1e-4 if exact else 0.02)


def first_bits(model, session, memory, spies, by_rows=False):
    """Lines of first bits of columns, and of a second look at some rows. by_rows: these lie in a copy by rows, too."""
    levels = session.method.levels.bits
    steps = [*itertools.pairwise(levels)]
    places = {}
    for f in find_ffns(model):
        for p in f.projections:
            for m in session.method.matrices[p]:
                columns = [memory.place(m.rows * levels[-1]) for _ in range(m.width)]
                rows = [memory.place(m.width * levels[-1]) for _ in range(m.rows * by_rows)]
                places[m] = columns, rows

    def token():
        first = {args[0]: found.flatten().tolist() for args, found in spies.taken("choose")}
        again = [(args[2], found.flatten().tolist()) for args, found in spies.taken("second_look")]
        chosen = [found.flatten().nonzero().flatten().tolist() for _, found in spies.taken("least_known")]
        parts = len(again) // max(len(chosen), 1)
        for m, (at, _) in places.items():
            for i, level in enumerate(first[m]):
                memory.touch(at[i], m.rows * levels[level])
            memory.flow(m.rows * m.width * m.scale)
        for n, (m, further) in enumerate(again):
            at, rows = places[m]
            for row in chosen[n // parts]:
                if by_rows:
                    memory.touch(rows[row], m.width * levels[-1])
                    continue
                for i, level in enumerate(further):
                    for begin, end in steps[first[m][i] : level]:
                        memory.touch(at[i] + m.rows * begin + row * (end - begin), end - begin)

    return token


BITS = [
    ("llama", "grinqh", 0.7, {}), ("gpt2", "grinqh", 0.7, {}), ("llama", "decdec", 0.6, {}),
    ("llama", "grinqh", 0.7, {"entries.levels": "0-2-3-4-5-6-8", "entries.group": 0}),
    ("llama", "graded-both", 0.7, {}), ("gpt2", "graded-both", 0.8, {}), ("llama", "graded-both", 0.85, {}),
    ("llama", "graded-both", 0.7, {"entries.neurons": 0.05, "entries.more": 4}),
]  # fmt: skip


@pytest.mark.parametrize("sizes", [UNEVEN, EVEN])
@pytest.mark.parametrize(("family", "method", "sparsity", "params"), BITS)
def test_first_bits_are_fetched_in_lines(family, method, sparsity, params, sizes, monkeypatch):
    model = model_of(family, sizes)
    spies = Spy(monkeypatch, choose=Nested, second_look=GradedBoth, least_known=GradedBoth)
    by_rows = params.get("entries.neurons", 1) < 0.1
    formula, counted, read = shares(
        model, method, sparsity, lambda session, memory: first_bits(model, session, memory, spies, by_rows), **params
    )
    # Inputs are not normal: where levels are no whole lines, that is worth a fifth of what lines add.
    whole = sizes == EVEN and "entries.levels" not in params
    assert formula >= read - 1e-9 and formula == pytest.approx(counted, abs=1e-6 if whole else 0.2 * (formula - read))


@pytest.mark.parametrize("sizes", [UNEVEN, EVEN])
def test_sirius_fetches_what_its_blocks_do(sizes):
    model, every = model_of("llama", sizes), 4
    with open_session(model, "sirius", 0.6, "masked", every=every, threshold=0.0) as session:
        generate(model, prompts_of(1, 12), 1 + 3 * every)  # a token of the prompt's, and three whole blocks
        read = sum(float(step.read[0]) for step in session.steps) / (3 * every)
        pruned, token = session.method.cost.read(session.rows.counts).item(), Memory()
        neurons(model, masked)(session, token)()
        total = sum(m.bits for f in find_ffns(model) for m in matrices(f))
        counted = ((every - 1) * token.taken() * 512 / total + 1) / every
        assert read == pytest.approx(((every - 1) * pruned + 1) / every)
        assert session.writer.fetched(read) == pytest.approx(counted, rel=2e-3)  # neurons are whole


def test_what_is_read_whole_is_fetched_as_it_is_read_and_an_unknown_layout_is_not_guessed():
    with open_session(model_of("llama", UNEVEN), "rounding", 0.5) as session:
        assert session.method.fetched(read := session.method.fixed_read) == read

    class Tiles(Method):
        granularity = "tiles"

    class Neurons(Method):
        pass

    ffns = find_ffns(model_of("llama", UNEVEN))
    found = {}
    for method in (Tiles(), Neurons(), make("griffin", {})):
        method.fit(ffns, 0.5, None)
        found[type(method).__name__] = method.fetched(0.5)
    assert found["Tiles"] is None and found["Neurons"] == found["Griffin"] > 0.5
