"""Calibrated rounding, a second time: GPTQ by elimination in fp64 numpy, its inputs without hooks, importance by grids.

`gptqmodel.json` holds the codes that another program gives on matrices that are drawn here again.
"""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dart_eval
from dart_eval.bench.subject import Subject
from dart_eval.kernels.cpu.packing import why_no_kernel
from dart_eval.layers.find import find_ffns
from dart_eval.layers.projection import plain_matrix
from dart_eval.pruning import calibration, cost
from dart_eval.pruning.caches import StatsCache
from dart_eval.pruning.calibration import Calibration
from dart_eval.pruning.registry import make
from dart_eval.results.board import boards
from dart_eval.results.store import Store
from dart_eval.results.tables import notes
from dart_eval.sweep.dart_lm import DartLM
from dart_eval.sweep.options import config_from
from dart_eval.util.bits import Rounding, parse, rounding_at
from dart_eval.util.errors import UserError
from dart_eval.weights import calibrated, gptq, k_quants
from dart_eval.weights.rounding import Rounded, rounded, served_bits, served_share
from tests.helpers.commands import Watch, run_local
from tests.helpers.models import made, phi3, tiny, word_tokenizer
from tests.helpers.sessions import bits as state_of
from tests.helpers.sessions import same
from tests.matrix import types

pytestmark = pytest.mark.slow
FROZEN = json.loads(Path(__file__).with_name("gptqmodel.json").read_text())
TEXT = Path(__file__).parents[1] / "golden" / "calibration.txt"
LENGTH = 50  # of a passage: the text has four whole ones, and one that is shorter


@pytest.fixture(autouse=True)
def short_passages(monkeypatch):
    monkeypatch.setattr(calibration, "SEGMENT", LENGTH)


def text_of(model, cache=None):
    return Calibration(model, word_tokenizer(), TEXT, cache=cache)


# -- GPTQ, from the paper ----------------------------------------------------------------------------------------------


def grid(weights, costs, bits):
    """The scale and the zero with the least error of a group of one row, by trying all."""
    top, tried = 2**bits - 1, []
    low, high = min(0.0, weights.min()), max(0.0, weights.max())
    widest = max((high - low) / top, 1e-12)

    def away(scale, zero):
        return np.clip(np.round(weights / (scale or 1.0)) + zero, 0, top) - zero

    for more in (0, -1, 1):
        zero = np.clip(np.round(-low / widest) + more, 0, top)
        for part in np.arange(1, 0.59, -0.05):
            codes = away(widest * part, zero)
            scale = float(np.float16((costs * weights * codes).sum() / ((costs * codes**2).sum() or 1.0)))
            tried.append(((costs * (weights - scale * away(scale, zero)) ** 2).sum(), len(tried), scale, zero))
    return min(tried)[2:]


def plain_gptq(weight, inputs, bits, group):
    """[out, in] values: after each column its row and column leave H^-1 by elimination, as in OBQ."""
    weight, (rows, width) = weight.astype(float).copy(), weight.shape
    group = min(group, width) or width
    hessian = inputs.T @ inputs
    importance = np.diag(hessian)
    starts = sorted(range(0, width, group), key=lambda at: -importance[at : at + group].max())
    order = [j for at in starts for j in sorted(range(at, min(at + group, width)), key=lambda j: -importance[j])]
    inverse = np.linalg.inv(hessian + 0.01 * importance.mean() * np.eye(width))
    left, costs = inverse.copy(), np.zeros(width)
    for j in order:
        costs[j] = 1 / left[j, j]
        left = left - np.outer(left[:, j], left[j]) / left[j, j]
    values, grids = np.zeros_like(weight), {}
    for place, j in enumerate(order):
        at = j // group
        if at not in grids:
            own = slice(at * group, min((at + 1) * group, width))
            grids[at] = [grid(weight[r, own], costs[own], bits) for r in range(rows)]
        for r, (scale, zero) in enumerate(grids[at]):
            code = np.clip(np.round(weight[r, j] / (scale or 1.0)) + zero, 0, 2**bits - 1)
            values[r, j] = scale * (code - zero)
        rest = order[place + 1 :]
        weight[:, rest] -= np.outer((weight[:, j] - values[:, j]) / inverse[j, j], inverse[j, rest])
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return values


