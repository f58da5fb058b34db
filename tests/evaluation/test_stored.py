"""Checkpoints whose weights are expanded when they are loaded: their bits are those of the files."""

import importlib.util
import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, Phi3Config, Qwen2MoeConfig, Qwen3MoeConfig

import dart_eval
from dart_eval.layers.find import describe, find_ffns
from dart_eval.layers.projection import weight_matrix
from dart_eval.models.loading import ModelSpec, resolve
from dart_eval.results.board import boards
from dart_eval.results.store import Store
from dart_eval.sweep.config import config_from
from dart_eval.util.errors import UserError
from dart_eval.weights.rounding import served_bits, stored_of
from dart_eval.weights.stored import Files, _bits
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
# kind: the family, how it is made, its dtype, and the bits of a weight of gate and of down by hand.
KINDS = {
    "fp8": ("llama", stored.fp8, "bfloat16", 8 + 32 / 32**2, 8 + 32 / 32**2),  # a scale of 32 bits for 32 x 32 weights
    "fp8 experts": ("qwen3_moe", stored.fp8, "bfloat16", 8 + 32 / 32**2, 8 + 32 / 32**2),
    "fp8 rows": ("llama", stored.fp8_rows, "bfloat16", 8 + 16 / 64, 8 + 16 / 128),  # a scale of 16 bits for a row
    "int4 groups": ("llama", stored.int4_groups, "bfloat16", 4 + 16 / 32, 4 + 16 / 32),
    "int4 groups, fused": ("phi3", stored.int4_groups, "bfloat16", 4 + 16 / 32, 4 + 16 / 32),  # gate above up
    "int8 rows": ("llama", stored.int8_rows, "bfloat16", 8 + 16 / 64, 8 + 16 / 128),
    "mxfp4": ("gpt_oss", stored.mxfp4, "bfloat16", 4 + 8 / 32, 4 + 8 / 32),  # a power of two of 8 bits for 32 weights
    # A scale and a zero point for 32 weights.
    "gptq": ("llama", stored.gptq, "float16", 4 + 20 / 32, 4 + 20 / 32),
    "awq": ("llama", stored.awq, "float16", 4 + 20 / 32, 4 + 20 / 32),
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
def test_bits_are_those_of_the_files(checkpoint, kind):
    told = []
    ffns = find_ffns(_loaded(checkpoint(kind)[0], kind, told))
    into, down = KINDS[kind][3:]
    assert all(stored_of(f.projections[0]).total == into and stored_of(f.down).total == down for f in ffns)
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


def _files(folder, entries, shards=1):
    """A checkpoint of these tensors, name -> tensor, in so many files."""
    folder.mkdir()
    names = sorted(entries)
    if shards == 1:
        save_file(entries, folder / "model.safetensors")
    else:
        place = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(names)}
        for shard in set(place.values()):
            save_file({n: entries[n] for n in names if place[n] == shard}, folder / shard)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    return Files(str(folder), None)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_layer_is_not_taken_for_another(tmp_path, shards):
    """Layer 1 among twelve, in files of which each has a part; and roots that another wrapper gives."""
    entries = {f"model.language_model.layers.{i}.mlp.up_proj.weight": torch.zeros(8, i + 1) for i in range(12)}
    entries |= {f"{root}.layers.1.mlp.up_proj.weight": torch.zeros(3, 3) for root in ("visual", "mtp", "talker.model")}
    files = _files(tmp_path / "model", entries, shards)
    for i in (1, 11):
        name = f"model.layers.{i}.mlp.up_proj"  # as it is called in memory
        assert files.tensors_of(name) == [f"model.language_model.layers.{i}.mlp.up_proj.weight"]
        assert files.bits(files.tensors_of(name), 8 * (i + 1)) == 16 * 8 * (i + 1)


def test_two_roots_that_fit_are_none(tmp_path):
    files = _files(tmp_path / "model", {f"{root}.layers.0.mlp.up_proj.weight": torch.zeros(2, 2) for root in "ab"})
    assert files.tensors_of("model.layers.0.mlp.up_proj") == []


def test_experts_are_those_of_their_layer_under_any_name(tmp_path):
    entries = {f"model.layers.{i}.block_sparse_moe.experts.1.w{j}.weight": torch.zeros(4, 4 + i)
               for i in (1, 11) for j in (1, 2, 3)}  # fmt: skip
    entries["model.layers.1.block_sparse_moe.shared_experts.w1.weight"] = torch.zeros(9, 9)
    entries["model.layers.1.block_sparse_moe.gate.weight"] = torch.zeros(4, 4)
    files = _files(tmp_path / "model", entries)
    assert files.bits(files.experts(1), 3 * 20) == 3 * 20 * 32
    assert len(files.experts(11)) == 3


def test_experts_beside_shared_ones_have_the_bits_of_their_own_layer(tmp_path):
    """A layer with shared experts has two FFNs, so that the number of an FFN is not that of its layer."""
    sizes = SIZES | {"num_hidden_layers": 3}
    model = AutoModelForCausalLM.from_config(
        Qwen2MoeConfig(
            **sizes, intermediate_size=32, moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts=4,
            num_experts_per_tok=2,
        )
    )  # fmt: skip
    kinds = [torch.float16, torch.int8, torch.float16]
    entries = {f"model.layers.{i}.other.experts.{e}.w{j}.weight": torch.zeros(32, stored.WIDTH, dtype=kinds[i])
               for i in range(3) for e in range(4) for j in range(3)}  # fmt: skip
    files = _files(tmp_path / "model", entries)
    routed = [f for f in describe(model) if f.routed is not None]
    assert [f.layer for f in routed] != [f.number for f in routed] == [0, 1, 2]
    assert [_bits(f, f.down, {}, files) for f in routed] == [16, 8, 16]


def test_weights_of_32_bits_count_as_the_16_that_they_would_be_served_with(tmp_path):
    entries = {"m.weight": torch.zeros(4, 8), "m.bias": torch.zeros(4), "q.weight": torch.zeros(4, 8, dtype=torch.int8)}
    files = _files(tmp_path / "model", entries | {"q.weight_scale": torch.zeros(4, 1)})
    assert files.bits(files.tensors_of("m"), 32) == 32 * 16
    assert files.bits(files.tensors_of("q"), 32) == 32 * 8 + 4 * 32


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
    into, down = KINDS[kind][3:]
    share = (2 * into + down) / 3 / 16
    reads = {row.label: row.read for row in board.rows if row.keys}
    assert reads["dense"] == pytest.approx(share)
    across = down % 1 / 3 / 16  # the scales of down stand for several neurons each, and are read whole
    assert reads["griffin"] == pytest.approx((share + across) / 2, abs=0.001)
