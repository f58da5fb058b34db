"""dart-plus' kernels for a GPU beside their twin: in Triton's interpreter, and compiled for cards that are not here."""

import importlib.util

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dart_eval.kernels import graded_triton
from dart_eval.kernels.top import top_k_mask
from dart_eval.pruning.prune import prune
from dart_eval.util.bits import Rounding
from dart_eval.weights.codes import Packed
from tests.helpers.interpreted import interpreted
from tests.helpers.models import random_tokens
from tests.helpers.twins import ACTS, Twin, apart, check, coded, dense, lines, matrices, token, values
from tests.pruning.test_previewed import qwen

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (pip install '.[triton]')"
)
CLOSE = 1e-5  # sums in fp32, of what is added up
OUTLIERS = 1e-4  # first bits count from 0, so one large x cancels more digits
ROUNDINGS = [Rounding(bits, group) for bits in graded_triton.BITS for group in (128, 0)]


def made(packed, taken, coarse, act="silu", known=0.2):
    twin = Twin(packed, taken, coarse, act, known)
    return graded_triton.GradedFFN(*packed, twin.doubts, twin.columns, taken, coarse, known, act), twin


def as_its_twin(width, neurons, rounding, shares, act="silu", kind="normal", seed=0, known=0.2):
    packed, x = coded(*matrices(width, neurons, seed, kind), rounding), token(width, seed, kind)
    ffn, twin = made(packed, *(round(share * neurons) for share in shares), act, known)
    out, shown, exact = ffn(x), ffn._h.clone(), ffn.chosen[0].long()
    shown[exact] = twin.scores(x)[0][exact].float()  # where the kernel has put h itself
    assert ffn.lines == lines(packed)
    check(out, ffn._scores[0], shown, ffn.chosen, twin, x, OUTLIERS if kind == "outliers" else CLOSE)
    assert torch.equal(out, ffn(x))


def neurons_are_chosen_and_written_as_by_the_twin():
    @settings(max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(
        width=st.integers(1, 300), neurons=st.integers(1, 90), seed=st.integers(0, 1000), known=st.floats(0, 1),
        kind=st.sampled_from(["normal", "outliers", "zero", "equal"]), act=st.sampled_from(sorted(ACTS)),
        rounding=st.sampled_from(ROUNDINGS), shares=st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)),
    )  # fmt: skip
    def holds(width, neurons, rounding, shares, act, kind, seed, known):
        if sum(round(share * neurons) for share in shares) <= neurons:
            as_its_twin(width, neurons, rounding, shares, act, kind, seed, known)

    holds()
    for i, rounding in enumerate(ROUNDINGS):  # more than one group, odd ends, one neuron, all, none
        as_its_twin(1030 + i, 70, rounding, (0.2, 0.3), sorted(ACTS)[i])
        as_its_twin(3, 1, rounding, (i % 2, 1 - i % 2))
        as_its_twin(130, 20, rounding, (0, 0))
    packed, x = coded(*matrices(300, 150), Rounding(6, 128)), token(300)
    assert apart(made(packed, 150, 0)[0](x), dense(x, *values(packed))) < CLOSE


