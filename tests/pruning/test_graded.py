"""dart-plus through its kernel: what masks compute, in the session, on models that have one."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dart_eval.kernels import gather
from dart_eval.kernels.cpu import blocks, build
from dart_eval.layers.find import find_ffns
from dart_eval.pruning.choices import graded
from dart_eval.pruning.prune import prune
from dart_eval.pruning.registry import make, parse
from dart_eval.pruning.session.kernels import lacking
from dart_eval.util.errors import UserError
from tests.helpers.models import odd_llama, random_tokens, tiny

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=f"{build.missing()}")
PROMPT = torch.tensor([random_tokens(20, seed=4)])


@pytest.fixture(scope="module")
def model():
    return odd_llama()


def written(model, sparsity, execution="auto"):
    with prune(model, "dart-plus", sparsity, execution=execution) as run:
        made = model.generate(
            PROMPT, max_new_tokens=10, do_sample=False, output_logits=True, return_dict_in_generate=True, min_length=30
        )
        assert run.execution == ("copied" if execution == "auto" else execution)
        return torch.cat(made.logits).float(), made.sequences, run.weights_read


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_the_kernel_writes_what_masks_write(model, sparsity):
    before = {name: p.clone() for name, p in model.named_parameters()}
    logits, tokens, read = written(model, sparsity)
    wanted, expected, of_masks = written(model, sparsity, "masked")
    assert torch.equal(tokens, expected) and read == of_masks
    assert (logits - wanted).norm() < 2e-2 * wanted.norm()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all("forward" not in f.block.__dict__ for f in find_ffns(model))


def test_what_a_token_reads_is_the_label(model):
    with prune(model, "dart-plus", 0.7) as run:
        model.generate(PROMPT, max_new_tokens=3, do_sample=False)
        assert run.execution == "copied" and run.executing.nbytes > 0
        everything = sum(2 * p.weight.numel() for f in run.ffns for p in f.projections)
        bytes_read = sum(sum(rows.rows_read) * 2 * rows.ffn.width for rows in run.copies)
    # Rows are filled up to whole groups of 128 in memory: of 130 columns to 256. Of real widths nothing is.
    assert bytes_read / everything == pytest.approx(0.3 * 256 / 130, rel=0.1)


def test_without_sparsity_it_is_dense(model):
    dense = model.generate(PROMPT, max_new_tokens=6, do_sample=False)
    with prune(model, "dart-plus", 0.0):
        assert torch.equal(model.generate(PROMPT, max_new_tokens=6, do_sample=False), dense)


def test_a_batch_runs_by_masks(model):
    with prune(model, "dart-plus", 0.7) as run:
        model.generate(PROMPT.repeat(2, 1), max_new_tokens=2, do_sample=False)
        assert run.execution == "masked"


def doubled(ffn):
    ffn.block.forward = lambda x: 2 * ffn.down(ffn.intermediate(x))


@pytest.mark.parametrize(("change", "reason"), [
    (lambda f: f.down.to("meta"), "for plain weights on a CPU"),
    (lambda f: setattr(f, "act", torch.nn.Tanh()), "has no Tanh"),
    (lambda f: setattr(f.up, "bias", torch.nn.Parameter(torch.ones(301))), "without norms and biases"),
    (doubled, "LlamaMLP does more than its projections"),
])  # fmt: skip
def test_what_the_kernel_cannot_run_has_a_reason(model, change, reason):
    ffn = find_ffns(LlamaForCausalLM(model.config).bfloat16().eval())[1]
    assert blocks.lacking(ffn) is None
    change(ffn)
    assert reason in blocks.lacking(ffn)
    assert reason in lacking(make("dart-plus").at(0.3), [ffn]) or ffn.down.weight.is_meta


@pytest.mark.parametrize(("spec", "read", "reason"), [
    ("dart-plus", 0.2, "by 4 first bits"), ("dart-plus:image.group=32", 0.3, "groups of 128"),
    ("dart-plus:image.code=7:image.bits=4", 0.3, "read 4, 5, 6 or 8 bits"),
    ("dart-plus:choice.fine=0.5", 0.3, "all columns"), ("dart-plus", 0.3, None), ("dart-plus", 0.5, None),
])  # fmt: skip
def test_what_settings_have_a_kernel(model, spec, read, reason):
    found = lacking(make(*parse(spec)).at(read), find_ffns(model))
    assert found is None if reason is None else reason in found


def test_on_a_gpu_triton_runs_it_or_is_missing(model, monkeypatch):
    pytest.importorskip("triton")
    ffns, method = find_ffns(model), make("dart-plus").at(0.3)
    monkeypatch.setattr(graded, "device_of", lambda ffn: torch.device("cuda"))
    assert lacking(method, ffns) is None and graded.by_triton(ffns[0])
    assert "codes of 6 or 8 bits" in lacking(make(*parse("dart-plus:image.code=5:image.bits=4")).at(0.4), ffns)
    monkeypatch.setattr(gather, "triton", None)
    assert lacking(method, ffns) == "triton is not installed"


@pytest.mark.parametrize("act", blocks.ACTS)
def test_activations_are_known_by_their_values(model, act):
    ffn = find_ffns(model)[0]
    twin = blocks.TWINS[blocks.ACTS.index(act)]
    assert blocks.act_of(type("F", (), {"act": staticmethod(twin)})()) == act
    assert blocks.act_of(type("F", (), {"act": staticmethod(lambda x: twin(x) * 1.001)})()) is None
    assert blocks.act_of(ffn) == "silu"


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_codes_alone_write_what_codes_beside_weights_write(sparsity):
    """The model's FFN weights are gone while the block runs, and afterwards it has the values of the codes."""
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=300, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=tiny("llama").config.vocab_size,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16().eval()
    found, others = [], {n: p.clone() for n, p in model.named_parameters() if ".mlp." not in n}
    for serve in ("weights", "codes"):
        with prune(model, "dart-plus", sparsity, serve=serve) as run:
            made = model.generate(PROMPT, max_new_tokens=12, do_sample=False, output_logits=True,
                                  return_dict_in_generate=True)  # fmt: skip
            found.append(torch.cat(made.logits))
            assert run.execution == "copied"
            held = [m.weight.untyped_storage().nbytes() for f in run.ffns for m in f.projections]
            codes = [values.packed for values in run.serving._held]
            expected = [c.values.to(torch.bfloat16) for c in codes]
            kept = sum("codes" in vars(c) for c in codes)
            batch = model.generate(PROMPT.expand(2, -1), max_new_tokens=6, do_sample=False)
            assert torch.equal(batch[0], batch[1])
            if serve == "codes":  # zeros would be saved
                with pytest.raises(UserError, match="save the model after the block"):
                    model.state_dict()
        assert (max(held) <= 2 and kept == 0) if serve == "codes" else min(held) > 2
    assert torch.equal(*found)
    after = [m.weight for f in find_ffns(model) for m in f.projections]
    assert all(torch.equal(a, b) for a, b in zip(after, expected, strict=True))
    assert all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in others.items())
    with prune(model, "dart-plus", sparsity, serve="codes"):  # once more, from what is left
        assert torch.equal(model.generate(PROMPT, max_new_tokens=12, do_sample=False), made.sequences)


def test_copies_that_a_machine_cannot_have_say_why(model, monkeypatch):
    monkeypatch.setattr(build, "missing", lambda: "no C compiler is on the PATH")
    expected = pytest.raises(UserError, match="no C compiler is on the PATH; use execution='masked'")
    with expected, prune(model, "dart-plus", 0.5, execution="copied"):
        pass


@pytest.mark.parametrize("method", ["griffin", "dart-plus:image=copy"])
def test_codes_alone_need_the_kernel(model, method):
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(UserError, match="serve='codes'"), prune(model, method, 0.7, serve="codes"):
        pass
    with pytest.raises(UserError, match="did you mean codes"), prune(model, method, 0.7, serve="code"):
        pass
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
