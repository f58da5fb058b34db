"""The public code of arXiv 2601.22632 has defects, numbered D1 to D22 in our notes; here is shown that we have none.

D11, D12, D14 and D21 are of its scripts (perplexity, summaries, baselines, packaging): the tests of those parts cover
them. D15 (masks save no time) is about execution. That each layer keeps its own count after an alarm (D3, D4), that
candidates share a mask of their context alone (D10), that sequences of a batch have their own masks (D16) and that all
families have allocation and detector (D20) is in the derivations of DART and of scores, and in test_session.py.
"""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from dart_eval.evaluation.forwards import output_head
from dart_eval.evaluation.requests import Request
from dart_eval.evaluation.scoring import scorer
from dart_eval.evaluation.tasks import tasks_dir
from dart_eval.layers.families import cache_argument
from dart_eval.layers.find import find_ffns
from dart_eval.pruning.calibration import DEFAULT_TEXT
from dart_eval.pruning.methods.drift import DriftDetector, DriftSettings
from dart_eval.pruning.registry import make
from dart_eval.pruning.session import prune
from tests.helpers.models import SMALL, random_tokens, tiny
from tests.helpers.sessions import RESTLESS, cache_of, open_session, rows_of

CPU = torch.device("cpu")
FIRST = torch.tensor([0])
SETTINGS = DriftSettings(window=5, sigma=0.5, floor=0.0, patience=2, cooldown=2, min_windows=4, recent=4)


def decode(model, session, ids, tokens):
    """Masks of all layers in force at each decoded token, as kept counts; then all events."""
    name, out, counts = cache_argument(model), model(ids, use_cache=True), []
    for token in tokens:
        dense = bool(session.rows.watch.dense.any())
        counts.append([f.size if dense else int(m.sum()) for f, m in zip(session.ffns, session.masks(0), strict=True)])
        out = model(torch.tensor([[token]]), use_cache=True, **{name: cache_of(out)})
    return counts, session.events


def prompt(length=20, seed=0):
    return torch.tensor([random_tokens(length, seed=seed)])


@pytest.mark.parametrize("dense_tokens", [0, 1, 2])
def test_d1_every_layer_is_masked_again_after_an_alarm_and_the_next_alarm_can_come(llama, dense_tokens):
    with open_session(llama, "dart", 0.5, **RESTLESS, **{"remask.dense_tokens": dense_tokens}) as session:
        counts, events = decode(llama, session, prompt(), random_tokens(30, seed=1))
    assert len(events) >= 3
    ran_dense = [sum(c) == sum(f.size for f in find_ffns(llama)) for c in counts]
    assert dense_tokens * len(events) <= sum(ran_dense) <= dense_tokens * (len(events) + 1)  # none from the ring
    for c, dense in zip(counts, ran_dense, strict=True):
        assert dense or sum(c) == 60  # half of 3 x 40, whatever came before
    assert all(math.isfinite(float(t)) for t in session.rows.watch.drift.threshold)


def test_d2_one_forward_is_masked_and_settings_stay_as_they_were(llama):
    method = make("dart")
    request, head = Request(random_tokens(20), random_tokens(3, seed=2)), output_head(llama)
    with prune(llama, method, 0.5) as session:
        for _ in range(2):
            (score,) = scorer(llama, head, session, 1).score([request])
            assert (score.cost.pruned_tokens, score.cost.not_read_sum) == (3, pytest.approx(1.5))
    assert method == make("dart")


@pytest.mark.parametrize("length", [4, 12, 60])
def test_d5_the_first_prompt_has_a_threshold_unless_it_is_too_short_to_have_a_window(llama, length):
    with open_session(llama, "dart", 0.5, **{"remask.window": 5}) as session:
        llama(prompt(length), use_cache=True)
        threshold = float(session.rows.watch.drift.threshold[0])
    assert math.isfinite(threshold) == (length > 5)
    assert not math.isnan(threshold)


