"""GGUF files as models: what they hold, what it costs, and files that are none."""

import json
import shutil
import signal
from pathlib import Path

import gguf as library
import pytest
import torch
from gguf.quants import dequantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dart_eval.layers.find import find_ffns
from dart_eval.models.loading import ModelSpec, resolve
from dart_eval.sweep.options import config_from
from dart_eval.util.errors import UserError
from dart_eval.weights import gguf
from dart_eval.weights.rounding import about, served_bits, stored_of
from scripts import format_errors
from tests.helpers import gguf_files
from tests.helpers.commands import Watch, run_local
from tests.helpers.gguf_files import INNER, INNER_SHARED, LAYERS, damaged, differing, write
from tests.helpers.models import random_tokens
from tests.helpers.sessions import generate, open_session


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("DART_EVAL_CACHE", str(tmp_path / "cache"))
    return write(tmp_path / "tiny.gguf")


def test_a_file_becomes_a_model_with_its_values_and_its_bits(file):
    found = resolve(ModelSpec(str(file)))
    model, tokenizer = found.load()
    assert found.identity.name == "tiny" and found.dtype == "float32"
    assert tokenizer.decode(tokenizer("hello you.").input_ids, skip_special_tokens=True).strip() == "hello you."
    held = {t.name: t for t in library.GGUFReader(file).tensors}
    ffns = find_ffns(model)
    assert len(ffns) == LAYERS
    for i, ffn in enumerate(ffns):
        # Q4_0: 32 codes of 4 bits and a scale of 16; Q8_0: 32 codes of 8 bits and a scale.
        for side, bits in {"gate": 4 + 16 / 32, "up": 4 + 16 / 32, "down": 8 + 16 / 32}.items():
            tensor, module = held[f"blk.{i}.ffn_{side}.weight"], getattr(ffn, side)
            assert stored_of(module).total == bits
            assert torch.equal(module.weight, torch.tensor(dequantize(tensor.data, tensor.tensor_type)))


def test_a_file_is_converted_once_and_another_of_its_name_is_another_model(file, monkeypatch):
    first = resolve(ModelSpec(str(file)))
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "convert", lambda *args, **kwargs: pytest.fail("converted again"))
        assert resolve(ModelSpec(str(file))).identity == first.identity
        capital = file.rename(file.with_suffix(".GGUF"))
        assert resolve(ModelSpec(str(capital))).identity == first.identity
    Path(first.source, "model.safetensors").unlink()
    assert resolve(ModelSpec(str(capital.rename(file)))).load()[0]
    assert Path(first.source, "model.safetensors").exists()
    write(file, seed=1)
    assert resolve(ModelSpec(str(file))).identity.weights != first.identity.weights


def test_a_cache_that_cannot_be_made_is_one_line(file, tmp_path, monkeypatch):
    (tmp_path / "taken").touch()
    monkeypatch.setenv("DART_EVAL_CACHE", str(tmp_path / "taken" / "inside"))
    with pytest.raises(UserError, match="DART_EVAL_CACHE"):
        resolve(ModelSpec(str(file)))


