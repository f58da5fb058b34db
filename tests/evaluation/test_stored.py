"""Checkpoints whose weights are expanded when they are loaded: their bits are those of the files."""

import importlib.util
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, Qwen3MoeConfig

import dart_eval
from dart_eval.bits import Rounding
from dart_eval.config import config_from
from dart_eval.errors import UserError
from dart_eval.ffn import describe, features, find_ffns, weight_matrix
from dart_eval.models import ModelSpec, resolve
from dart_eval.results.board import boards
from dart_eval.results.store import Store
from dart_eval.rounding import coded, served_bits, served_bits_of
from tests.helpers import stored
from tests.helpers.commands import Watch, run_local
from tests.helpers.models import VOCAB

SIZES = {
    "vocab_size": VOCAB, "hidden_size": stored.WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": lambda: LlamaConfig(**SIZES, intermediate_size=stored.SIZE),
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
# kind: the family, how it is made, its dtype, and the bits of a weight of gate and of down by hand.
KINDS = {
    "fp8": ("llama", stored.fp8, "bfloat16", 8 + 32 / 32**2, 8 + 32 / 32**2),  # a scale of 32 bits for 32 x 32 weights
    "fp8 experts": ("qwen3_moe", stored.fp8, "bfloat16", 8 + 32 / 32**2, 8 + 32 / 32**2),
    "fp8 rows": ("llama", stored.fp8_rows, "bfloat16", 8 + 16 / 64, 8 + 16 / 128),  # a scale of 16 bits for a row
    "int4 groups": ("llama", stored.int4_groups, "bfloat16", 4 + 16 / 32, 4 + 16 / 32),
    "int8 rows": ("llama", stored.int8_rows, "bfloat16", 8 + 16 / 64, 8 + 16 / 128),
    "mxfp4": ("gpt_oss", stored.mxfp4, "bfloat16", 4 + 8 / 32, 4 + 8 / 32),  # a power of two of 8 bits for 32 weights
    # A scale and a zero point for 32 weights.
    "gptq": ("llama", stored.gptq, "float16", 4 + 20 / 32, 4 + 20 / 32),
    "awq": ("llama", stored.awq, "float16", 4 + 20 / 32, 4 + 20 / 32),
}
GRIDS = {"int4 groups": (4, 32), "int8 rows": (8,), "gptq": (4, 32), "awq": (4, 32)}  # bits, and the group if not a row
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
def test_bits_are_those_of_the_files(checkpoint, kind):
    told = []
    ffns = find_ffns(_loaded(checkpoint(kind)[0], kind, told))
    into, down = KINDS[kind][3:]
    assert all(served_bits_of(f.projections[0]) == into and served_bits_of(f.down) == down for f in ffns)
    assert served_bits(ffns) == pytest.approx((2 * into + down) / 3)
    assert told == []


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
                found, wanted = module.held, values[f"model.layers.{ffn.layer}.mlp.experts.{part}"]
            else:
                root = f"model.layers.{ffn.layer}.mlp.experts"
                parts = ["down_proj"] if module is ffn.down else ["gate_proj", "up_proj"]
                wanted = torch.stack([torch.cat([values[f"{root}.{e}.{p}.weight"] for p in parts]) for e in range(4)])
                found = module.held
            assert torch.allclose(found.float(), wanted, rtol=2**-7, atol=1e-3)  # rounded to 16 bits


@pytest.mark.parametrize("kind", ["fp8", "fp8 experts", "mxfp4"])
def test_weights_on_no_even_grid_have_no_plane(checkpoint, kind):
    model = _loaded(checkpoint(kind)[0], kind)
    with (
        pytest.raises(UserError, match=r"have (8\.03|4\.25) bits in another form"),
        dart_eval.prune(model, "dart-plus", 0.5),
    ):
        pass


@pytest.mark.parametrize("kind", [pytest.param(k, marks=GPTQ) if k in ("gptq", "awq") else k for k in GRIDS])
def test_codes_of_an_even_grid_are_found_and_pruned_by_their_high_bits(checkpoint, kind):
    folder, values = checkpoint(kind)
    model = _loaded(folder, kind)
    names = {id(module): name for name, module in model.named_modules()}
    into, down = KINDS[kind][3:]
    for ffn in find_ffns(model):
        for module in ffn.projections:
            held = coded(module)
            assert held.rounding == Rounding(*GRIDS[kind], *([] if GRIDS[kind][1:] else [features(module)[0]]))
            wanted = values[f"{names[id(module)]}.weight"]
            assert torch.allclose(held.values, wanted, rtol=1e-3, atol=1e-4)
    with dart_eval.prune(model, "dart-plus", 0.3) as session:
        model.generate(torch.tensor([[1, 5, 6, 7]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
    share = (2 * into + down) / 3 / 16
    assert 0.97 * 0.7 * share < session.weights_read <= 0.7 * share


def test_inputs_that_are_quantised_stay_so(checkpoint):
    """compressed-tensors rounds what a projection is given: its forward is not replaced by ours."""
    model = _loaded(checkpoint("fp8 rows")[0], "fp8 rows")
    with dart_eval.prune(model, "griffin", 0.5) as session:
        model(torch.tensor([[1, 5, 6, 7]]))
    assert session.execution == "masked"


def test_bits_that_the_files_do_not_say_are_told(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("fp8")[0], tmp_path / "model")
    file = folder / "model.safetensors"
    torch.save(load_file(file), folder / "pytorch_model.bin")
    file.unlink()
    told = []
    _loaded(folder, "fp8", told)
    assert told == [
        "the files of this fp8 checkpoint do not say how many bits 6 of 6 FFN projections have: their reads count what "
        "lies in memory"
    ]


def test_names_of_another_wrapper_are_found(checkpoint, tmp_path):
    """A text part may have other names in its file than in memory: what follows the layer's number counts."""
    from dart_eval.stored import _of

    folder, _ = checkpoint("fp8")
    held = load_file(folder / "model.safetensors")
    renamed = {k.replace("model.", "language_model.model.", 1): v for k, v in held.items()}
    renamed["vision_tower.layers.0.mlp.gate_proj.weight"] = torch.zeros(8, 8)
    save_file(renamed, tmp_path / "model.safetensors")
    sizes = {k: 8.0 * v.numel() * v.element_size() for k, v in renamed.items()}
    assert sum(_of("model.layers.0.mlp.gate_proj.", sizes)) == 64 * 128 * (8 + 32 / 32**2)


@pytest.mark.skipif(importlib.util.find_spec("optimum") is not None, reason="the library is there")
def test_a_library_that_is_missing_is_named(checkpoint):
    with pytest.raises(UserError, match=r"requires optimum .*; install what it needs"):
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
    into, down = KINDS[kind][3:]
    share = (2 * into + down) / 3 / 16
    reads = {row.label: row.read for level in board.levels for row in level.rows}
    assert reads["dense"] == pytest.approx(share)
    assert reads["griffin"] == pytest.approx(share / 2, abs=0.005)
