"""Re-masks of some sequences of a batch, by hand; while one is decoded; the drift detector; defects of DART's code.

The formulas: tests/derivations/test_dart_drift.py.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dart_eval.bench.decode import check_timeable
from dart_eval.evaluation.forwards import output_head
from dart_eval.evaluation.requests import Request
from dart_eval.evaluation.scoring import scorer
from dart_eval.evaluation.tasks import tasks_dir
from dart_eval.kernels.top import top_k_mask
from dart_eval.pruning.calibration import DEFAULT_TEXT, ROUNDING_TEXT
from dart_eval.pruning.log import Log
from dart_eval.pruning.methods.drift import MAX_REFERENCE_WINDOWS, DriftDetector, DriftSettings
from dart_eval.pruning.registry import make
from dart_eval.pruning.session import prune
from dart_eval.results.inputs import without_legacy_defaults
from dart_eval.util.errors import UserError
from tests.helpers.models import random_tokens, tiny
from tests.helpers.requests import output_head_of
from tests.helpers.sessions import RESTLESS, fed, generate, go_on, open_session, prompts_of, rows_of

# A detector that flags every window of two tokens.
FLAGGED = {
    "remask.window": 2, "remask.sigma": -1000.0, "remask.floor": -3.0, "remask.patience": 1, "remask.cooldown": 0,
    "remask.min_windows": 1, "remask.ring": 9,
}  # fmt: skip


class Observed:
    """Two sequences and all that their method was shown; `h` [2, T, F] of each layer."""

    def __init__(self, model, params, tokens=6, shared=False, lengths=()):
        torch.manual_seed(0)
        self.method, self.rows = rows_of("dart", model, batch=2, shared=shared, allocation="uniform", **params)
        self.watch, self.log = self.rows.watch, Log()
        self.h = [torch.zeros(2, 0, f.size) for f in self.method.ffns]
        self.context(tokens, lengths)

    def context(self, tokens, lengths=()):
        valid = torch.arange(tokens) >= tokens - torch.tensor(lengths or (tokens, tokens))[:, None]
        for i, ffn in enumerate(self.method.ffns):
            h = torch.randn(2, tokens, ffn.size)
            self.rows.sums[i] = self.method.add(self.rows.sums[i], ffn, h, valid)
            self.remember(i, torch.randn(2, tokens, ffn.width), valid)
            self.h[i] = torch.cat([self.h[i], h], 1)
        self.watch.drift.observe(torch.randn(2, tokens, 32), valid)
        self.rows.seen = self.rows.seen + valid.sum(1)
        self.method.finish(self.rows, valid)

    def remember(self, layer, x, valid):
        if self.watch.ring is not None:
            self.watch.ring.write(layer, x, valid)

    def decode(self, tokens=1):
        """A forward. Returns the sequences that it re-masked."""
        valid, before = torch.ones(2, tokens, dtype=torch.bool), len(self.log.events)
        self.method.session = SimpleNamespace(going=valid)
        for i, ffn in enumerate(self.method.ffns):
            self.remember(i, torch.randn(2, tokens, ffn.width), valid)
            self.method.decode(ffn, torch.randn(2, tokens, ffn.size), self.rows)
        self.method.attention = torch.randn(2, tokens, 32)
        self.method.after(self.rows, valid, self.log)
        return [event["sequence"] for event in self.log.events[before:]]


def test_a_shared_mask_is_made_from_the_mean_of_all_sequences_whatever_their_length(llama):
    seen = Observed(llama.float(), FLAGGED, shared=True, lengths=(6, 2))
    for i in range(3):
        score = seen.h[i][0].square().mean(0) + seen.h[i][1, 4:].square().mean(0)
        assert torch.equal(seen.rows.mask[i], top_k_mask(score[None], torch.tensor([20])).expand(2, -1))


def test_a_block_ends_where_the_first_sequence_stops_to_run_dense(llama):
    seen = Observed(llama.float(), {**FLAGGED, "remask.window": 9, "remask.dense_tokens": 8})
    seen.watch.dense_left = torch.tensor([5, 3])
    assert seen.method.room(seen.rows) == 3


def test_a_turn_ends_what_was_to_run_dense(llama):
    seen = Observed(llama.float(), {**FLAGGED, "remask.dense_tokens": 3})
    seen.decode(2)
    assert seen.watch.dense.tolist() == [True, True]
    seen.context(3)
    assert seen.method.dense_now(seen.rows).tolist() == [False, False]
    assert seen.method.read(seen.rows).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("dense", [0, 3])
def test_an_alarm_of_one_sequence_is_that_of_all_that_share_its_mask(llama, dense):
    seen = Observed(llama.float(), {**FLAGGED, "remask.dense_tokens": dense}, shared=True)
    seen.watch.drift.threshold = torch.tensor([2.0, -2.0])  # the first always drifts, the second never
    assert seen.decode(2) == ([] if dense else [0, 1])
    assert seen.watch.dense.tolist() == [bool(dense)] * 2
    apart = Observed(llama.float(), {**FLAGGED, "remask.dense_tokens": dense})
    apart.watch.drift.threshold = torch.tensor([2.0, -2.0])
    assert apart.decode(2) == ([] if dense else [0])
    assert apart.watch.dense.tolist() == [bool(dense), False]


# -- while a sequence is decoded --------------------------------------------------------------------------------------


def test_watching_only_changes_nothing_but_sees_everything(llama):
    ids = prompts_of(1, 20)
    with open_session(llama, "dart", 0.5, remask="never"):
        static = generate(llama, ids, tokens=16)
    with open_session(llama, "dart", 0.5, **RESTLESS, **{"remask.act": False}) as session:
        watched = generate(llama, ids, tokens=16)
        trace = session.trace(0)
        assert session.rows.watch.ring is None  # no re-mask, so nothing is kept
    assert torch.equal(torch.stack(static.logits), torch.stack(watched.logits))
    assert session.events == []
    assert len(trace["signal"]) == 5
    assert {"mean", "deviation", "threshold"} <= trace.keys()


@pytest.mark.parametrize("method", ["dart", "dart-code", "griffin"])
def test_state_does_not_grow_with_the_prompt(method):
    model = tiny("llama", torch.float32)
    sizes = []
    for length in (80, 240):
        with open_session(model, method, 0.5, **({"remask.window": 1} if method != "griffin" else {})) as session:
            model(prompts_of(1, length), use_cache=True)
            sizes.append(session.state_bytes)
    assert sizes[0] == sizes[1]


def test_what_an_alarm_will_need_is_counted_before_it_comes(llama):
    with open_session(llama, "dart", 0.5, **RESTLESS, **{"remask.dense_tokens": 2}) as session:
        out = llama(prompts_of(1, 20), use_cache=True)
        before = session.state_bytes
        for token in random_tokens(4, seed=2):
            out = go_on(llama, out, torch.tensor([[token]]))
        assert bool(session.rows.watch.dense.all()) and session.state_bytes == before


def test_padding_in_the_ring_may_hold_anything(llama):
    """A padded slot of NaN, as an overflow in half precision would leave, changes nothing."""
    params = {"allocation": "uniform", "remask.ring": 4}
    masks = []
    for rubbish in (0.0, float("nan")):
        torch.manual_seed(0)
        method, rows = rows_of("dart", llama.float(), **params)
        rows.seen, valid = torch.tensor([2]), torch.tensor([[False, True, True]])
        for layer, ffn in enumerate(method.ffns):
            x = torch.randn(1, 3, 32)
            x[:, 0] = rubbish
            rows.watch.ring.write(layer, x, valid)
            rows.sums[layer] = method.add(None, ffn, ffn.intermediate(x), valid)
        method.finish(rows, valid)
        method.make_masks(rows, torch.tensor([True]))
        masks.append(rows.mask)
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))


# -- the detector -----------------------------------------------------------------------------------------------------


D = 6
CPU, TWO = torch.device("cpu"), torch.ones(1, 2, dtype=torch.bool)
DEFAULT = DriftSettings(window=10, sigma=0.5, floor=0.1, patience=2, cooldown=2, min_windows=4, recent=2)


ALL = {"sigma": -1000.0, "floor": -3.0}  # every full window is flagged


def turn(detector, a=None):
    """Show a prompt, [B, T, D]; the detector."""
    a = torch.randn(1, 8, D) if a is None else a
    detector.observe(a, torch.ones(a.shape[:2], dtype=torch.bool))
    detector.set_reference()
    return detector


def detector_of(a=None, **settings):
    """A detector that saw a prompt."""
    return turn(DriftDetector(DEFAULT._replace(**settings), 1 if a is None else len(a), D, CPU), a)


def test_a_sequence_that_ended_raises_no_alarm():
    detector = detector_of(torch.randn(2, 20, D), window=4, patience=1, **ALL)
    valid = torch.tensor([[True] * 4, [True, True, False, False]])
    assert detector.update(torch.randn(2, 4, D), valid).tolist() == [True, False]
    assert detector.room() == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_attention_outputs_are_kept_in_fp32(dtype):
    """Their sum over a prompt, and that over a window, are beyond float16 and between two numbers of bfloat16."""
    a = torch.full((1, 500, D), 300.0, dtype=dtype)
    a[..., 1] = 302.0
    detector, wanted = detector_of(a, window=250), a[0, 0].float()
    assert torch.allclose(detector.reference[0], wanted, rtol=1e-5)
    detector.update(a[:, :250], torch.ones(1, 250, dtype=torch.bool))
    assert torch.allclose(detector.recent[0, -1], wanted, rtol=1e-5)


def test_of_a_long_prompt_the_latest_windows_set_the_threshold():
    """The first six of seventy windows point elsewhere: only the mean of all has them."""
    a = torch.ones(1, MAX_REFERENCE_WINDOWS + 6, D)
    a[0, :6, 0] = -9.0
    detector = detector_of(a, window=1, floor=0.1)
    alike = torch.cosine_similarity(a[0, -1], a[0].mean(0), dim=0)
    assert float(detector.threshold[0]) == pytest.approx(float(alike) - 0.1, abs=1e-5)


@pytest.mark.parametrize(
    ("patience", "cooldown", "before", "after"), [(2, 0, [False], [False, True]), (1, 3, [True, False], [True, False])]
)
def test_a_further_turn_begins_without_flags_and_without_a_cool_down(patience, cooldown, before, after):
    detector = DriftDetector(DEFAULT._replace(window=2, patience=patience, cooldown=cooldown, **ALL), 1, D, CPU)
    for alarms in (before, after):
        turn(detector)
        assert [bool(detector.update(torch.randn(1, 2, D), TWO)) for _ in alarms] == alarms


def test_windows_of_a_sequence_that_runs_dense_are_none_of_the_cool_down():
    detector = detector_of(window=2, patience=1, cooldown=1, **ALL)
    alarms = [bool(detector.update(torch.randn(1, 2, D), TWO, torch.tensor([bool(hold)]))) for hold in (0, 1, 1, 0, 0)]
    assert alarms == [True, False, False, False, True]


def test_a_reference_moves_to_windows_of_its_own_turn():
    """It goes by four windows, and those of the turn before fill three: an early alarm does not look back at them."""
    axes = torch.eye(D)
    same = axes[0].expand(1, 8, D)
    detector = detector_of(same, window=2, recent=4, patience=1, floor=0.01, min_windows=1)
    for _ in range(3):
        detector.update(same[:, :2], TWO)
    alarm = turn(detector, same).update(axes[1].expand(1, 2, D), TWO)
    detector.rebase(alarm)
    assert bool(alarm) and torch.equal(detector.reference[0] / detector.reference.norm(), axes[1])


# -- defects of the public code of arXiv 2601.22632, D1 to D22 in our notes, of which we have none --------------------


def test_d2_one_forward_is_masked_and_settings_stay_as_they_were(llama):
    method = make("dart")
    request, head = Request(random_tokens(20), random_tokens(3, seed=2)), output_head(llama)
    with prune(llama, method, 0.5) as session:
        for _ in range(2):
            (score,) = scorer(llama, head, session, 1).score([request])
            assert (score.cost.pruned_tokens, score.cost.not_read_sum) == (3, pytest.approx(1.5))
    assert method == make("dart")


def test_d7_a_new_prompt_clears_everything_and_chunks_clear_nothing(llama):
    second = prompts_of(1, 24, seed=5)

    def snapshot(session):
        detector = session.rows.watch.drift
        return [*session.masks(0), detector.reference, detector.threshold, detector.pressure]

    with open_session(llama, "dart", 0.5, **RESTLESS) as session:
        llama(second, use_cache=True)
        alone = snapshot(session)
    with open_session(llama, "dart", 0.5, **RESTLESS) as session:
        fed(llama, llama(prompts_of(1, 20), use_cache=True), random_tokens(7, seed=1))
        llama(second, use_cache=True)
        after = snapshot(session)
        out = llama(second[:, :9], use_cache=True)
        with session.prompt():
            go_on(llama, out, second[:, 9:])
        chunked = snapshot(session)
        out = llama(second[:, :1], use_cache=True)  # a prompt of one token is a prompt
        assert session.rows.seen.tolist() == [1.0]
    assert all(torch.equal(x, y) for x, y in zip(alone, after, strict=True))
    assert all(torch.allclose(x.double(), y.double()) for x, y in zip(alone, chunked, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_d8_sums_are_kept_in_fp32(llama, dtype):
    h = torch.full((1, 3000, 40), 1e-4, dtype=dtype)
    token = float(h[0, 0, 0])
    for name, wanted in (("dart", token**2), ("griffin", 1 / 40)):  # there relative to the token's norm
        method, _ = rows_of(name, llama)
        sums = method.add(None, method.ffns[0], h, torch.ones(1, 3000, dtype=torch.bool))
        assert sums.dtype == torch.float32
        assert float(sums[0, 0]) == pytest.approx(3000 * wanted, rel=1e-2)


def test_d9_no_calibration_for_prompt_methods_and_no_test_item_in_a_calibration_text(llama):
    for method in ("griffin", "dart", "dart-code"):
        prune(llama, method, 0.5).__enter__().close()  # no tokenizer, no text
    text = " ".join(" ".join(file.read_text(encoding="utf-8") for file in (DEFAULT_TEXT, ROUNDING_TEXT)).split())
    for name in ("questions", "stories", "articles"):
        for line in (tasks_dir() / "smoke" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            for value in json.loads(line).values():
                if isinstance(value, str) and len(value) > 40:
                    assert " ".join(value.split())[:60] not in text


# -- masks that are released: so many decoded tokens run pruned, and all later ones dense -----------------------------


N = 4  # a window of the detector ends one token before
CALM = {"remask": "never", "allocation": "uniform"}
RELEASED = [
    ("dart", CALM),
    ("dart", RESTLESS), ("dart-code", {**RESTLESS, "remask.dense_tokens": 3}),  # the alarm's tokens are cut short
]  # fmt: skip


@pytest.mark.parametrize("execution", ["masked", "auto"])
@pytest.mark.parametrize(("method", "params"), RELEASED)
def test_logits_are_those_of_masked_tokens_and_then_of_dense_ones_on_their_cache(llama, method, params, execution):
    ids, tokens = prompts_of(1, 20), random_tokens(12, seed=3)
    with open_session(llama, method, 0.5, execution=execution, **params) as session:
        # By hand: the hooks go after N tokens, and the cache stays.
        wanted, _ = fed(llama, llama(ids, use_cache=True), tokens, lambda n: session._remove() if n == N else None)
        by_hand = [[e["token"] for e in found] for found in (session.events, session.log.alarms)]
    with open_session(llama, method, 0.5, execution=execution, **params, **{"remask.release": N}) as session:
        found, _ = fed(llama, llama(ids, use_cache=True), tokens)
        reads = [float(step.read[0]) for step in session.steps]
        logged = [[e["token"] for e in found] for found in (session.events, session.log.alarms)]
        windows = len(session.log.signals)
        skipped = session.effective_sparsity * 13  # the prompt makes the first token
        assert session.step().mask.tolist() == [1]
        assert (session.mask_sparsity, session.room()) == (0, None)
    assert torch.equal(found, wanted)
    assert logged == [[n for n in found if n < N] for found in by_hand]
    assert windows == bool(by_hand[1])
    assert reads[N:] == [1] * 8
    pruned = [1 - read for read in reads[:N] if read < 1]
    assert len(pruned) == (3 if method == "dart-code" else N)  # an alarm after three
    assert skipped == pytest.approx(sum(pruned))


@pytest.mark.slow
@torch.no_grad()
@settings(max_examples=10)
@given(st.integers(1, 9), st.lists(st.integers(1, 7), min_size=1, max_size=9), st.integers(0, 2), st.booleans())
def test_blocks_of_any_size_release_after_exactly_so_many_tokens(release, sizes, number, shared):
    """A block ends where masks are released; rows that end before do not move that place."""
    method, params = [RELEASED[0], RELEASED[1], ("dart", {**RESTLESS, "allocation": "uniform"})][number]
    model, ids, total = tiny("llama"), prompts_of(2, 20), sum(sizes)
    tokens = torch.tensor([random_tokens(total, seed=8), random_tokens(total, seed=9)])
    valid = torch.ones(2, total, dtype=torch.bool)
    valid[1, total // 2 :] = False
    params = {**params, "remask.release": release}

    def run(cuts):
        with open_session(model, method, 0.5, shared_mask=shared, **params) as session:
            with session.context(torch.ones_like(ids, dtype=torch.bool)):
                out = model(ids, use_cache=True)
            start, logits, reads = 0, [], []
            for size in cuts:
                end = start + size
                while start < end:
                    stop = min(end, start + (session.room() or size))
                    with session.decode(valid[:, start:stop]):
                        out = go_on(model, out, tokens[:, start:stop])
                    logits.append(out.logits)
                    reads += [session.steps[-1].read] * (stop - start)
                    start = stop
            return torch.cat(logits, 1), torch.stack(reads, 1), session.remasks

    found, reads, remasks = run(sizes)
    assert ((reads < 1).sum(1) == min(release, total)).all()
    assert (reads[:, release:] == 1).all()
    one_by_one, _, others = run([1] * total)
    assert remasks == others
    assert torch.allclose(found[valid], one_by_one[valid], atol=1e-9)


def test_scored_and_generated_tokens_beyond_are_dense_and_count_as_dense(llama):
    """Scoring: the context's last token is the first decoded one. A new prompt and a new turn start anew."""
    request = Request(random_tokens(15, seed=1), random_tokens(9, seed=2))
    with open_session(llama, "dart", 0.5, **CALM, **{"remask.release": N}) as session:
        score = scorer(llama, output_head_of(llama, session), session, 2)
        (found,) = [answer for unit in score.units([request]) for _, answer in score.run(unit)]
        ids = torch.tensor([request.context[:-1]])
        tokens = [request.context[-1], *request.continuation[:-1]]
        logits = fed(llama, llama(ids, use_cache=True), tokens)[0][0].log_softmax(-1)
        assert found.cost.pruned_tokens == N
        assert found.cost.not_read_sum == pytest.approx(N / 2)
        assert found.logprob == pytest.approx(float(logits[range(9), list(request.continuation)].sum()), abs=1e-6)
        for _ in range(2):
            generate(llama, prompts_of(2, 20), tokens=12)
            assert [step.read.tolist() for step in session.steps] == [[0.5, 0.5]] * N + [[1, 1]] * 7
        with session.prompt():
            out = llama(prompts_of(1, 20), use_cache=True)
        for _ in range(2):
            for _ in range(N + 1):
                out = go_on(llama, out, torch.tensor([[5]]))
            with session.prompt():
                out = go_on(llama, out, torch.tensor([[6, 7]]))
        assert [float(step.read[0]) for step in session.steps] == ([0.5] * N + [1]) * 2


def test_scopes_without_decoded_tokens_and_timing_are_refused(llama):
    head = output_head_of(llama)
    with open_session(llama, "dart", 0.5, **CALM, **{"remask.release": N}) as session:
        assert scorer(llama, head, session, 2, "last").scope == "last"  # one token runs pruned, the first
        with pytest.raises(UserError, match="--scope"):
            scorer(llama, head, session, 2, "all")
    with pytest.raises(UserError, match="time it without"):
        check_timeable(make("dart", {"remask.release": 5}))


def test_cells_of_versions_without_it_ask_the_same():
    params = {"remask": "never", "remask.release": 0}
    assert without_legacy_defaults(params) == {"remask": "never"}
    assert without_legacy_defaults({**params, "remask.release": 5}) == {**params, "remask.release": 5}
