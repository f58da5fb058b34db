"""Previews: bytes never beyond the label, exact choices through a perfect image, chosen by the image alone."""

import gc
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import dart_eval
from dart_eval.layers.find import find_ffns
from dart_eval.pruning.choices import serving
from dart_eval.pruning.choices.dart_plus import DartPlus
from dart_eval.pruning.choices.images import Copy, FirstBits, LowRank, Weights
from dart_eval.pruning.choices.look import Preview
from dart_eval.pruning.choices.preview import ByPreview
from dart_eval.pruning.registry import make, parse
from dart_eval.util.bits import Rounding
from dart_eval.weights.rounding import served_bits, served_inputs, served_output
from tests.helpers.matrices import in_turn
from tests.helpers.models import FAMILIES, biased, random_tokens, tiny
from tests.helpers.sessions import PLAIN, generate, open_session, state_of

IMAGES = {
    "first bits": {}, "first bits:bits=5": {"image.bits": 5}, "copy": {"image": "copy"},
    "copy:bits=2": {"image": "copy", "image.bits": 2}, "weights": {"image": "weights"},
    "low-rank": {"image": "low-rank", "image.rank": 2},
}  # fmt: skip


def image_of(image, code, scale, rows, width):
    """Bits of a weight's own in an image, its part of what stands for more than one weight, and what is beyond both.

    Args:
        code, scale: bits of a weight as it is served.
    """
    if image.name == "weights":
        return code, scale, 0
    if image.name == "copy":
        return image.bits, 16 * -(-width // image.group) / width, code + scale
    if image.name == "low-rank":
        return 16 * image.rank / rows, 16 * image.rank / width, code + scale
    first = min(image.bits or math.ceil(code / 2), code)
    return first, scale, code - first


# Bits of a weight that are its part of a scale, in rows of n weights; groups have 32, and a row of 40 has two.
SCALES = {
    "16": lambda n: 0, "8": lambda n: 16 * -(-n // 32) / n, "4": lambda n: 16 * -(-n // 32) / n,
    "3:row": lambda n: 16 / n, "4:8": lambda n: 16 / 8,
}  # fmt: skip


@pytest.mark.parametrize(("family", "name", "image", "bits"), in_turn(
    ["llama", "gpt2"], [*itertools.product(["preview", "dart-plus"], IMAGES)], [*SCALES]
))  # fmt: skip
def test_no_image_makes_a_token_read_more_than_its_label(family, name, image, bits):
    """Counted by hand: images of what is read so, the rest of chosen rows, columns of down."""
    model, refused = tiny(family, dtype=torch.float32), []
    with dart_eval.rounded_ffns(model, bits):
        unit = served_bits(find_ffns(model))
        for sparsity in (0.2, 0.35, 0.5, 0.7):
            try:
                with open_session(model, make(name, IMAGES[image]), sparsity) as session:
                    session.no_context(1, torch.device("cpu"))
                    check_bytes(session, int(bits.partition(":")[0]), SCALES[bits], unit)
            except dart_eval.UserError as error:
                refused.append(str(error))
    assert all("a preview that takes" in line or "reads FFN weights in few bits" in line for line in refused)
    assert len(refused) < 4 or bits not in ("16", "8")


def check_bytes(session, code, scale_of, unit):
    """What a token reads, and what is kept.

    Args:
        code: bits of a weight. scale_of: its part of scales, in rows of n. unit: both, on average, at sparsity 0.
    """
    state, prepared, choice, ffns = session.state, session.prepared, session.method.choice, session.ffns
    if choice.image.name == "first-bits" and code == 16:  # served as whole numbers, with a scale for a row of 40
        code, scale_of = choice.image.code, lambda n: 16 / n
        assert choice.image.served == Rounding(6 if session.sparsity == 0.7 else 8, 128)
    total, written = sum(f.size for f in ffns), int(state.written.sum())
    into, out = (scale_of(n) for n in (ffns[0].width, ffns[0].size))
    doubt = 0 if choice.image.exact else 16 / ffns[0].width  # one number a row
    norm = 16 / ffns[0].width if choice.adds else 0  # one number a column of down
    by_hand = 0.0
    for i, ffn in enumerate(ffns):
        rough, beside, _ = image_of(choice.image, code, out, *served_output(ffn).weight.shape)
        across = out + (beside if choice.adds and choice.image.stored else 0)  # whatever the columns
        looked = [image_of(choice.image, code, into, *m.weight.shape) for m in served_inputs(ffn)]
        taken, writing = int(state.taken[0, i]), int(state.written[0, i])
        by_hand += (sum(first + beside + doubt for first, beside, _ in looked) + norm + across) * ffn.size
        by_hand += sum(lacks for *_, lacks in looked) * taken
        by_hand += code * taken + rough * (writing - taken) if choice.adds else code * writing
    by_hand /= ffns[0].matrices * total * unit
    read = float(state.step().read[0])
    assert read == pytest.approx(by_hand) and read <= 1 - session.sparsity + 1e-9
    assert read > 1 - session.sparsity - 2.5 / total or written == total, "bytes were left over"
    matrices = [m for f in ffns for m in (*served_inputs(f), *([served_output(f)] if choice.adds else []))]
    kept = sum(choice.image.bits_of(m.stored, *m.weight.shape) * m.weight.numel() for m in matrices)
    kept = kept * choice.image.stored + doubt * sum(m.weight.numel() for f in ffns for m in served_inputs(f))
    kept += norm * sum(served_output(f).weight.numel() for f in ffns)
    assert prepared.nbytes() == round(kept / 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_through_the_weights_themselves_it_is_the_exact_choice(family):
    """The image that is exact leaves only down to be chosen: as `oracle-token` at the same number of neurons."""
    model = biased(family)
    tokens = torch.tensor([random_tokens(30)])
    inputs = 1 if family in PLAIN else 2
    sparsity = 0.5 / (inputs + 1)  # half of down's columns
    with open_session(model, "preview", sparsity, **{"image": "weights", "choice.write_share": 1.0}) as session:
        ours = generate(model, tokens, 6)
        assert session.state.written.tolist() == [[20, 20, 20]]
    with open_session(model, "oracle-token", 0.5):
        assert torch.equal(generate(model, tokens, 6).sequences, ours.sequences)


def promise(ffn, image, x):
    """The expected square of h: what an image leaves out may raise or lower a product by ||x|| times its row's rms."""
    matrices = served_inputs(ffn)
    biases = [getattr(m, "bias", None) for m in (ffn.gate, ffn.up) if m is not None]
    seen = [x @ image.approximate(m).T + (0 if b is None else b) for m, b in zip(matrices, biases, strict=True)]
    off = [
        x.norm(dim=-1, keepdim=True) * (m.weight - image.approximate(m)).square().mean(1).sqrt().half().float()
        for m in matrices
    ]
    either = (ffn.act(seen[0] + off[0]).square() + ffn.act(seen[0] - off[0]).square()) / 2
    return either if len(seen) == 1 else either * (seen[1].square() + off[1].square())


@pytest.mark.parametrize("image", [Copy(bits=2), LowRank(rank=1), Copy()])
def test_tokens_take_what_the_image_shows(image):
    """One layer by hand: the largest previewed |h| are taken, of these the largest exact |h| are written."""
    model = tiny("llama", dtype=torch.float32)
    method = dart_eval.Pruner(choice=ByPreview(image=image, write_share=0.5))
    state = state_of(method, model, 0.4)
    state.skip_context()
    ffn = find_ffns(model)[1]
    x = torch.randn(1, 3, ffn.width, generator=torch.Generator().manual_seed(0))
    gate, up = ffn.parts(x)
    kept = state.prune(1, gate * up, torch.ones(1, 3, dtype=torch.bool), gate, up, x=x) != 0
    seen = promise(ffn, image, x)[0]
    taken, written = int(state.taken[0, 1]), int(state.written[0, 1])
    for t in range(3):
        chosen = seen[t].topk(taken).indices
        exact = (gate * up)[0, t].abs()
        best = chosen[exact[chosen].topk(written).indices]
        assert sorted(kept[0, t].nonzero().flatten().tolist()) == sorted(best.tolist())


@settings(deadline=None, max_examples=8)
@given(st.sampled_from([FirstBits(), Copy(), Copy(bits=3), Weights()]), st.floats(0.01, 0.3), st.floats(0.05, 1.0))
def test_taken_and_written_fit_their_layers(image, sparsity, write_share):
    model = tiny("qwen2", dtype=torch.float32)
    method = dart_eval.Pruner(choice=ByPreview(image=image, write_share=write_share))
    state = state_of(method, model, sparsity)
    state.skip_context()
    assert (state.written <= state.taken).all() and (state.taken <= state.mask_counts).all()


def held_in_tensors() -> int:
    """The bytes of all tensors that are alive, each storage once."""
    gc.collect()
    storages = (t.untyped_storage() for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.slow
@pytest.mark.parametrize(("room", "sparsity", "wanted"), [(0, 0.6, 0.525), (1 << 30, 0.5, 2.525)])
def test_dart_plus_holds_whole_numbers_and_what_they_stand_for(room, sparsity, wanted, monkeypatch):
    """Numbers have half of the weights' bytes. What they and their first bits stand for is kept where there is room."""
    monkeypatch.setattr(serving, "_ROOM", serving.Room(room))
    monkeypatch.setattr(serving.machine, "memory", lambda: None)
    sizes = {"hidden_size": 160, "intermediate_size": 480, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=96)).bfloat16()
    weights = sum(p.nbytes for name, p in model.named_parameters() if "mlp" in name)
    gc.collect()  # what other tests left
    before = held_in_tensors()
    with dart_eval.prune(model, "dart-plus", sparsity, execution="masked"):
        model.generate(torch.ones(1, 8, dtype=torch.long), max_new_tokens=3)
        held = (held_in_tensors() - before) / weights
    assert held == pytest.approx(wanted, abs=0.01)  # a hundredth and a half are scales


@pytest.mark.parametrize("method", ["preview", "preview:image=copy", "dart-plus"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_of_equal_layers_the_worst_cost_is_that_of_each(family, method):
    ffns = find_ffns(tiny(family))
    choice = make(*parse(method)).at(0.5).choice
    served = choice.serving(ffns, 0.5, None)
    try:
        if served is not None:
            served.begin()
        stored = served_output(ffns[0]).stored
        worst = choice.worst_read_cost([f.size for f in ffns], ffns[0].width, ffns[0].matrices, stored)
        each = choice.read_costs(ffns, True, stored.total)[0]
    finally:
        if served is not None:
            served.end()
    for name in ("in_mask", "taken", "written"):
        assert getattr(worst, name) == pytest.approx(getattr(each, name), rel=0.1), name


@pytest.mark.parametrize(("width", "fine"), [(96, 2 / 3), (128, 1 / 2), (160, 2 / 5)])
def test_a_short_tile_counts_as_a_whole_one(width, fine):
    """Of two or three tiles of 64 columns one is fine, and it may be one of the whole ones."""
    found = dart_eval.Pruner(choice=DartPlus(image=FirstBits(), fine=0.4, rough=0.9, tile=64)).choice.columns(width)
    assert found.fine == pytest.approx(fine) and found.fine + found.rough == pytest.approx(1)


def test_a_preview_that_overflows_is_the_largest_number():
    """In float16 a preview of 69000 where the exact h may be 65000."""
    gate, up = (lambda: torch.full((4, 1), 300.0).half()), (lambda: torch.full((4, 1), 230.0).half())
    preview = Preview((gate, up), (None, None),
                      (torch.ones(4), torch.ones(4)), torch.relu)  # fmt: skip
    seen, expected = preview.look(torch.ones(1, 1, 1, dtype=torch.float16))
    assert seen.unique().tolist() == [65504.0] and expected.isfinite().all()


def test_what_a_preview_writes_has_no_mean_on_top():
    """All neurons write, some by their preview: nothing is left out that a mean could stand in for."""
    model, prompt, found = tiny("llama"), torch.tensor([random_tokens(12)]), []
    for spelled in ("dart-plus", "dart-plus:compensation=mean-token"):
        with open_session(model, make(*parse(spelled)), 0.45, execution="masked") as run:
            found.append(generate(model, prompt, 4).logits[-1])
            assert all((layer.written == layer.mask_counts).all() for layer in run.state.layers)
    assert torch.allclose(*found, rtol=0, atol=1e-5)
