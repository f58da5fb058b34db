"""Every type of language model: right, or refused with a line, and as docs/models.md says it."""

from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dart_eval.pruning.registry import methods
from dart_eval.util.errors import UserError
from tests.helpers.sessions import bits, fitting, generate, open_session, prompts_of, same
from tests.matrix.check import row
from tests.matrix.page import line
from tests.matrix.types import NOT_MADE, OTHERS, TYPES, VARIANTS, tiny

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
SAME = f"with transformers {transformers.__version__};" in PAGE  # other versions have other types, and other errors


# Plain of either layout, gated, fused, a scaled output, a norm of neurons, what a layer adds after its FFN; experts
# with gates or without, transposed, with biases, weighed before, beside a shared FFN.
FORMS = [
    "gpt2", "opt", "llama", "phi3", "granite", "bitnet", "gemma4_text with experts", "qwen3_moe", "gpt_oss",
    "llama4_text", "deepseek_v3", "nemotron_h",
]  # fmt: skip
HARD = FORMS[5:]  # derivations have the others
ALL = [name if name in HARD else pytest.param(name, marks=pytest.mark.slow) for name in (*TYPES, *VARIANTS)]


@pytest.mark.parametrize("name", ALL)
def test_a_type_is_right_or_refused(name):
    found = line(row(name))  # a number that is wrong, or an error of any other kind, fails here
    assert not SAME or found in PAGE.splitlines(), "run scripts/models_page.py"


@pytest.mark.skipif(not SAME, reason="another version of transformers")
def test_every_type_is_accounted_for():
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) == set(TYPES) | OTHERS | set(NOT_MADE)
    assert not OTHERS & set(NOT_MADE) and set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) >= OTHERS


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_every_method_runs_on_every_form_of_ffn_or_is_refused(name):
    """It reads what its label says, changes what is decoded, and leaves the model as it was."""
    model, prompts = tiny(name), prompts_of(2, 12)
    before, dense = bits(model), generate(model, prompts, 3)
    for method in (cls() for cls in methods().values() if cls.prunes and not cls.looks_ahead):
        sparsity = fitting(method.name, name, 0.5)
        try:
            with open_session(model, method, sparsity, "masked") as session:
                found = generate(model, prompts if method.inner is method else prompts[:1], 3)
        except UserError:
            assert not method.fits_all or method.inner is not method, method.name
            continue
        # Thresholds of a text; what bits are left; all; what dense checks, too.
        within = {"teal": 0.08, "rsparse": 0.08, "rounding": 1.0, "noise": 1.0, "sirius": 9.0}.get(method.name, 0.005)
        assert all(bool(((step.read - 1 + sparsity).abs() < within).all()) for step in session.steps), method.name
        assert same(model, before), method.name
        if method.inner is not method:  # which gives no logits
            assert found.sequences.shape == (1, 15)
            continue
        assert torch.stack(found.logits).isfinite().all()
        assert not torch.allclose(found.logits[1], dense.logits[1]), method.name
