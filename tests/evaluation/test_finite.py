"""NaN and infinity never become a result: they are counted, named and refused."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from dart_eval.bench import tracing
from dart_eval.evaluation import generation
from dart_eval.evaluation import lm as lm_module
from dart_eval.evaluation.forwards import output_head
from dart_eval.evaluation.lm import PrunedLM
from dart_eval.evaluation.requests import Score
from dart_eval.layers.find import find_ffns
from dart_eval.pruning.registry import make
from dart_eval.pruning.session import Session, prune
from dart_eval.results.report.build import build
from dart_eval.results.store import Store
from dart_eval.util.errors import UserError
from tests.helpers.commands import command
from tests.helpers.models import VOCAB, random_tokens, tiny
from tests.helpers.records import render
from tests.helpers.requests import TextRequest, words

ENDS = {"bos_token_id": 1, "eos_token_id": 2}


def _spoilt_ffn(model):
    model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    find_ffns(model)


def _spoilt_head(model, value):
    model.lm_head.weight[7] = value
    output_head(model)


def _beyond_float16(model):
    """Not compared with an infinite tolerance."""
    model.half().lm_head.weight.clamp_(-0.1, 0.1).mul_(6e5)
    output_head(model)


@pytest.mark.parametrize(("found", "cause"), [
    (_spoilt_ffn, "layer 1.*--dtype"), (lambda model: _spoilt_head(model, torch.nan), "logits.*--dtype"),
    (lambda model: _spoilt_head(model, torch.inf), "logits.*--dtype"), (_beyond_float16, "float16"),
])  # fmt: skip
@torch.no_grad()
def test_a_model_that_computes_nan_or_infinity_is_refused_with_the_cause(llama, found, cause):
    with pytest.raises(UserError, match=f"NaN or infinity.*{cause}"):
        found(llama)


def test_a_model_that_rules_words_out_is_understood(llama):
    llama.lm_head.bias = torch.nn.Parameter(torch.zeros(llama.config.vocab_size, dtype=torch.float64))
    with torch.no_grad():
        llama.lm_head.bias[90:] = -torch.inf
    hidden = torch.ones(1, 32, dtype=torch.float64)
    assert output_head(llama)(hidden)[0].isinf().nonzero().flatten().tolist() == list(range(90, 96))


def up_to(last, value=torch.nan):
    """A model that computes a number for positions up to `last`, and `value` after it."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=1024, **ENDS))
    with torch.no_grad():
        model.transformer.wpe.weight[last + 1 :] = value
    return model.eval()


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory, tokenizer):
    """Saves such a model."""

    def save(last, value):
        folder = tmp_path_factory.mktemp("forgetful")
        up_to(last, value).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


def _run(*args, tasks="smoke_questions"):
    return command("run", "--device", "cpu", "--tasks", tasks, "--limit", 6, "--batch-size", 1, *args)


@pytest.mark.parametrize("value", [torch.nan, pytest.param(torch.inf, marks=pytest.mark.slow)])
def test_answers_that_are_no_numbers_fail_their_cell_with_the_count(forgetful, tmp_path, value):
    out = tmp_path / "out"
    run = ("--model", forgetful(12, value), "--method", "dense,griffin", "--output", out)
    for _ in range(2):  # the second try finds what is usable in the journal, and nothing that is not
        done = _run(*run)
        assert done.code == 1 and (done.out + done.err).count("6 of 7 answers") == 2
        assert not list(out.glob("cells/*"))
        kept = [json.loads(line[9:])[0] for f in out.glob("partial/*") for line in f.read_text().splitlines()]
        assert kept
        assert all(math.isfinite(answer["logprob"]) for answers in kept for answer in answers.values())


def test_a_cell_without_any_usable_answer_ends_before_all_are_asked_and_the_others_go_on(
    forgetful, tmp_path, monkeypatch
):
    monkeypatch.setattr(lm_module, "HOPELESS", 3)
    run = ("--model", forgetful(60, torch.nan), "--method", "dense", "--output", tmp_path / "out")
    done = _run(*run, tasks="smoke_drift,smoke_questions")
    assert done.code == 1 and "3 of the first 3 of 6 answers" in done.out + done.err
    assert [f.name.partition("-")[0] for f in (tmp_path / "out" / "cells").iterdir()] == ["smoke_questions"]


def test_a_log_likelihood_of_minus_infinity_is_no_answer(tokenizer):
    model = tiny("llama")
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCAB, dtype=torch.float64))
    with torch.no_grad():
        model.lm_head.bias[9] = -torch.inf
    lm = PrunedLM(model, tokenizer)
    lm.begin(Session(), {})
    assert lm.loglikelihood([_asked(0, "w7")])[0][0] < 0
    with pytest.raises(UserError, match="1 of 2 answers"):
        lm.loglikelihood([_asked(0, "w7"), _asked(1, "w9")])
    assert len(lm.journal) == 1


def _asked(document, answer):
    """As lm-eval asks for the log-likelihood of an answer."""
    return SimpleNamespace(args=("w5 w6", f" {answer}"), task_name="t", doc_id=document, idx=0, doc={})


@pytest.mark.parametrize("method", ["dense", "griffin"])
def test_texts_that_were_generated_from_nan_are_no_answers(tokenizer, method, monkeypatch):
    model = up_to(19)
    lm = PrunedLM(model, tokenizer, batch_size=2)
    # No token ends a text, so that each runs into NaN or not by its length alone.
    monkeypatch.setattr(generation.Generator, "counted", lambda _self, tokens, *_: len(tokens))
    requests = [TextRequest(words([5] * n), n) for n in (4, 6, 18)]  # eight new tokens each: the last one meets NaN
    with prune(model, method, 0.5) as session:
        lm.begin(session, {})
        with pytest.raises(UserError, match="1 of 3 answers"):
            lm.generate_until(requests)
    assert len(lm.journal) == 2


def test_a_trace_of_nan_is_refused(tokenizer):
    prompt, then = words(random_tokens(15)), words(random_tokens(10))
    with pytest.raises(UserError, match="NaN or infinity"):
        tracing.trace(up_to(19), tokenizer, make("griffin", {}), 0.5, prompt, then, tokens=10)


@pytest.mark.slow
def test_records_of_such_answers_from_before_are_named_and_not_compared(forgetful, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run = ("--model", forgetful(12, torch.nan), "--method", "dense,griffin", "--no-kl", "--output", out)
    with monkeypatch.context() as before:
        before.setattr(Score, "usable", True)
        assert _run(*run, tasks="smoke_questions,smoke_drift").code == 0
    baseline = tmp_path / "base.json"
    for line in (["compare", out, "--row", "dense,griffin"], ["check", out, "--baseline", baseline, "--update"]):
        done = command(*line)
        assert done.code == 2 and "of 6 answers of smoke_" in done.err and not baseline.exists()
    assert "no number" in render(Store(out).load(), "md")
    assert "nan" not in render(Store(out).load(), "json").lower()
    assert ">nan<" not in build(Store(out))