def drawn(seed, out=8, width=64, tokens=200):
    r = np.random.RandomState(seed)
    x = r.standard_normal((tokens, width)) @ (r.standard_normal((width, width)) / 8 + np.eye(width))
    return r.standard_normal((out, width)), x * np.exp(r.standard_normal(width))


def ours(weight, inputs, rounding):
    weight, inputs = (torch.from_numpy(a).float() for a in (weight, inputs))
    group = min(rounding.group, weight.shape[1]) or weight.shape[1]
    return gptq.quantised(weight, *gptq.factor_of(inputs.T @ inputs, group), rounding)


def differing(here, there):
    """Share of values that differ by more than single precision does."""
    return float((np.abs(here - there) > 1e-3 * np.abs(there).max()).mean())


@pytest.mark.parametrize("spelled", ["gptq4:16", "gptq2:8", "gptq3:32", "gptq8:row", "gptq3:row", "gptq4:24"])
@pytest.mark.parametrize("width", [40, 200])
def test_codes_are_those_of_the_paper(spelled, width):
    """A last group is shorter, a row longer than a block, and one input is always 0."""
    weight, inputs = drawn(seed=width, width=width, tokens=150)
    inputs[:, 7] = 0
    rounding = parse(spelled)
    packed = ours(weight, inputs, rounding)
    assert differing(packed.values.numpy(), plain_gptq(weight, inputs, rounding.bits, rounding.group)) < 0.005
    nearest = rounded(torch.from_numpy(weight).float(), Rounding(rounding.bits, rounding.group))
    ratio = [np.square((one.values.numpy() - weight) @ inputs.T).sum() for one in (packed, nearest)]
    assert ratio[0] < 0.8 * ratio[1]
    zeros = (2 ** (rounding.bits - 1) - packed.offsets / packed.scales.float()).numpy()
    assert packed.scales.dtype == torch.float16 and np.abs(zeros - zeros.round()).max() < 1e-3
    assert zeros.min() > -0.01 and zeros.max() < 2**rounding.bits - 0.99  # a zero is a code


@pytest.mark.parametrize("frozen", FROZEN["found"], ids=lambda one: f"{one['bits']}:{one['group']}")
def test_codes_are_those_of_gptqmodel(frozen, monkeypatch):
    """Under the settings that both have: GAR's order, damping of 1 %, and scales that reach a group's range."""

    def reaching(group, cost, bits):
        low, high = group.amin(0).clamp_max(0), group.amax(0).clamp_min(0)
        scale = (high - low) / (2**bits - 1)
        return scale, (-low / scale).round()

    monkeypatch.setattr(gptq, "best_grid", reaching)
    packed = ours(*drawn(frozen["seed"]), Rounding(frozen["bits"], frozen["group"], by="gptq"))
    theirs = torch.tensor([[int(code, 16) for code in row] for row in frozen["codes"]])
    assert (packed.codes + 2 ** (frozen["bits"] - 1) != theirs).float().mean() < 0.005


def test_inputs_that_are_not_finite_or_all_zero():
    weight = torch.from_numpy(drawn(0)[0]).float()
    with pytest.raises(UserError, match="not finite"):
        gptq.factor_of(torch.full((64, 64), torch.inf), 16)
    packed = gptq.quantised(weight, *gptq.factor_of(torch.zeros(64, 64), 16), parse("gptq8:16"))
    assert (packed.values - weight).abs().max() < 0.02
    flat = gptq.quantised(torch.zeros(2, 64), *gptq.factor_of(torch.eye(64), 16), parse("gptq4:16"))
    assert not flat.values.any()


# -- importance weights, as in ggml-quants.c ---------------------------------------------------------------------------


def test_importance_is_that_of_llama_cpp():
    """x^2 sqrt(sigma^2 + w^2), sigma^2 twice the mean square of a block of 256, the last one as long as it is."""
    rows, squares = np.random.RandomState(0).standard_normal((2, 300)), np.random.RandomState(1).random_sample(300)
    found = k_quants.importance_of(torch.from_numpy(rows), torch.from_numpy(squares)).numpy()
    for r, j in ((0, 0), (0, 255), (1, 256), (1, 299)):
        block = rows[r, :256] if j < 256 else rows[r, 256:]
        assert found[r, j] == pytest.approx(squares[j] * np.sqrt(2 * (block**2).mean() + rows[r, j] ** 2), rel=1e-4)
    assert (k_quants.importance_of(torch.ones(1, 40), torch.zeros(40)) > 0).all()