def test_d6_sigma_acts_and_the_first_token_is_out():
    torch.manual_seed(0)
    a = torch.randn(1, 60, 16) * 0.3 + 1
    a[:, 0] = -100  # a sink
    valid = torch.ones(1, 60, dtype=torch.bool)
    found = {}
    for sigma in (0.5, 2.0):
        detector = DriftDetector(SETTINGS._replace(sigma=sigma), 1, 16, CPU)
        detector.observe(a[:, 1:], valid[:, 1:])
        detector.set_reference()
        found[sigma] = float(detector.threshold[0])
    assert found[2.0] < found[0.5] < 1

    model = tiny("llama")
    for skip, sees_sink in ((True, False), (False, True)):
        with open_session(model, "dart", 0.5, **{"remask.skip_first": skip}) as session:
            attention = session.ffns[-1].attention
            sink = attention.register_forward_hook(lambda _m, _args, out: out.index_fill(1, FIRST, -100), prepend=True)
            model(prompt(), use_cache=True)
            sink.remove()
            assert (float(session.rows.watch.drift.total.max()) < -50) == sees_sink


def test_d7_a_new_prompt_clears_everything_and_chunks_clear_nothing(llama):
    name, second = cache_argument(llama), prompt(24, seed=5)

    def snapshot(session):
        detector = session.rows.watch.drift
        return [*session.masks(0), detector.reference, detector.threshold, detector.pressure]

    with open_session(llama, "dart", 0.5, **RESTLESS) as session:
        llama(second, use_cache=True)
        alone = snapshot(session)
    with open_session(llama, "dart", 0.5, **RESTLESS) as session:
        decode(llama, session, prompt(), random_tokens(7, seed=1))
        llama(second, use_cache=True)
        after = snapshot(session)
        out = llama(second[:, :9], use_cache=True)
        with session.prompt():
            llama(second[:, 9:], use_cache=True, **{name: cache_of(out)})
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


def test_d9_no_calibration_for_prompt_methods_and_no_test_item_in_the_calibration_text(llama):
    for method in ("griffin", "dart", "dart-code"):
        with prune(llama, method, 0.5):  # no tokenizer, no text
            llama(prompt(), use_cache=True)
    text = " ".join(DEFAULT_TEXT.read_text(encoding="utf-8").split())
    for name in ("questions", "stories", "articles"):
        for line in (tasks_dir() / "smoke" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            for value in json.loads(line).values():
                if isinstance(value, str) and len(value) > 40:
                    assert " ".join(value.split())[:60] not in text


def test_d13_dense_tokens_count_against_the_label(llama):
    with open_session(llama, "dart", 0.5, **RESTLESS, **{"remask.dense_tokens": 3}) as session:
        counts, _ = decode(llama, session, prompt(), random_tokens(24, seed=1))
    pruned = sum(1 - sum(c) / 120 for c in counts)
    assert session.effective_sparsity == pytest.approx(pruned / 25)  # 24 and the prompt's own
    assert session.effective_sparsity < 0.4


def test_d17_a_long_prompt_keeps_no_more_than_a_short_one():
    detector = [DriftDetector(SETTINGS._replace(window=2), 1, 8, CPU) for _ in range(2)]
    for found, length in zip(detector, (200, 2000), strict=True):
        found.observe(torch.randn(1, length, 8), torch.ones(1, length, dtype=torch.bool))
        found.set_reference()
    assert detector[0].nbytes() == detector[1].nbytes()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_d22_no_attention_probabilities_are_asked_for(attention):
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL)
    config._attn_implementation = attention
    model = AutoModelForCausalLM.from_config(config).eval()
    signals = []
    with open_session(model, "dart", 0.5, **RESTLESS) as session:
        decode(model, session, prompt(), random_tokens(7, seed=1))
        signals = session.trace(0)["signal"]
    assert len(signals) == 2
    assert model.config.output_attentions is False
