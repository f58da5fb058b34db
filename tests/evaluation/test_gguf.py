"""GGUF files as models: what they hold, what it costs, and files that are none."""

import gguf as library
import pytest
import torch
from gguf.quants import dequantize

from dart_eval import gguf
from dart_eval.config import config_from
from dart_eval.errors import UserError
from dart_eval.ffn import find_ffns
from dart_eval.models import ModelSpec, resolve
from dart_eval.rounding import served_bits_of
from tests.helpers.commands import Watch, run_local
from tests.helpers.gguf_files import LAYERS, write


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
            assert served_bits_of(module) == bits
            assert torch.equal(module.weight, torch.tensor(dequantize(tensor.data, tensor.tensor_type)))


def test_a_file_is_converted_once(file, monkeypatch):
    first = resolve(ModelSpec(str(file)))
    monkeypatch.setattr(gguf, "convert", lambda *args, **kwargs: pytest.fail("converted again"))
    assert resolve(ModelSpec(str(file))).identity == first.identity


def test_another_file_of_that_name_is_another_model(file):
    first = resolve(ModelSpec(str(file)))
    write(file, seed=1)
    assert resolve(ModelSpec(str(file))).identity.weights != first.identity.weights


@pytest.mark.parametrize("damage", [lambda raw: b"no model", lambda raw: raw[: len(raw) // 2]])
def test_a_damaged_file_is_one_line_and_leaves_nothing(file, damage, tmp_path):
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=r"transformers cannot read .*tiny\.gguf"):
        resolve(ModelSpec(str(file)))
    assert not [f for f in (tmp_path / "cache").rglob("*") if f.suffix != ".lock"]


def test_without_the_package_it_is_named(file, monkeypatch):
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package gguf"):
        resolve(ModelSpec(str(file)))


@pytest.mark.slow
def test_a_run_scores_and_generates_and_counts_its_bytes(file, tmp_path):
    given = {"method": "dense,griffin,cats,magnitude", "sparsity": 0.4, "tasks": "smoke_questions,smoke_summary"}
    given |= {"limit": 2, "model": str(file), "output": str(tmp_path / "out")}
    result = run_local(config_from(None, given), Watch())
    assert not result.failed and len(result.records) == 8
    share = (4.5 + 4.5 + 8.5) / 3 / 16
    for record in result.records:
        assert record.weights_read == pytest.approx(share * (1 - record.inputs["sparsity"]), abs=0.01)