@pytest.mark.parametrize("bits", [4, 5])
def test_a_groups_scale_and_minimum_are_nearly_the_best_of_a_fine_grid(bits):
    r = np.random.RandomState(bits)
    weights, importance = r.standard_normal((20, 32)), np.exp(1.5 * r.standard_normal((20, 32)))
    top, errors = 2**bits - 1, []

    def error(own, by, scale, low):
        codes = np.clip(np.round((own - low) / scale), 0, top)
        return (by * (scale * codes + low - own) ** 2).sum()

    given = (torch.from_numpy(a).float()[None] for a in (weights, importance))
    scales, lows = (part[0, :, 0].tolist() for part in k_quants._fitted(*[next(given), bits, next(given)]))
    plain = [part[0, :, 0].tolist() for part in k_quants._fitted(torch.from_numpy(weights).float()[None], bits, None)]
    for i, (own, by) in enumerate(zip(weights, importance, strict=True)):
        low, high = min(0, own.min()), own.max()
        tried = [
            error(own, by, (high * b - low * a) / top, low * a)
            for a in np.linspace(0.5, 1.1, 61) for b in np.linspace(0.5, 1.1, 61)
        ]  # fmt: skip
        errors.append([error(own, by, scales[i], lows[i]), min(tried), error(own, by, plain[0][i], plain[1][i])])
    found, best, blind = np.array(errors).sum(0)
    assert found < 1.15 * best and found < 0.75 * blind


@pytest.mark.parametrize("spelled", ["q3_k+imatrix", "q4_k+imatrix", "q5_k+imatrix"])
def test_importance_weights_lose_less_of_the_output(spelled):
    weight, inputs = (torch.from_numpy(a).float() for a in drawn(3, out=32, width=320, tokens=400))
    rounding, squares = parse(spelled), inputs.square().mean(0)
    found, plain = (rounded(weight, rounding, by).values - weight for by in (squares, None))
    assert (found.square() * squares).sum() < 0.9 * (plain.square() * squares).sum()
    assert torch.equal(rounded(weight, rounding).codes, rounded(weight, parse(spelled.partition("+")[0])).codes)


# -- a model: what its layers are given, without hooks -----------------------------------------------------------------


NAMES = {"gate_proj": "gate", "down_proj": "down", "c_proj": "down"}


def passages_of(ids):
    return [torch.tensor([ids[at : at + LENGTH]]) for at in range(0, len(ids), LENGTH)]


def llama_by_hand(model, passages, visit):
    """Run a llama layer by layer. visit(projection, its inputs of all passages) is called before it runs."""
    base = model.model
    streams = [base.embed_tokens(ids) for ids in passages]
    places = [torch.arange(ids.shape[1])[None] for ids in passages]
    for layer in base.layers:
        for i, (h, place) in enumerate(zip(streams, places, strict=True)):
            given = layer.input_layernorm(h)
            streams[i] = (
                h + layer.self_attn(given, position_embeddings=base.rotary_emb(h, place), attention_mask=None)[0]
            )
        inputs, mlp = [layer.post_attention_layernorm(h) for h in streams], layer.mlp
        visit(mlp.gate_proj, inputs)
        visit(mlp.up_proj, inputs)
        hidden = [mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x) for x in inputs]
        visit(mlp.down_proj, hidden)
        streams = [h + mlp.down_proj(x) for h, x in zip(streams, hidden, strict=True)]


def gpt2_by_hand(model, passages, visit):
    base = model.transformer
    streams = [base.wte(ids) + base.wpe(torch.arange(ids.shape[1])) for ids in passages]
    for block in base.h:
        streams = [h + block.attn(block.ln_1(h))[0] for h in streams]
        inputs, mlp = [block.ln_2(h) for h in streams], block.mlp
        visit(mlp.c_fc, inputs)
        hidden = [mlp.act(mlp.c_fc(x)) for x in inputs]
        visit(mlp.c_proj, hidden)
        streams = [h + mlp.c_proj(x) for h, x in zip(streams, hidden, strict=True)]


