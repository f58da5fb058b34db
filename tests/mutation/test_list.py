"""The list of mutants fits the code; `make mutations` shows that the fast lane notices them."""

import ast
from collections import Counter

import pytest

from tests.mutation.listed import KINDS, ROOT, mutants

LISTED = mutants()


def test_it_has_at_least_eighty_in_every_part_of_the_core():
    assert len(LISTED) >= 80
    parts = Counter(m.file.split("/")[1] for m in LISTED)
    assert min(parts["pruning"], parts["evaluation"], parts["results"]) >= 10


@pytest.mark.parametrize("file", sorted({m.file for m in LISTED}))
def test_each_changes_a_text_that_stands_in_its_file_once(file):
    for mutant in (m for m in LISTED if m.file == file):
        ast.parse(mutant.source())
        assert mutant.new != mutant.old
        assert mutant.kind in KINDS
        assert mutant.what.endswith(".")
        assert all((ROOT / test).is_file() for test in mutant.tests)


def test_none_stands_there_twice():
    assert max(Counter((m.file, m.old, m.new) for m in LISTED).values()) == 1
    assert max(Counter(m.what for m in LISTED).values()) == 1
