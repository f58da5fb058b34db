"""Checkpoints whose weights are quantised: their real bits, what they stand for, and a board with their bytes."""

import importlib.util
import re
import warnings

import bitsandbytes
import pytest
import torch
import transformers
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
from torchao.quantization.granularity import PerGroup

import dart_eval
from dart_eval.bench.decode import Setting, measure
from dart_eval.layers import quantised
from dart_eval.layers.find import describe, find_ffns
from dart_eval.layers.projection import weight_matrix
from dart_eval.models.loading import ModelSpec, resolve
from dart_eval.pruning.registry import make
from dart_eval.results.board import boards, verdicts
from dart_eval.results.metrics import percent
from dart_eval.results.store import Store
from dart_eval.results.tables import board_tables
from dart_eval.sweep.options import config_from
from dart_eval.sweep.run import begin_sweep
from dart_eval.util.errors import UserError
from dart_eval.weights.rounding import about, served_bits, stored_of
from tests.helpers import stored
from tests.helpers.commands import Watch, run_local
from tests.helpers.models import VOCAB, random_tokens
from tests.helpers.stored import SIZE, WIDTH

LIBRARIES = {
    "torchao-8": lambda: transformers.TorchAoConfig(Int8WeightOnlyConfig()),
    "torchao-4": lambda: transformers.TorchAoConfig(
        IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    ),
    "bitsandbytes-8": lambda: transformers.BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes-4": lambda: transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    ),
}
# Of a weight: a scale of 16 bits for 32 weights, one of 32 bits for 64; those of rows are neglected.
OF_LIBRARY = {"torchao-8": 8, "torchao-4": 4 + 16 / 32, "bitsandbytes-8": 8, "bitsandbytes-4": 4 + 32 / 64}