@pytest.mark.parametrize("spelled", ["gptq3:16", "gptq2:8+up3:16+down4:row", "q4_k+imatrix"])
@pytest.mark.parametrize(("family", "by_hand"), [("llama", llama_by_hand), ("gpt2", gpt2_by_hand)])
@torch.no_grad()
def test_each_matrix_sees_what_rounded_layers_before_it_give(family, by_hand, spelled):
    """And importance weights what the model gives as it is."""
    model = tiny(family)
    own, wanted, other = state_of(model), {}, copy.deepcopy(model)
    names = {module: name for name, module in other.named_modules()}
    rounding = parse(spelled)

    def visit(module, inputs):
        x, matrix = torch.cat([x[0] for x in inputs]).numpy(), plain_matrix(module).numpy()
        if rounding.k:
            squares = torch.from_numpy((x**2).mean(0)).float()
            wanted[names[module]] = rounded(torch.from_numpy(matrix), rounding, squares).values.numpy()
            return
        part = rounding.of(NAMES.get(names[module].rpartition(".")[2], "up"))
        wanted[names[module]] = plain_gptq(matrix, x, part.bits, part.group)
        plain_matrix(module).copy_(torch.from_numpy(wanted[names[module]]))

    by_hand(other, passages_of(word_tokenizer()(TEXT.read_text())["input_ids"]), visit)
    with dart_eval.rounded_ffns(model, spelled, text_of(model)):
        found = {name: plain_matrix(model.get_submodule(name)).numpy() for name in wanted}
        assert served_share(find_ffns(model)) == pytest.approx(served_bits(find_ffns(model), rounding) / 16)
    assert same(model, own) and len(wanted) == (9 if family == "llama" else 6)
    assert {name: value for name, value in wanted.items() if differing(found[name], value) > 0.01} == {}


def test_beginnings_and_fill_do_not_count(monkeypatch):
    """Each passage begins with the BOS token, which is no text's, and a short one is filled up behind its end."""
    model, tokens = tiny("llama"), list(range(4, 16)) * 10

    class Tokenizer:
        bos_token_id = 1

        def __call__(self, text, verbose):
            return {"input_ids": [1, *tokens]}

    ids, counts = Calibration(model, Tokenizer(), TEXT).batch(10**6)
    assert ids.shape == (3, LENGTH + 1) and (ids[:, 0] == 1).all() and counts.sum() == len(tokens)
    assert ids[counts].tolist() == tokens and not counts[:, 0].any() and not counts[2, 21:].any()
    few, counts = Calibration(model, Tokenizer(), TEXT).batch(60)
    assert counts.sum() == 60 and len(few) == 2
    assert Calibration(model, Tokenizer(), TEXT, tokens=30).batch(60)[1].sum() == 30


@pytest.mark.parametrize(
    ("family", "text"), [("phi3", "gptq3:16+down4:8"), ("opt", "gptq4:16"), ("gemma3", "gptq4:16")]
)
def test_other_families(family, text):
    """Gate and up in one matrix; inputs [batch * tokens, width]; norms around the FFN. Codes beat the nearest."""
    model = made(phi3, dtype=torch.float32) if family == "phi3" else tiny(family, dtype=torch.float32)
    own, known = state_of(model), text_of(model)
    ids = known.batch(10**6)[0]
    before, far = model(ids).logits, []
    for spelled in (text, "3:16" if "3" in text else "4:16"):
        with dart_eval.rounded_ffns(model, spelled, known):
            far.append((model(ids).logits - before).square().mean().item())
    assert far[0] < 0.7 * far[1] and same(model, own)


def test_weights_are_the_models_own_after_an_error(monkeypatch):
    model = tiny("llama")
    own, stock, count = state_of(model), gptq.quantised, []

    def broken(*given):
        count.append(given)
        return 1 / 0 if len(count) > 4 else stock(*given)

    monkeypatch.setattr(gptq, "quantised", broken)
    with pytest.raises(ZeroDivisionError):
        Rounded(model, parse("gptq4:16"), text_of(model))
    assert same(model, own) and not any(m._forward_pre_hooks for m in model.modules())


