"""A choice by a preview that saves time: the same numbers as masks, of the rows taken alone, and every bit back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, Qwen2Config

from dart_eval.bench import decode
from dart_eval.kernels.chosen import best
from dart_eval.layers.find import find_ffns
from dart_eval.pruning.choices import previewed
from dart_eval.pruning.registry import make, parse
from dart_eval.pruning.session.kernels import gatherer, lacking
from dart_eval.pruning.session.prepared import prepare
from dart_eval.util.errors import UserError
from tests.helpers.models import SMALL, made, random_tokens, tiny
from tests.helpers.sessions import bits, decoded, generate, open_session, same
from tests.matrix.types import tiny as typed

WIDE = {**SMALL, "hidden_size": 64, "intermediate_size": 88}  # packed products take rows by 16: 88 are none
COPY = {"image": "copy"}


def llama(dtype=torch.float32, scale=6):
    """With biases in its FFN that are not zero."""
    model = made(lambda: LlamaConfig(**WIDE, mlp_bias=True), scale=scale, dtype=dtype)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.dim() == 1):
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p))).to(dtype)
    return model


def qwen(dtype=torch.float32, scale=6):
    return made(lambda: Qwen2Config(**WIDE), scale=scale, dtype=dtype)


SPELLED = [(llama, "preview:image=copy"), (qwen, "prox:image.group=32:choice.thin=0.3")]
SPELLED += [pytest.param(*more, marks=pytest.mark.slow) for more in (
    (qwen, "preview:image=copy:image.group=64"), (llama, "prox"),
    (llama, "preview:image=copy:image.group=0:choice.write_share=1"),
    (lambda: tiny("gemma3", torch.float32), "preview:image=copy"),
)]  # fmt: skip


@pytest.mark.parametrize(("family", "spelled"), SPELLED)
def test_it_says_what_masks_say(family, spelled):
    """Logits of two prompts, what is counted, the text; and where nothing is asked for, it decides by itself."""
    model = family()
    before, found, texts = bits(model), [], []
    name, params = parse(spelled)
    for execution in ("masked", "copied", "auto"):
        with open_session(model, name, 0.5, execution=execution, **params) as session:
            found.append([decoded(model, session, [random_tokens(20, seed)], steps=10) for seed in (3, 4)])
            texts.append(generate(model, torch.tensor([random_tokens(20, 5)]), 12).sequences)
            assert session.execution == ("masked" if execution == "masked" else "copied")
            if execution != "masked":
                read = [kept.rows_read for kept in session.copies]
                assert len(read) == 3 and all(taken < 88 and written < 44 for _, taken, written in read)
        assert same(model, before)
    for others in found[1:]:
        for (ours, _, share), (theirs, _, their_share) in zip(found[0], others, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
            assert share == their_share and 0.3 < share < 0.5  # the prompt's last token is dense, and counts
    assert torch.equal(texts[0], texts[1])
    dense = model.generate(torch.tensor([random_tokens(20, 5)]), max_new_tokens=12, do_sample=False)
    assert not torch.equal(texts[0], dense) or family is not llama


@pytest.mark.parametrize("spelled", ["prox", "dart-choice"])  # by an image, and among neurons of a mask
def test_it_does_not_matter_whether_the_model_calls_up_or_gate_first(spelled):
    """Falcon-H1 calls up first, its tokens choose by gate all the same."""
    model, found = typed("falcon_h1"), []
    before = bits(model)
    for execution in ("masked", "auto"):
        with open_session(model, spelled, 0.5, execution=execution) as session:
            found.append(decoded(model, session, [random_tokens(20)], steps=10))
            assert session.executing.gathers == (execution == "auto")
        assert same(model, before)
    (ours, _, share), (theirs, _, their_share) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert share == their_share > 0.4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_it_differs_by_their_rounding(dtype):
    """Where no neuron is near the cut: all rows taken are those of masks, and logits agree within 2 %."""
    model = llama(dtype, scale=1)
    found = []
    for execution in ("masked", "copied"):
        with open_session(model, "preview", 0.5, execution=execution, **COPY) as session:
            found.append(decoded(model, session, [random_tokens(20)], steps=1)[0].float())
    apart = (found[0] - found[1]).norm() / found[0].norm()
    assert apart < 0.02


def gathered(model, spelled="preview:image=copy", layer=0):
    """One FFN of a model as it gathers, and what it is made of."""
    ffn = find_ffns(model)[layer]
    method = make(*parse(spelled))
    return ffn, previewed.PreviewedRows(ffn, method.choice)


@pytest.mark.parametrize("spelled", ["preview:image=copy", "prox", "preview:image=copy:image.group=64"])
def test_its_preview_is_that_of_the_image_as_a_matrix(spelled):
    """Rounding, scales and doubts are those of masks, of which nothing is known beyond single precision."""
    model = llama()
    _, found = gathered(model, spelled)
    method = make(*parse(spelled))
    x = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(1))
    whole = prepare(method, find_ffns(model), 0.5, None).layers[0].chooser.preview
    for ours, theirs in zip(found.preview.look(x), whole.look(x), strict=True):
        assert ours.shape == (1, 1, 88)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_other_rows_are_not_read():
    """What is no number in rows of gate and up that were not taken, or of down that are not written, is not met."""
    model = llama()
    ffn, found = gathered(model)
    found.prepare(torch.empty(0), 20, 9)
    x = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(1))
    ffn.gate.weight.data, ffn.up.weight.data = ffn.gate.weight.data.clone(), ffn.up.weight.data.clone()
    whole = ffn.act(ffn.gate(x)) * ffn.up(x)
    found._gate(x)  # which rows it takes does not show outside
    others = torch.ones(88, dtype=torch.bool).index_fill(0, found._taken, False)
    for module in (ffn.gate, ffn.up):
        module.weight.data[others] = torch.nan
    rows = torch.empty(88, 64).normal_()
    found.rows = rows.clone()
    h = ffn.act(found._gate(x)) * found._up(x)
    assert h.shape == (1, 1, 20)
    torch.testing.assert_close(h[0, 0], whole[0, 0, found._taken], rtol=1e-5, atol=1e-5)
    written = h.abs().flatten().topk(9).indices
    unread = torch.ones(88, dtype=torch.bool).index_fill(0, found._taken[written], False)
    found.rows[unread] = torch.nan
    out = found._down(h)
    torch.testing.assert_close(
        out[0, 0], h.flatten()[written] @ rows[found._taken[written]] + ffn.down.bias, rtol=1e-4, atol=1e-4
    )


@given(
    st.lists(st.sampled_from([0.0, 1.0, 2.0, 2.5, float("nan")]), min_size=1, max_size=30), st.integers(0, 30),
    st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
@settings(deadline=None)
def test_the_best_are_the_largest_and_of_equals_the_first(values, count, dtype):
    count = min(count, len(values))
    order = sorted(range(len(values)), key=lambda i: (-(values[i] if values[i] == values[i] else 9.0), i))
    assert best(torch.tensor(values, dtype=dtype), count).tolist() == sorted(order[:count])


def test_where_most_rows_are_taken_all_are_multiplied():
    """A CPU copies rows in twice the time of a product with them."""
    ffn, found = gathered(llama())
    x = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(1))
    image, outputs = 88 * 4.5 / 16, []
    for taken, rows in ((39, 39), (40, 88)):
        found.prepare(torch.empty(0), taken, 9)
        assert found.rows_read == (image + rows, image + rows, 9)
        outputs.append((ffn.act(found._gate(x)) * found._up(x), found._taken))
    (fewer, few), (more, many) = outputs
    torch.testing.assert_close(more[..., torch.isin(many, few)], fewer, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(more, (ffn.act(ffn.gate(x)) * ffn.up(x))[..., many], rtol=1e-5, atol=1e-5)


def test_a_batch_runs_by_masks():
    """One sequence alone is gathered; what comes before or after it is right all the same."""
    model = llama()
    before, prompts = bits(model), [random_tokens(20, seed) for seed in (3, 4)]
    with open_session(model, "preview", 0.5, **COPY) as session:
        alone = [decoded(model, session, [p], steps=4)[0] for p in prompts]
        assert session.execution == "copied"
        both = decoded(model, session, prompts, steps=4)[0]
        assert session.execution == "masked" and same(model, before)
        again = decoded(model, session, prompts[:1], steps=4)[0]
    for row in range(2):
        torch.testing.assert_close(both[:, row], alone[row][:, 0], rtol=1e-4, atol=1e-4)
    assert torch.equal(again, alone[0])
    with (
        pytest.raises(UserError, match="runs choice=preview for one sequence, and this batch has 2"),
        open_session(model, "preview", 0.5, execution="copied", **COPY) as session,
    ):
        decoded(model, session, prompts, steps=1)
    assert same(model, before)


def test_nothing_pruned_is_the_dense_model():
    model = llama()
    tokens = torch.tensor([random_tokens(20)])
    dense = model.generate(tokens, max_new_tokens=6, do_sample=False)
    with open_session(model, "preview", 0.0, execution="copied", **COPY):
        assert torch.equal(generate(model, tokens, 6).sequences, dense)


@pytest.mark.parametrize(("spelled", "dtype", "why"), [
    ("preview:image=copy", torch.float32, None), ("prox", torch.bfloat16, None),
    ("preview:image=copy:image.bits=3", torch.float32, "choice=preview with image=copy"),
    ("preview:image=copy:image.group=16", torch.float32, "choice=preview with image=copy"),
    ("preview:image=copy", torch.float64, "choice=preview with image=copy"),
    ("prox:choice.threshold=calibrated", torch.float32, "choice=shown with image=copy"),
    ("griffin:choice=preview:image=copy", torch.float32, "choice=preview with image=copy"),
    ("preview", torch.float32, "choice=preview with image=first-bits"),
    ("dart-plus:image=copy", torch.float32, "choice=graded with image=copy"),
])  # fmt: skip
def test_which_previews_have_kernels(spelled, dtype, why):
    model, method = llama(dtype), make(*parse(spelled))
    found = lacking(method, find_ffns(model))
    assert found is None if why is None else found == f"{why} has no kernel"
    if why is not None:
        with pytest.raises(UserError, match=f"{why} has no kernel; use execution='masked'"):
            open_session(model, method, 0.5, execution="copied").__enter__()


def test_plain_and_fused_ffns_run_by_masks():
    for family in ("gpt2", "opt"):
        model = tiny(family, torch.float32)
        assert gatherer(make("preview", COPY), find_ffns(model)) is None


def test_what_is_multiplied_is_what_is_read():
    """By hand: two images of 4.5 bits of 16, rows of gate and up, columns of down; doubts are no product."""
    model = qwen(torch.bfloat16)
    found = decode.measure(model, make(*parse("preview:image=copy")), 0.5, prompt_tokens=8, steps=2, rounds=1)
    doubts = 2 * (16 / 64) / 16 / 3
    assert found.weights_executed == pytest.approx(found.weights_read - doubts, abs=1e-9)
    assert found.weights_read <= 0.5 and found.extra_weight_bytes == 3 * 88 * 64 * 2  # down, by neurons
    assert found.state_bytes >= 3 * 2 * 88 * 64 * 4.5 / 8


def test_codes_follow_weights_that_were_changed_in_place():
    model = llama()
    ffn, found = gathered(model)
    x = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(1))
    before = found.preview.look(x)[0]
    assert gathered(model)[1].preview is found.preview  # as long as they stay what they are
    with torch.no_grad():
        ffn.gate.weight.mul_(-1)
    after = gathered(model)[1].preview.look(x)[0]
    assert not torch.allclose(after, before)
