"""Mutants can be made of the code as it is; `make mutations` shows that the fast lane notices them."""

import ast
from collections import Counter

import pytest

from tests.mutation.operators import EQUIVALENT, KINDS, RUN, mutants

EVERY = mutants(every=True)


@pytest.mark.slow
def test_operators_reach_every_part_of_the_core_and_each_change_is_python():
    parts = Counter(m.file.split("/")[1] for m in EVERY)
    assert min(parts[name] for name in ("pruning", "evaluation", "results", "layers", "weights")) >= 10
    assert {m.kind for m in EVERY} == set(KINDS)
    for mutant in EVERY:
        assert mutant.new != mutant.old
        ast.parse(mutant.source())


def test_the_hundred_are_spread_and_stay_where_other_code_changes():
    chosen = mutants()
    assert RUN <= len(chosen) < RUN + 5  # equal changes of one function count once
    assert {m.kind for m in chosen} == set(KINDS) and len({m.file for m in chosen}) > 20
    assert [m for m in EVERY if m.order in {c.order for c in chosen}] == chosen
    assert set(EQUIVALENT) <= {m.what for m in EVERY}