# -- codes on disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelled", ["gptq4:16+down5:8", "q3_k+imatrix", "q4_k+imatrix"])
def test_codes_are_kept_on_disk_by_model_format_and_text(spelled, tmp_path, monkeypatch):
    monkeypatch.setattr("dart_eval.pruning.caches.folder", lambda: tmp_path / "calibration")
    forwards = []
    stock = calibrated.base_of
    monkeypatch.setattr(calibrated, "base_of", lambda model: forwards.append(1) or stock(model))

    def values(model="a", format=spelled):
        other = tiny("llama", dtype=torch.bfloat16)
        with dart_eval.rounded_ffns(other, format, text_of(other, StatsCache({"model": model}))):
            return state_of(other)

    first = values()
    (file,) = (tmp_path / "calibration").iterdir()
    kept = load_file(file)
    assert len(kept) == 9 * (2 if spelled.startswith("q3") else 3) and kept["0"].dtype == torch.int8
    again = values()
    assert len(forwards) == 1 and all(torch.equal(first[name], again[name]) for name in first)
    raw = bytearray(file.read_bytes())
    raw[-9] ^= 1
    file.write_bytes(raw)
    anew = values()
    assert len(forwards) == 2 and all(torch.equal(first[name], anew[name]) for name in first)
    values("b")
    values(format="gptq4:32")
    assert len(forwards) == 4 and len([*(tmp_path / "calibration").iterdir()]) == 3


# -- formats and their bytes -------------------------------------------------------------------------------------------


def test_calibrated_formats_are_read_as_typed():
    for text, full in (
        ("gptq4", "gptq4:32"), ("GPTQ4:64", "gptq4:64"), ("gptq8:row", "gptq8:row"), ("q5_k+imatrix", "q5_k+imatrix"),
        ("gptq4:32+down5:128", "gptq4:32+down5:128"), ("gptq3:64+down4+gate2:32", "gptq3:64+gate2:32+down4:32"),
        ("gptq4+up4:32", "gptq4:32"), ("gptq4+down4:row", "gptq4:32+down4:row"),
    ):  # fmt: skip
        assert parse(text).text == full and parse(full) == parse(text)
    for text in (
        "gptq", "gptq1", "gptq9", "gptq4:1", "gptq4:", "gptq4+", "gptq4+down", "gptq4+down5:1", "gptq4+down5+down4",
        "down4", "4+down5", "gptq4+gptq3", "q4_k+down5", "q2_k+imatrix", "4+imatrix", "gptq4+q4_k", "q4_k+gptq4",
        "gptq4+head4", "+gptq4", "q4_k+imatrix+down4", "awq4",
    ):  # fmt: skip
        with pytest.raises(UserError, match="gptq4:32"):
            parse(text)


def test_a_mix_has_the_bytes_of_its_matrices():
    """By hand: gate and up 4 + (16 + 4) / 32, down 5 + (16 + 5) / 128 bits; a row of 40 has two groups of 32."""
    mix = parse("gptq4:32+down5:128")
    by_hand = (2 * (4 + 20 / 32) + 5 + 21 / 128) / 3
    assert by_hand / 16 == pytest.approx(0.3003, abs=1e-4)
    parts = [mix.of(name).stored(2048) for name in ("gate", "up", "down")]
    assert sum(part.total for part in parts) / 3 == by_hand and [part.code for part in parts] == [4, 4, 5]
    assert parse("gptq4:32").weight_bits(640) / 16 == pytest.approx(0.2890625)
    assert parse("q4_k+imatrix").weight_bits(640) == parse("q4_k").weight_bits(640)
    ffns = find_ffns(tiny("llama"))
    assert served_bits(ffns, mix) == pytest.approx((2 * (4 + 20 / 32) + 5 + 21 / 40) / 3)
    assert served_bits(ffns, parse("gptq4:32+gate3:16")) == pytest.approx((3 + 19 / 16 + 4.625 + 4 + 2 * 20 / 40) / 3)
    plain = find_ffns(tiny("gpt2"))
    assert served_bits(plain, mix) == pytest.approx((4 + 20 / 32 + 5 + 21 / 40) / 2)
    values = sum(m.weight.nbytes for f in ffns for m in f.projections)
    assert cost.memory(make("dense"), ffns, False, 0, mix) == values  # no kernel, so values
    assert rounding_at(0.3).by == ""  # what a run adds by itself is not calibrated