def every_bit_of_every_code_counts():
    """Single weights at all places of a row and a column, with all codes there are."""
    for rounding in (Rounding(6, 128), Rounding(8, 0)):
        half, width, neurons = 2 ** (rounding.bits - 1), 130, 34
        codes = (torch.arange(neurons * width) * 7 % (2 * half) - half).to(torch.int8).view(neurons, width)
        scale = torch.full((neurons, -(-width // (rounding.group or width))), 0.25).half()
        across = torch.full((width, 1), 0.25).half()
        packed = (
            Packed(codes, scale, rounding), Packed(codes.flip(1).contiguous(), scale, rounding),
            Packed(codes.flip(0).t().contiguous(), across, rounding),
        )  # fmt: skip
        ffn, _ = made(packed, neurons, 0, "relu")
        for place in (0, 32, 64, 127, 129):
            x = torch.zeros(1, width)
            x[0, place] = 1.0
            assert apart(ffn(x), dense(x, *values(packed), "relu")) < CLOSE, place


def the_largest_are_chosen_whatever_they_are():
    """By the kernel alone, on scores of a large layer: equal ones, zeros, the largest that there are."""
    from dart_eval.kernels import graded_kernels

    generator, size = torch.Generator().manual_seed(0), 14336
    x, broken, chosen = torch.zeros(8), torch.zeros(1), torch.zeros(2, size, dtype=torch.int32)
    scores = torch.randn(4, size, generator=generator).exp()
    scores[1] = (scores[1] * 3).round()
    scores[2] = torch.where(scores[2] < 1, 0.0, torch.inf)
    scores[3, ::2] = torch.finfo(torch.float32).tiny / 8  # denormal numbers have an order, too
    for score, rough in zip(scores, scores.flip(0), strict=True):
        for taken, coarse in ((0, 0), (1, 0), (0, size), (1500, 2000), (7168, 7168)):
            graded_kernels.threshold[(1,)](score, rough, x, chosen, broken, size, 8, taken, coarse, 16384, 8)
            exact = top_k_mask(score, torch.tensor(taken))
            others = top_k_mask(torch.where(exact, -1.0, rough), torch.tensor(coarse))
            assert torch.equal(chosen[0, :taken].long(), exact.nonzero().flatten())
            assert torch.equal(chosen[1, :coarse].long(), others.nonzero().flatten())
    assert broken == 0


def odd_tokens_and_other_weights():
    packed = coded(*matrices(150, 40), Rounding(8, 128))
    ffn, _ = made(packed, 10, 10)
    expected = ffn(token(150))
    for bad, place in ((torch.nan, 0), (torch.inf, 77), (-torch.inf, 149)):
        x = token(150)
        x[0, place] = bad
        assert ffn(x).isnan().all() and torch.equal(ffn(token(150)), expected)
    ffn.grade(0, 0)
    assert ffn(x).isnan().all() and not ffn(token(150)).any()
    ffn.grade(10, 10)
    for size in (1e-38, 1e-20, 1e19, 1e38):
        out = ffn(token(150) * size)
        assert all(len(c.unique()) == 10 and c.min() >= 0 and c.max() < 40 for c in ffn.chosen)
        assert size > 1 or out.abs().max() <= 1e-18
    for dtype in (torch.bfloat16, torch.float16):
        x = token(150).to(dtype)
        out = ffn(x)
        assert out.dtype == dtype and apart(out.float(), ffn(x.float()).double()) < 2**-8
    for x in (torch.zeros(2, 150), torch.zeros(1, 149), torch.zeros(150)):
        with pytest.raises(ValueError, match="one token of width 150"):
            ffn(x)
    with pytest.raises(ValueError, match="30 and 11 of 40 neurons"):
        ffn.grade(30, 11)
    with pytest.raises(ValueError, match="codes of 6 or 8 bits, not 5"):
        made(coded(*matrices(64, 40), Rounding(5, 128)), 1, 1)
    equal, _ = made(coded(*matrices(64, 100, kind="equal"), Rounding(8, 128)), 30, 20)
    equal(token(64))
    assert equal.chosen[0].tolist() == [*range(30)] and equal.chosen[1].tolist() == [*range(30, 50)]


def a_token_says_what_masks_say():
    for dtype, spelled, sparsity, most in (
        (torch.float32, "dart-plus", 0.7, 1e-4), (torch.float32, "dart-plus:image.group=0", 0.5, 1e-4),
        (torch.bfloat16, "dart-plus", 0.7, 0.02),
    ):  # fmt: skip
        model, prompt, found = qwen(dtype, scale=1), torch.tensor([random_tokens(20)]), []
        for execution in ("masked", "auto"):
            with prune(model, spelled, sparsity, execution=execution) as run:
                made = model.generate(
                    prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, output_logits=True,
                    return_dict_in_generate=True,
                )  # fmt: skip
                found.append((made.sequences, torch.cat(made.logits).float(), run.weights_read))
                if execution == "auto":
                    assert run.execution == "copied"
                    assert all(type(rows.kernel) is graded_triton.GradedFFN for rows in run.copies)
        (text, logits, read), (ours, theirs, also) = found
        assert torch.equal(text, ours) and read == also
        assert (logits - theirs).norm() < most * logits.norm(), (spelled, dtype)


@needs_triton
@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("run", [
    neurons_are_chosen_and_written_as_by_the_twin, every_bit_of_every_code_counts,
    the_largest_are_chosen_whatever_they_are, odd_tokens_and_other_weights, a_token_says_what_masks_say,
])  # fmt: skip
def test_in_the_interpreter(run, tmp_path):
    interpreted(run, tmp_path)


class Recorder:
    """In the place of a kernel: notes what it is handed."""

    def __init__(self, kernel, calls):
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, grid):
        return lambda *handed, **options: self.calls.append((self.kernel, handed, options))


POINTERS = {
    torch.uint8: "*u8", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"
}  # fmt: skip


def kind(value):
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


@needs_triton
@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize(("capability", "bits", "act", "neurons"), [
    (80, 6, "silu", 14336), (90, 8, "gelu", 14336), (89, 8, "gelu_tanh", 2), (80, 6, "relu", 1),
])  # fmt: skip
def test_the_kernels_compile_for_cards(monkeypatch, tmp_path, capability, bits, act, neurons):
    """All that a call launches; of Llama 3.1 8B's neurons their memory is that of small cards."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dart_eval.kernels import graded_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    calls = []
    for name in ("look", "threshold", "exact", "write", "add"):
        monkeypatch.setattr(graded_kernels, name, Recorder(getattr(graded_kernels, name), calls))
    ffn, _ = made(coded(*matrices(64, neurons), Rounding(bits, 128)), -(-neurons // 10), neurons // 10, act)
    ffn(token(64).bfloat16())
    assert len(calls) == 5
    for kernel, handed, options in calls:
        named = zip(kernel.params, handed, strict=True)  # Triton compiles a whole number 1 as a constant
        pairs = [(p.name, p.is_constexpr or (type(value) is int and value == 1), value) for p, value in named]
        source = ASTSource(
            kernel, {name: "constexpr" if constant else kind(value) for name, constant, value in pairs},
            {name: value for name, constant, value in pairs if constant},
        )  # fmt: skip
        made_for = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert made_for.asm["cubin"] and made_for.metadata.shared <= 99 << 10


def test_bytes_are_those_of_the_format():
    packed = coded(*matrices(2048, 256), Rounding(8, 128))
    if graded_triton.triton is None:
        pytest.skip("triton is not installed")
    ffn, _ = made(packed, 60, 50)
    scales = 2 * (2 * 256 * 16 + 2048 * 2)
    assert ffn.bytes_read == 256 * 2048 + 60 * (2048 + 2048) + 50 * 1024 + scales + 6 * 256
    assert ffn.nbytes == 3 * 256 * 2048 + scales + 6 * 256
