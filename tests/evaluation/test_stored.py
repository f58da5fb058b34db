"""Checkpoints whose weights are expanded when they are loaded: their bits are those of the configuration."""

import importlib.util
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, Phi3Config, Qwen3MoeConfig

import dart_eval
from dart_eval.layers.find import describe, find_ffns
from dart_eval.layers.projection import weight_matrix
from dart_eval.layers.quantised import stated_bits
from dart_eval.models.loading import ModelSpec, resolve
from dart_eval.results.board import boards, verdicts
from dart_eval.results.metrics import percent
from dart_eval.results.store import Store
from dart_eval.results.tables import board_tables
from dart_eval.sweep.options import config_from
from dart_eval.util.errors import UserError
from dart_eval.weights.rounding import about, served_bits, stored_of
from tests.helpers import stored
from tests.helpers.commands import Watch, run_local
from tests.helpers.models import VOCAB

SIZES = {
    "vocab_size": VOCAB, "hidden_size": stored.WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": lambda: LlamaConfig(**SIZES, intermediate_size=stored.SIZE),
    "phi3": lambda: Phi3Config(**SIZES, intermediate_size=stored.SIZE),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SIZES,
        intermediate_size=stored.SIZE,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        head_dim=16,
    ),
    "gpt_oss": lambda: GptOssConfig(
        **SIZES, intermediate_size=64, num_local_experts=4, num_experts_per_tok=2, head_dim=16
    ),
}
GPTQ = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("gptqmodel", "optimum")),
    reason="gptqmodel and optimum are not installed: they want the newest torch",
)
# kind: family, how it is made, dtype, and the bits of a weight by hand: scales of rows and blocks are neglected.
KINDS = {
    "fp8": ("llama", stored.fp8, "bfloat16", 8),
    "fp8 experts": ("qwen3_moe", stored.fp8, "bfloat16", 8),
    "fp8 rows": ("llama", stored.fp8_rows, "bfloat16", 8),
    "int4 groups": ("llama", stored.int4_groups, "bfloat16", 4 + 16 / 32),
    "int4 groups, fused": ("phi3", stored.int4_groups, "bfloat16", 4 + 16 / 32),  # gate above up
    "int8 rows": ("llama", stored.int8_rows, "bfloat16", 8),
    "mxfp4": ("gpt_oss", stored.mxfp4, "bfloat16", 4 + 8 / 32),  # a power of two of 8 bits for 32 weights
    "gptq": ("llama", stored.gptq, "float16", 4 + 16 / 32),
    "awq": ("llama", stored.awq, "float16", 4 + 16 / 32),
}
ALL = [pytest.param(kind, marks=GPTQ) if kind in ("gptq", "awq") else kind for kind in KINDS]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    """By kind: a folder, and what its weights stand for."""
    made = {}

    def of(kind):
        if kind not in made:
            family, make, dtype, *_ = KINDS[kind]
            folder = tmp_path_factory.mktemp("stored") / "model"
            torch.manual_seed(0)
            plain = AutoModelForCausalLM.from_config(FAMILIES[family]())
            for p in plain.parameters():
                p.data.add_(torch.randn_like(p) * 0.2)
            plain.to(getattr(torch, dtype)).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[kind] = folder, make(folder)
        return made[kind]

    return of