# -- what does not fit, in one line ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make_model", "spelled", "said"), [
    (lambda: types.tiny("qwen3_moe"), "gptq4:32", "experts"),
    (lambda: types.tiny("qwen3_moe"), "q4_k+imatrix", "experts"),
    (lambda: tiny("gpt2"), "gptq4+gate3", "gate"), (lambda: made(phi3), "gptq4+gate3", "one matrix"),
])  # fmt: skip
def test_a_format_that_does_not_fit_is_refused(make_model, spelled, said):
    model = make_model()
    with pytest.raises(UserError, match=said) as found, dart_eval.rounded_ffns(model, spelled, text_of(model)):
        pass
    assert "\n" not in str(found.value)


def test_what_there_is_not_is_said(monkeypatch):
    model = tiny("llama")
    with pytest.raises(UserError, match="text="), dart_eval.rounded_ffns(model, "gptq4:32"):
        pass
    with pytest.raises(UserError, match="random weights"):
        next(Subject(model, None, {"name": "tiny"}, "x").rows([make("griffin")], 0.5, None, [parse("gptq4")], print))
    assert "gptq4:128" in why_no_kernel(parse("gptq4:128"), 640)
    monkeypatch.setattr(calibrated, "base_of", lambda model: lambda **given: None)
    with pytest.raises(UserError, match="not called"), dart_eval.rounded_ffns(model, "gptq4:32", text_of(model)):
        pass


# -- runs --------------------------------------------------------------------------------------------------------------


def test_runs_know_their_text_and_say_which_rows_have_none(saved_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("dart_eval.pruning.caches.folder", lambda: tmp_path / "calibration")
    other = tmp_path / "own.txt"
    other.write_text(TEXT.read_text(encoding="utf-8"), encoding="utf-8")

    def ran(output, **changes):
        asked = {"model": saved_llama, "method": "dense", "tasks": "smoke_questions", "limit": 2, **changes}
        return run_local(config_from(None, {**asked, "output": str(tmp_path / output)}), Watch()).records

    found = {r.inputs.get("ffn_bits"): r for r in ran("a", ffn_bits="16,4,gptq4:16+down5:8,q4_k+imatrix")}
    mix, plain = found["gptq4:16+down5:8"], found["4"]
    assert plain.inputs["calibration"] is None and found[None].inputs["calibration"] is None
    assert len(mix.inputs["calibration"]) == 64 and mix.settings["calibration"] == "the shipped prose"
    assert "calibration" not in plain.settings and "gptq4:16+down5:8" in mix.settings["command"]
    assert mix.weights_read == pytest.approx((2 * (4 + 2 * 20 / 32) + 5 + 5 * 21 / 40) / 3 / 16)
    said = [note for board in boards(Store(tmp_path / "a"), [*found.values()]) for note in notes(board)]
    assert "Calibrated on the shipped prose in advance: dense on gptq4:16+down5:8, dense on q4_k+imatrix." in said
    assert "Rounded without calibration: dense on 4 bits." in said
    (with_own,) = ran("b", ffn_bits="gptq4:16+down5:8", calibration=str(other))
    assert with_own.key != mix.key and with_own.settings["calibration"] == "own.txt"
    pruned = {r.inputs["method"]: r for r in ran("c", method="griffin,wanda-sp", ffn_bits="gptq4:16+down5:8")}
    assert all(r.inputs["calibration"].endswith(mix.inputs["calibration"]) for r in pruned.values())
    assert pruned["griffin"].weights_read == pytest.approx(0.5 * mix.weights_read, rel=0.15)


def test_lm_evals_model_runs_on_calibrated_weights(saved_llama):
    lm = DartLM(saved_llama, "dense", ffn_bits="gptq4:16", calibration=str(TEXT))
    assert served_share(find_ffns(lm.model)) == pytest.approx(served_bits(find_ffns(lm.model), parse("gptq4:16")) / 16)
