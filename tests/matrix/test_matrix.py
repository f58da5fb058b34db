"""Every type of language model: right, or refused with a line, and as docs/models.md says it."""

from pathlib import Path

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.matrix.check import row
from tests.matrix.page import line
from tests.matrix.types import NOT_MADE, OTHERS, TYPES, VARIANTS

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
SAME = f"with transformers {transformers.__version__};" in PAGE  # other versions have other types, and other errors


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TYPES, *VARIANTS])
def test_a_type_is_right_or_refused(name):
    found = line(row(name))  # a number that is wrong, or an error of any other kind, fails here
    assert not SAME or found in PAGE.splitlines(), "run scripts/models_page.py"


@pytest.mark.skipif(not SAME, reason="another version of transformers")
def test_every_type_is_accounted_for():
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) == set(TYPES) | OTHERS | set(NOT_MADE)
    assert not OTHERS & set(NOT_MADE) and set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) >= OTHERS
