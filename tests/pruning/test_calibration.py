"""Calibration on a text: how long its segments are, and the mode that the model runs in."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from dart_eval.pruning import caches
from dart_eval.pruning.caches import StatsCache
from dart_eval.pruning.calibration import Calibration, passages
from dart_eval.pruning.methods.griffin import relative_squares, squares
from dart_eval.pruning.registry import make
from dart_eval.pruning.session import prune
from tests.helpers.models import CONFIGS, random_tokens, tiny
from tests.helpers.sessions import decoded, open_session

WORDS = random_tokens(1200, seed=3)


class _Tokenizer:
    """Any text has the same words. bos: begin with one."""

    def __init__(self, bos):
        self.bos_token_id = 1 if bos else None

    def __call__(self, text, **_):
        return {"input_ids": [*([1] if self.bos_token_id else []), *WORDS]}


@pytest.mark.parametrize(
    ("family", "positions", "bos"), [("gpt2", 512, True), ("opt", 256, True), ("llama", 512, False)]
)
def test_segments_are_no_longer_than_the_model_has_positions(family, positions, bos):
    config = CONFIGS[family]()
    config.max_position_embeddings = positions
    calibration, lengths = counted(AutoModelForCausalLM.from_config(config).eval(), bos=bos)
    assert len(calibration.ffns) == 3
    calibration.sums("squares", squares)
    assert max(lengths) == positions
    assert sum(lengths) == len(WORDS) + bos * len(lengths)


def test_a_model_with_more_positions_has_512_tokens_of_text_after_bos():
    model = tiny("opt")
    model.config.max_position_embeddings = 4096
    model.model.decoder.embed_positions.weight = torch.nn.Parameter(torch.randn(600, 32).double())
    calibration, lengths = counted(model, bos=True)
    calibration.sums("squares", squares)
    assert lengths == [513, 513, 177]


def test_dropout_takes_no_part_in_a_calibration_and_every_mode_comes_back():
    config = CONFIGS["opt"]()
    config.dropout = 0.5
    model = AutoModelForCausalLM.from_config(config).eval()
    evaluated = Calibration(model, _Tokenizer(bos=True)).sums("squares", squares)
    model.train()
    model.model.decoder.layers[1].eval()
    before = [m.training for m in model.modules()]
    trained = Calibration(model, _Tokenizer(bos=True)).sums("squares", squares)
    assert all(torch.equal(a, b) for a, b in zip(evaluated, trained, strict=True))
    assert [m.training for m in model.modules()] == before
    with open_session(model, "wanda-sp", 0.5):
        pass
    assert [m.training for m in model.modules()] == before


def test_sums_are_made_in_fp32_over_every_segments_own_tokens():
    """Not over the token that each begins with."""
    calibration = Calibration(tiny("llama", torch.bfloat16), _Tokenizer(bos=True))
    seen = []
    handle = calibration.ffns[1].down.register_forward_pre_hook(lambda _m, args: seen.append(args[0][0, 1:].double()))
    sums = calibration.sums("squares", squares)[1]
    handle.remove()
    assert sum(map(len, seen)) == len(WORDS) and len(seen) > 2
    assert sums.dtype == torch.float32
    assert torch.allclose(sums.double(), torch.cat(seen).square().sum(0), rtol=1e-5)
    normalised = calibration.sums("relative squares", relative_squares)[1]  # of any score that looks at tokens
    votes = torch.cat(seen) / torch.cat(seen).norm(dim=1, keepdim=True)
    assert torch.allclose(normalised.double(), votes.square().sum(0), rtol=1e-4)


def test_passages_are_drawn_until_there_are_so_many_tokens():
    ids = torch.arange(1200)
    assert [len(p) for p in passages(ids, 100, None)] == [100] * 12
    for most in (1, 99, 100, 450, 1199):
        drawn = passages(ids, 100, most)
        found = torch.cat(drawn)
        assert len(found) == len(set(found.tolist())) == most
        assert all(int(p[0]) % 100 == 0 and p.tolist() == [*range(int(p[0]), int(p[0]) + len(p))] for p in drawn)
        assert found.tolist() == torch.cat(passages(ids, 100, most)).tolist() != [*range(most)]
    assert torch.equal(torch.cat(passages(ids, 100, 5000)), ids)


def counted(model, store=None, tokens=None, bos=False):
    """A calibration, and the lengths of the model's forwards since."""
    lengths = []
    model.base_model.register_forward_pre_hook(
        lambda _m, _args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    calibration = Calibration(model, _Tokenizer(bos), tokens=tokens, cache=store)
    assert calibration.ffns
    lengths.clear()  # the trial forward's
    return calibration, lengths


def statistics(calibration):
    moments = calibration.moments()
    return [*calibration.sums("squares", squares), *(m.variance for m in moments)]


def test_a_statistic_is_measured_once():
    calibration, lengths = counted(tiny("llama"), tokens=600)
    first = statistics(calibration)
    assert sum(lengths) == 2 * 600
    assert all(torch.equal(a, b) for a, b in zip(first, statistics(calibration), strict=True))
    assert sum(lengths) == 2 * 600
    calibration.sums("relative squares", relative_squares)  # another one
    assert sum(lengths) == 3 * 600


@pytest.mark.slow
@pytest.mark.parametrize(("method", "params"), [("cats", {"choice.threshold": "calibrated"}), ("flap", {})])
def test_what_a_method_makes_of_the_text_is_kept(method, params):
    """Thresholds, quantiles and norms, too: a later run does not read the text, and prunes the same."""
    model, about = tiny("llama"), {"model": f"kept for {method}"}
    prompts, found = [list(range(1, 20))], []
    for sparsity, read in ((0.3, True), (0.3, False), (0.25, method == "cats")):
        calibration, lengths = counted(model, StatsCache(about))
        with prune(model, make(method, params), sparsity, calibration=calibration) as session:
            assert bool(lengths) == read
            found.append(decoded(model, session, prompts)[0])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


def test_what_is_kept_is_found_by_a_later_run_of_the_same_and_of_nothing_else():
    model, about = tiny("llama"), {"model": "kept"}
    first, lengths = counted(model, StatsCache(about))
    found = statistics(first)
    measured = sum(lengths)
    again, lengths = counted(model, StatsCache(about))
    assert all(torch.equal(a, b) for a, b in zip(found, statistics(again), strict=True)) and not lengths
    for store, tokens in ((StatsCache({"model": "other"}), None), (StatsCache(about), 700)):
        other, lengths = counted(model, store, tokens)
        statistics(other)
        assert sum(lengths) == 2 * (tokens or len(WORDS))
    assert measured == 2 * len(WORDS)


def test_a_kept_file_that_is_damaged_is_made_anew(caplog):
    model, about, before = tiny("llama"), {"model": "damaged"}, {*caches.folder().glob("*")}
    found = counted(model, StatsCache(about))[0].sums("squares", squares)
    (file,) = {*caches.folder().glob("*")} - before
    whole = file.read_bytes()
    for damaged in (whole[:-40], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        file.write_bytes(damaged)
        again, lengths = counted(model, StatsCache(about))
        assert all(torch.equal(a, b) for a, b in zip(found, again.sums("squares", squares), strict=True))
        assert lengths and "is damaged" in caplog.text and file.read_bytes() == whole
        caplog.clear()


def test_a_cache_that_cannot_be_written_stops_nothing(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("dart_eval.pruning.caches.folder", lambda: tmp_path / "file" / "folder")
    calibration, _ = counted(tiny("llama"), StatsCache({"model": "unkept"}))
    assert len(calibration.sums("squares", squares)) == 3


def test_another_tokenizer_has_statistics_of_its_own():
    model, about, found = tiny("llama"), {"model": "of two tokenizers"}, []
    for shift in (0, 1, 0):
        calibration, lengths = counted(model, StatsCache(about))
        ids = calibration.tokenizer("")["input_ids"]
        calibration.tokenizer = lambda text, s=shift, ids=ids, **_: {"input_ids": [(t + s) % 64 for t in ids]}
        found.append((calibration.sums("squares", squares)[0], sum(lengths)))
    assert not torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][0], found[2][0])
    assert found[1][1] and not found[2][1]
