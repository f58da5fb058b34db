"""What today's models are judged by: lm-eval's own files and pruned decoding, on data in the hub's schema."""

import json

import nltk
import pytest

import dart_eval
from dart_eval.results.metrics import DISTANCE, kind_of
from tests.evaluation.test_unsafe import METRIC

SUBJECTS = (
    "biology", "business", "chemistry", "computer science", "economics", "engineering", "health", "history", "law",
    "math", "other", "philosophy", "physics", "psychology",
)  # fmt: skip
QUESTION = {"question": "w5 w6 w7 w8 w9 w10 w11 w12 ?", "answer": "w5 #### 7"}
INSTRUCTED = {
    "prompt": "w5 w6 w7 w8 w9 w10 w11 w12", "instruction_id_list": ["punctuation:no_comma", "keywords:existence"],
    "kwargs": [{"keywords": None}, {"keywords": ["zzz"]}],
}  # fmt: skip
LONG = {
    "context": "w5 w6 w7 w8 w9 w10 w11 w12", "question": "w5 ?", "input": "w5 ?", "answers": ["w9"], "length": 8,
    "dataset": "qasper", "language": "en", "all_classes": [],
}  # fmt: skip
PROGRAM = {
    "task_id": 11, "text": "w5 w6 w7 w8", "code": "w5", "test_setup_code": "", "challenge_test_list": [],
    "test_list": ["assert w5 == 1", "assert w6 == 1", "assert w7 == 1"],
}  # fmt: skip


def _pro(number, subject):
    return {
        "question_id": number, "question": "w5 w6 w7 w8 ?", "options": ["w9", "w10"], "answer": "B", "answer_index": 1,
        "cot_content": "A: Let's think step by step. The answer is (B).", "category": subject, "src": "w11",
    }  # fmt: skip


FILES = {
    "openai__gsm8k/main/test": [QUESTION] * 2,
    "openai__gsm8k/main/train": [QUESTION] * 8,
    "google__IFEval/default/train": [{"key": n, **INSTRUCTED} for n in range(2)],
    "TIGER-Lab__MMLU-Pro/default/test": [_pro(n, subject) for n, subject in enumerate(SUBJECTS)],
    "TIGER-Lab__MMLU-Pro/default/validation": [_pro(n, SUBJECTS[n // 5]) for n in range(70)],
    "Xnhyacinth__LongBench/qasper/test": [{"_id": str(n), **LONG} for n in range(2)],
    "google-research-datasets__mbpp/full/test": [PROGRAM] * 2,
}


@pytest.fixture
def data(tmp_path):
    for name, rows in FILES.items():
        file = tmp_path / "data" / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data"


@pytest.mark.slow
@pytest.mark.parametrize(("task", "modules", "metrics"), [
    ("gsm8k", (), {"exact_match,strict-match", "exact_match,flexible-extract"}),
    ("mmlu_pro", (), {"exact_match,custom-extract"}), ("mbpp", (), {"pass_at_1"}),
    ("ifeval", ("langdetect", "immutabledict"),
     {f"{level}_level_{how}_acc" for level in ("prompt", "inst") for how in ("strict", "loose")}),
    ("longbench_qasper", ("jieba", "fuzzywuzzy", "rouge"), {"score", "qa_f1_score"}),
])  # fmt: skip
def test_it_runs_with_pruned_decoding(task, modules, metrics, saved_llama, data, tmp_path, monkeypatch):
    for module in modules:
        pytest.importorskip(module)
    monkeypatch.setattr(nltk.data, "find", lambda name: name)  # no instruction here cuts sentences
    (tmp_path / "work" / "code_eval").mkdir(parents=True)
    (tmp_path / "work" / "code_eval" / "code_eval.py").write_text(METRIC.format(str(tmp_path / "ran")))
    monkeypatch.chdir(tmp_path / "work")
    rows = dart_eval.evaluate(
        saved_llama, tasks=task, method="dense,griffin,dart", data_dir=data, limit=2, output=tmp_path / "out",
        gen_kwargs="max_gen_toks=6", confirm_run_unsafe_code=task == "mbpp",
    )  # fmt: skip
    whole = [row for row in rows if row["task"] == task]
    assert {row["metric"] for row in whole if kind_of(row["metric"]).group != DISTANCE} == metrics
    assert {row["method"] for row in whole} == {"dense", "griffin", "dart"}
    samples = dart_eval.samples(tmp_path / "out")
    pruned = samples[samples["method"] == "griffin"]
    # One of up to six new tokens is the dense prompt's.
    assert (pruned["tokens"] <= 6).all() and (pruned["effective_sparsity"] <= 0.5).all()
    assert pruned["effective_sparsity"].max() > 0.2