def _saved(folder, tokenizer, family="llama", dtype="bfloat16"):
    """The folder of a model whose weights are not quantised."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]())
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.2)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tokenizer):
    return _saved(tmp_path_factory.mktemp("models") / "wide", tokenizer)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, plain, tokenizer):
    """Folder by kind."""
    found = {}
    for kind, how in LIBRARIES.items():
        found[kind] = tmp_path_factory.mktemp("kinds") / kind
        model = transformers.AutoModelForCausalLM.from_pretrained(
            plain, quantization_config=how(), dtype=torch.bfloat16
        )
        model.save_pretrained(found[kind])
        tokenizer.save_pretrained(found[kind])
    return found


def _loaded(folder, dtype="auto", told=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return resolve(ModelSpec(str(folder), dtype=dtype)).load(note=[].append if told is None else told.append)[0]


@pytest.mark.parametrize("kind", LIBRARIES)
def test_bits_and_weights_are_what_the_library_says_they_are(checkpoints, kind):
    model = _loaded(checkpoints[kind])
    modules = [m for layer in model.model.layers for m in layer.mlp.children() if hasattr(m, "weight")]
    # Asked before any forward: bitsandbytes turns its weights around in the first one on some CPUs.
    theirs = [_dequantised(kind, module) for module in modules]
    ffns = find_ffns(model)
    assert served_bits(ffns) == OF_LIBRARY[kind] and about(ffns)
    for module, values in zip(modules, theirs, strict=True):
        ours = weight_matrix(module)
        assert ours.shape == values.shape
        assert torch.allclose(ours.float(), values.float(), rtol=2**-7, atol=1e-6)  # products round to bfloat16


def _dequantised(kind, module):
    if kind.startswith("torchao"):
        return module.weight.dequantize()
    if kind.endswith("8"):
        return module.weight * module.weight.SCB[:, None] / 127
    return bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)


@pytest.mark.parametrize(("kind", "scales"), [("torchao-8", 5), ("bitsandbytes-8", 0)])
def test_memory_is_what_parameters_take(checkpoints, kind, scales):
    """bitsandbytes has its scales beside them, which are left out."""
    model = _loaded(checkpoints[kind])
    embeddings = 2 * VOCAB * WIDTH * 2  # of the input and of the head
    norms = 5 * WIDTH * 2
    rows = 2 * (WIDTH + WIDTH // 2 + WIDTH // 2 + WIDTH + 2 * SIZE + WIDTH)  # of all projections, each with its scale
    weights = 2 * (WIDTH * (2 * WIDTH + WIDTH) + 3 * WIDTH * SIZE)
    assert quantised.nbytes(model) == embeddings + norms + weights + scales * rows


@pytest.mark.parametrize("kind", ["torchao-4", "torchao-8", "bitsandbytes-4"])
def test_a_ceiling_is_held_against_the_model_itself(checkpoints, kind):
    """Its head has 16 bits."""
    model, bits = _loaded(checkpoints[kind]), OF_LIBRARY[kind]
    found = measure(model, make("griffin"), 0.5, Setting(8, 1))
    every = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    size = {id(m): bits * m.in_features * m.out_features for m in every}
    own = sum(size[id(m)] for f in find_ffns(model) for m in f.projections)
    phi = own / (sum(size.values()) + 16 * model.lm_head.weight.numel())
    read = (bits + bits // 1 / 2 + bits % 1) / (3 * bits)  # half of all but the scales of down
    assert found.ceiling == pytest.approx(1 / (1 - phi * (1 - read))) and found.weights_read == pytest.approx(read)


@pytest.mark.parametrize("kind", ["torchao-8", "bitsandbytes-4"])
def test_what_needs_plain_weights_is_left_out_before_the_first_cell(checkpoints, kind, tmp_path):
    """Nothing can stand in for their weights."""

    def planned(**more):
        given = {"tasks": "smoke_questions", "model": str(checkpoints[kind]), "output": str(tmp_path / "out"), **more}
        watch = Watch()
        cells = begin_sweep([config_from(None, given)], watch).cells
        return [cell.method.name for cell in cells.values()], [note for note in watch.notes if "left out" in note]

    methods, notes = planned()
    assert methods == ["dense", "noise", "griffin", "dart"] and ["grinqh" in note for note in notes] == [True]
    for given in ({"method": "rounding"}, {"ffn_bits": "4"}):
        with pytest.raises(UserError, match="load the model unquantised"):
            planned(**given)
    methods, notes = planned(ffn_bits="16,4", method="dense,griffin")
    assert methods == ["dense", "griffin"] and ["4 bits" in note for note in notes] == [True, True]


@pytest.mark.parametrize("bits", [4, 8])
def test_load_in_gives_what_transformers_makes_of_it_with_the_bits_that_it_stores(plain, bits):
    resolved, ids = resolve(ModelSpec(str(plain), load_in=f"{bits}bit")), torch.tensor([random_tokens(9)])
    model, _ = resolved.load()
    how = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(plain, quantization_config=how, dtype=model.dtype)
    assert torch.equal(model(input_ids=ids).logits, theirs(input_ids=ids).logits)
    ffns = find_ffns(model)
    assert served_bits(ffns) == (4.5 if bits == 4 else 8)  # 64 weights of 4 bits have a scale
    assert len(describe(resolved.outline())) == len(ffns)
    before, after = resolve(ModelSpec(str(plain))).identity, resolved.identity
    assert after.name == f"{before.name}+{bits}bit" and after.weights != before.weights


def test_a_run_takes_load_in_and_reads_the_stored_bytes(plain, tmp_path):
    given = {"model_args": f"pretrained={plain},load_in=4bit", "limit": 1}
    given |= {"method": "dense,griffin", "tasks": "smoke_questions", "output": str(tmp_path / "out"), "device": "cpu"}
    dense, griffin = run_local(config_from(None, given), Watch()).records
    assert dense.inputs["model"]["name"] == "wide+4bit" and "--load-in 4bit" in dense.settings["command"]
    assert dense.weights_read == pytest.approx(4.5 / 16)
    assert griffin.weights_read == pytest.approx(4.5 / 16 / 2, rel=0.05)


def test_weights_are_not_quantised_twice(checkpoints):
    with pytest.raises(UserError, match="leave one of them out"):
        resolve(ModelSpec(str(checkpoints["bitsandbytes-8"]), load_in="4bit"))


# -- expanded when they are loaded -------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
ROUTED = {"num_experts_per_tok": 2, "head_dim": 16}
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, intermediate_size=SIZE),
    "phi3": lambda: transformers.Phi3Config(**SIZES, intermediate_size=SIZE),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SIZES, **ROUTED, intermediate_size=SIZE, moe_intermediate_size=32, num_experts=4
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(**SIZES, **ROUTED, intermediate_size=64, num_local_experts=4),
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
            folder = _saved(tmp_path_factory.mktemp("stored") / "model", tokenizer, family, dtype)
            made[kind] = folder, make(folder)
        return made[kind]

    return of


@pytest.mark.parametrize("kind", ALL)
def test_bits_are_those_of_the_configuration_and_weights_what_the_codes_stand_for(checkpoint, kind):
    (folder, values), told = checkpoint(kind), []
    model = _loaded(folder, KINDS[kind][2], told)
    ffns = find_ffns(model)
    assert all(stored_of(m).total == KINDS[kind][3] for f in ffns for m in f.projections)
    assert about(ffns) and told == []
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
    model = _loaded(checkpoint("fp8 rows")[0])
    with dart_eval.prune(model, "griffin", 0.5) as session:
        model(torch.tensor([[1, 5, 6, 7]]))
    assert session.execution == "masked"


def test_bits_that_the_configuration_does_not_say_are_told_and_count_16(checkpoint, monkeypatch):
    monkeypatch.setattr("dart_eval.layers.quantised.NAMED", re.compile("x(x)"))
    told = []
    assert served_bits(find_ffns(_loaded(checkpoint("fp8")[0], told=told))) == 16
    assert len(told) == 1 and "count 16" in told[0]


def test_projections_that_the_configuration_leaves_out_have_16_bits(checkpoint, tmp_path):
    """By a part of their names, or by a pattern."""
    resolved = resolve(ModelSpec(str(checkpoint("int8 rows")[0])))
    resolved.config.quantization_config["ignore"] = ["layers.0.mlp.down", "re:.*1.mlp.up_proj$"]
    bits = [[stored_of(m).total for m in f.projections] for f in describe(resolved.outline())]
    assert bits == [[8, 8, 16], [8, 16, 8]]


@pytest.mark.skipif(importlib.util.find_spec("optimum") is not None, reason="the library is there")
def test_a_library_that_is_missing_is_named(checkpoint):
    with pytest.raises(UserError, match="optimum"):
        _loaded(checkpoint("gptq")[0])


@pytest.mark.parametrize("kind", ["fp8 rows", "mxfp4"])
def test_a_plan_knows_the_shape_of_a_quantised_model(checkpoint, kind):
    """It is made without weights, and so without their library's modules."""
    ffns = describe(resolve(ModelSpec(str(checkpoint(kind)[0]))).outline())
    assert [(f.size, f.width) for f in ffns] == 2 * [(2 * 64 if kind == "mxfp4" else SIZE, WIDTH)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int4 groups", "fp8 experts", "mxfp4", "torchao-4", "bitsandbytes-4"])
def test_a_quantised_model_and_its_pruned_self_stand_on_a_board(checkpoint, checkpoints, kind, tmp_path):
    whole = kind in OF_LIBRARY  # weights that methods of every kind take
    given = {"method": "dense,griffin,magnitude,cats" if whole else "dense,griffin", "sparsity": 0.5, "limit": 2}
    given |= {"tasks": "smoke_questions,smoke_summary", "gen_kwargs": "max_gen_toks=4", "output": str(tmp_path / "out")}
    given["model"] = str(checkpoints[kind] if whole else checkpoint(kind)[0])
    result = run_local(config_from(None, given), Watch())
    assert not result.failed and len(result.records) == (8 if whole else 4)
    (board,) = boards(Store(tmp_path / "out"), result.records)
    bits = OF_LIBRARY[kind] if whole else KINDS[kind][3]
    share, across = bits / 16, bits % 1 / 3 / 16  # scales of down stand for several neurons each, and are read whole
    reads = {row.label: row.read for row in board.rows if row.keys}
    assert reads.pop("dense") == pytest.approx(share)
    for method, read in reads.items():
        written = 0.25 if method == "cats" else 0.5
        assert read == pytest.approx(share / 2 + across * (1 - written), abs=0.001), method
    if not whole:
        assert all(record.settings["about"] for record in result.records)
        shown = [row[0] for table in board_tables([board]) for row in table.body]
        assert f"≈{percent(reads['griffin'])}" in shown
        assert not any(verdict for block in board.blocks for verdict in verdicts(block))
