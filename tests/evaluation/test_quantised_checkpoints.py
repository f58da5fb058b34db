"""Checkpoints of torchao and bitsandbytes, saved or quantised while they are loaded: their real bits, what they stand
for, and a board with their bytes."""

import warnings

import bitsandbytes
import pytest
import torch
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
from torchao.quantization.granularity import PerGroup
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, TorchAoConfig

from dart_eval.bench.decode import Setting, measure
from dart_eval.layers import quantised
from dart_eval.layers.find import describe, find_ffns
from dart_eval.layers.projection import weight_matrix
from dart_eval.layers.shape import stored_share
from dart_eval.models.loading import ModelSpec, resolve
from dart_eval.pruning.registry import make
from dart_eval.results.board import boards
from dart_eval.results.store import Store
from dart_eval.sweep.options import config_from
from dart_eval.sweep.run import begin_sweep
from dart_eval.util.errors import UserError
from dart_eval.weights.rounding import about, served_bits
from tests.helpers.commands import Watch, run_local
from tests.helpers.models import VOCAB, random_tokens

WIDTH, SIZE = 64, 128  # the kernels of bitsandbytes for CPUs take no narrower rows
KINDS = {
    "torchao-8": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    "torchao-4": lambda: TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))),
    "bitsandbytes-8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes-4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    ),
}
# Of a weight: a scale of 16 bits for 32 weights, one of 32 bits for 64; those of rows are neglected.
BITS = {"torchao-8": 8, "torchao-4": 4 + 16 / 32, "bitsandbytes-8": 8, "bitsandbytes-4": 4 + 32 / 64}


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tokenizer):
    """The folder of a model whose weights are not quantised."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=SIZE, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.2)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, plain, tokenizer):
    """Folder by kind."""
    found = {}
    for kind, how in KINDS.items():
        found[kind] = tmp_path_factory.mktemp("kinds") / kind
        model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=how(), dtype=torch.bfloat16)
        model.save_pretrained(found[kind])
        tokenizer.save_pretrained(found[kind])
    return found


def _loaded(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return resolve(ModelSpec(str(folder))).load()[0]


@pytest.mark.parametrize("kind", KINDS)
def test_bits_and_weights_are_what_the_library_says_they_are(checkpoints, kind):
    model = _loaded(checkpoints[kind])
    modules = [m for layer in model.model.layers for m in layer.mlp.children() if hasattr(m, "weight")]
    # Asked before any forward: bitsandbytes turns its weights around in the first one on some CPUs.
    theirs = [_dequantised(kind, module) for module in modules]
    ffns = find_ffns(model)
    assert served_bits(ffns) == BITS[kind] and about(ffns)
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


@pytest.mark.parametrize("kind", ["torchao-4", "bitsandbytes-4"])
def test_a_ceiling_is_held_against_the_model_itself(checkpoints, kind):
    model = _loaded(checkpoints[kind])
    found = measure(model, make("griffin"), 0.5, Setting(8, 1))
    phi = stored_share(model, find_ffns(model))
    bits = BITS[kind]
    read = (bits + bits // 1 / 2 + bits % 1) / (3 * bits)  # half of all but the scales of down
    assert found.ceiling == pytest.approx(1 / (1 - phi * (1 - read))) and found.weights_read == pytest.approx(read)


def test_a_head_of_16_bits_lowers_the_ceiling_of_quantised_ffns(checkpoints):
    model = _loaded(checkpoints["torchao-8"])
    found = measure(model, make("griffin"), 0.5, Setting(8, 1))
    ours = {id(m) for f in find_ffns(model) for m in f.projections}
    size = {id(m): 8 * m.in_features * m.out_features for m in model.model.modules() if isinstance(m, torch.nn.Linear)}
    own, everything = sum(size[i] for i in ours), sum(size.values()) + 16 * model.lm_head.weight.numel()
    assert found.ceiling == pytest.approx(1 / (1 - own / everything * (1 - found.weights_read)))


@pytest.mark.parametrize("kind", ["torchao-8", "bitsandbytes-4"])
def test_what_needs_plain_weights_is_left_out_before_the_first_cell(checkpoints, kind, tmp_path):
    """Nothing can stand in for their weights."""

    def planned(**more):
        given = {"tasks": "smoke_questions", "model": str(checkpoints[kind]), "output": str(tmp_path / "out"), **more}
        watch = Watch()
        cells = begin_sweep([config_from(None, given)], watch).cells
        return [cell.method.name for cell in cells.values()], [note for note in watch.notes if "left out" in note]

    methods, notes = planned()
    assert methods == ["dense", "griffin", "dart"] and ["grinqh" in note for note in notes] == [True]
    for given in ({"method": "rounding"}, {"ffn_bits": "4"}):
        with pytest.raises(UserError, match="load the model unquantised"):
            planned(**given)
    methods, notes = planned(ffn_bits="16,4", method="dense,griffin")
    assert methods == ["dense", "griffin"] and ["4 bits" in note for note in notes] == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torchao-4", "bitsandbytes-4"])
def test_a_model_of_4_bits_and_its_pruned_self_stand_on_a_board_with_their_bytes(checkpoints, kind, tmp_path):
    given = {"method": "dense,griffin,magnitude,cats", "sparsity": 0.5, "tasks": "smoke_questions,smoke_summary"}
    given |= {"limit": 2, "gen_kwargs": "max_gen_toks=4", "model": str(checkpoints[kind])}
    given["output"] = str(tmp_path / "out")
    result = run_local(config_from(None, given), Watch())
    assert not result.failed and len(result.records) == 8
    (board,) = boards(Store(tmp_path / "out"), result.records)
    share = BITS[kind] / 16
    reads = {row.label: row.read for row in board.rows if row.keys}
    assert reads["dense"] == pytest.approx(share)
    across = BITS[kind] % 1 / 3 / 16  # the scales of down stand for several neurons each, and are read whole
    for method, written in (("griffin", 0.5), ("magnitude", 0.5), ("cats", 0.25)):
        assert reads[method] == pytest.approx(share / 2 + across * (1 - written), abs=0.001)


@pytest.mark.parametrize("bits", [4, 8])
def test_load_in_gives_what_transformers_makes_of_it_with_the_bits_that_it_stores(plain, bits):
    resolved, ids = resolve(ModelSpec(str(plain), load_in=f"{bits}bit")), torch.tensor([random_tokens(9)])
    model, _ = resolved.load()
    how = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    theirs = AutoModelForCausalLM.from_pretrained(plain, quantization_config=how, dtype=model.dtype)
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