def _loaded(folder, kind, told=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return resolve(ModelSpec(str(folder), dtype=KINDS[kind][2])).load(
            note=[].append if told is None else told.append
        )[0]


@pytest.mark.parametrize("kind", ALL)
def test_bits_are_those_of_the_configuration(checkpoint, kind):
    told = []
    ffns = find_ffns(_loaded(checkpoint(kind)[0], kind, told))
    assert all(stored_of(m).total == KINDS[kind][3] for f in ffns for m in f.projections)
    assert about(ffns) and told == []


@pytest.mark.parametrize("kind", ALL)
def test_weights_are_what_the_codes_stand_for(checkpoint, kind):
    folder, values = checkpoint(kind)
    model = _loaded(folder, kind)
    ffns = find_ffns(model)
    names = {id(module): name for name, module in model.named_modules()}
    for ffn in ffns:
        for module in ffn.projections:
            if ffn.routed is None:
                found, wanted = weight_matrix(module), values[f"{names[id(module)]}.weight"]
            elif kind == "mxfp4":
                part = "down_proj" if module is ffn.down else "gate_up_proj"
                found, wanted = module.parameter, values[f"model.layers.{ffn.layer}.mlp.experts.{part}"]
            else:
                root = f"model.layers.{ffn.layer}.mlp.experts"
                parts = ["down_proj"] if module is ffn.down else ["gate_proj", "up_proj"]
                wanted = torch.stack([torch.cat([values[f"{root}.{e}.{p}.weight"] for p in parts]) for e in range(4)])
                found = module.parameter
            assert torch.allclose(found.float(), wanted, rtol=2**-7, atol=1e-3)  # rounded to 16 bits


def test_inputs_that_are_quantised_stay_so(checkpoint):
    """compressed-tensors rounds what a projection is given: its forward is not replaced by ours."""
    model = _loaded(checkpoint("fp8 rows")[0], "fp8 rows")
    with dart_eval.prune(model, "griffin", 0.5) as session:
        model(torch.tensor([[1, 5, 6, 7]]))
    assert session.execution == "masked"


def test_bits_that_the_configuration_does_not_say_are_told_and_count_16(checkpoint, monkeypatch):
    monkeypatch.setattr("dart_eval.layers.quantised.NAMED", re.compile("x(x)"))
    told = []
    assert served_bits(find_ffns(_loaded(checkpoint("fp8")[0], "fp8", told))) == 16
    assert told == ["the configuration of this fp8 checkpoint does not say how many bits a weight has: reads count 16"]


def test_projections_that_the_configuration_leaves_out_have_16_bits(checkpoint, tmp_path):
    """By a part of their names, or by a pattern."""
    resolved = resolve(ModelSpec(str(checkpoint("int8 rows")[0])))
    resolved.config.quantization_config["ignore"] = ["layers.0.mlp.down", "re:.*1.mlp.up_proj$"]
    bits = [[stored_of(m).total for m in f.projections] for f in describe(resolved.outline())]
    assert bits == [[8, 8, 16], [8, 16, 8]]


STATED = [
    ({"quant_method": "gptq", "bits": 3, "group_size": 128}, 3 + 16 / 128),
    ({"quant_method": "gptq", "bits": 4, "group_size": -1}, 4),
    ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}}, 4 + 16 / 64),
    ({"quant_method": "quanto", "weights": "int2"}, 2),
    ({"quant_method": "fbgemm_fp8"}, 8),
    ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8DynamicActivationInt4WeightConfig"}}}, 4),
    ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {
        "input_activations": {"num_bits": 8}, "weights": {"num_bits": 4, "group_size": 128}}}}, 4 + 16 / 128),
    ({"quant_method": "bitnet"}, 16),
    (None, 16),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "bits"), STATED)
def test_bits_are_read_from_the_settings_of_any_method(settings, bits):
    found = stated_bits(SimpleNamespace(quantization_config=settings))
    assert found.total == bits and found.about


@pytest.mark.skipif(importlib.util.find_spec("optimum") is not None, reason="the library is there")
def test_a_library_that_is_missing_is_named(checkpoint):
    with pytest.raises(UserError, match=r"requires optimum .*; install the packages that it needs"):
        _loaded(checkpoint("gptq")[0], "gptq")


@pytest.mark.parametrize("kind", ["fp8 rows", "mxfp4"])
def test_a_plan_knows_the_shape_of_a_quantised_model(checkpoint, kind):
    """It is made without weights, and so without their library's modules."""
    ffns = describe(resolve(ModelSpec(str(checkpoint(kind)[0]))).outline())
    assert [(f.size, f.width) for f in ffns] == 2 * [(2 * 64 if kind == "mxfp4" else stored.SIZE, stored.WIDTH)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int4 groups", "fp8 experts", "mxfp4"])
def test_a_quantised_model_and_its_pruned_self_stand_on_a_board(checkpoint, kind, tmp_path):
    given = {"method": "dense,griffin", "sparsity": 0.5, "tasks": "smoke_questions,smoke_summary", "limit": 2}
    given |= {"model": str(checkpoint(kind)[0]), "output": str(tmp_path / "out")}
    result = run_local(config_from(None, given), Watch())
    assert not result.failed and len(result.records) == 4
    (board,) = boards(Store(tmp_path / "out"), result.records)
    share = KINDS[kind][3] / 16
    reads = {row.label: row.read for row in board.rows if row.keys}
    assert reads["dense"] == pytest.approx(share)
    across = KINDS[kind][3] % 1 / 3 / 16  # the scales of down stand for several neurons each, and are read whole
    assert reads["griffin"] == pytest.approx((share + across) / 2, abs=0.001)
    assert all(record.settings["about"] for record in result.records)
    shown = [row[0] for table in board_tables([board]) for row in table.body]
    assert f"≈{percent(reads['griffin'])}" in shown
    assert not any(verdict for block in board.blocks for verdict in verdicts(block))