@pytest.mark.parametrize(("given", "damage", "word"), [
    ({}, lambda raw: b"no model", "cannot read"), ({}, lambda raw: raw[: len(raw) // 2], "cannot read"),
    ({"without": "blk.0.ffn_down.weight"}, None, "down_proj"), ({"without": "output_norm.weight"}, None, "norm"),
    ({"without": "blk.0.ffn_gate_exps.weight", "experts": True}, None, "180224"),
    ({"blocks": 3}, None, "lacks 9"), ({"blocks": 1}, None, "1 layers"),
])  # fmt: skip
def test_a_file_of_other_tensors_than_it_says_is_refused_and_leaves_nothing(file, given, damage, word, tmp_path):
    """transformers makes up what is missing, passes over a layer too many, and builds as many as are named."""
    write(file, **given)
    if damage is not None:
        file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=word):
        resolve(ModelSpec(str(file)))
    assert not [f for f in (tmp_path / "cache").rglob("*") if f.suffix != ".lock"]


def test_tensors_that_no_weight_is_made_of_are_told_each_time(file):
    """transformers passes over those that it does not know, such as Llama 3's factors of angles."""
    write(file, more="rope_freqs.weight")
    for _ in range(2):
        told = []
        resolve(ModelSpec(str(file))).load(told.append)
        assert len(told) == 1 and "7 numbers" in told[0]


def test_experts_and_the_ffn_beside_them_have_their_own_bits(file):
    model = resolve(ModelSpec(str(write(file, experts=True)))).load()[0]
    for ffn in find_ffns(model):
        own = [stored_of(module).total for module in ffn.projections]
        assert own == ([4.5, 8.5] if ffn.routed else [8.5, 8.5, 4.5])
    with open_session(model, "griffin", 0.5) as session:
        generate(model, torch.tensor([random_tokens(12)]), 3)
    codes, scales = (2 * 4 + 8) * INNER + (2 * 8 + 4) * INNER_SHARED, (INNER + INNER_SHARED) / 2
    read = codes / 2 + 2 * scales / 2 + scales  # half of everything but the scales of down
    assert session.weights_read == pytest.approx(read / (16 * 3 * (INNER + INNER_SHARED)), rel=2e-3)


def test_weights_of_32_bits_count_as_16(file, monkeypatch):
    monkeypatch.setattr(gguf_files, "KINDS", dict.fromkeys(gguf_files.KINDS, "F32"))
    model = resolve(ModelSpec(str(write(file)))).load()[0]
    assert served_bits(find_ffns(model)) == 16


def test_bits_that_the_file_does_not_say_count_16_and_are_about(file):
    known = resolve(ModelSpec(str(file)))
    assert not about(find_ffns(known.load()[0]))
    kept = Path(known.source) / gguf.FACTS
    facts = json.loads(kept.read_text())
    bits = {n: b for n, b in facts["bits"].items() if not n.startswith("blk.1.") or "up" in n}
    kept.write_text(json.dumps({**facts, "bits": bits}))
    ffns = find_ffns(known.load()[0])
    assert [stored_of(m).total for m in ffns[1].projections] == [16, 4.5, 16] and about(ffns)


def test_only_weights_of_a_file_are_near_its_grid(file, monkeypatch):
    """scripts/format_errors.py"""
    monkeypatch.setattr(gguf_files, "KINDS", dict.fromkeys(gguf_files.KINDS, "Q4_0"))
    torch.manual_seed(0)
    found = format_errors.measure(gguf.folder(write(file)), rows=32)
    own, normal = found["own"], found["Gaussian"]
    assert own["4"] < 1e-4 < own["3"] / 100  # 4 bits in groups of 32 are Q4_0's grid, up to 16-bit values
    assert own["5"] < 1e-4, "every second step of 5 bits is one of 4"
    assert normal["4"] / own["4"] > 50
    assert own["first 2 of 8:128"] > own["first 4 of 8:128"] > own["8:128"] > 0
    assert format_errors.table(found).count("\n") == 1 + len(own)


@pytest.mark.slow
def test_a_run_scores_and_generates_and_counts_its_bytes(file, tmp_path):
    given = {"method": "dense,griffin,cats,magnitude", "sparsity": 0.4, "tasks": "smoke_questions,smoke_summary"}
    given |= {"limit": 2, "gen_kwargs": "max_gen_toks=4", "model": str(file), "output": str(tmp_path / "out")}
    result = run_local(config_from(None, given), Watch())
    assert not result.failed and len(result.records) == 8
    share = (4.5 + 4.5 + 8.5) / 3 / 16
    for record in result.records:
        assert record.weights_read == pytest.approx(share * (1 - record.inputs["sparsity"]), abs=0.01)


@pytest.mark.slow
@given(st.randoms(use_true_random=False))
@settings(max_examples=settings.default.max_examples // 8, suppress_health_check=list(HealthCheck))
def test_a_file_with_any_damage_is_refused_or_gives_its_own_weights(tmp_path_factory, random):
    """Never random weights in place of what is missing, nor a layer less, nor for ever."""
    file = write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")
    how = damaged(random, file)
    stock = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it takes longer than any file may"))
    signal.alarm(30)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DART_EVAL_CACHE", str(file.parent / "cache"))
            model = resolve(ModelSpec(str(file))).load()[0]
        assert differing(model, file) == [], how
    except UserError:
        pass  # one line, wherever it is raised
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, stock)
        shutil.rmtree(file.parent)
