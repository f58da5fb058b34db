"""Every composition comes back from what is written of it."""

import pytest
from dart_eval.pruning.part import kind_of
from dart_eval.pruning.spelling import plain_fields, slots, text_of
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from dart_eval.pruning.registry import make, parts
from dart_eval.pruning.tables import FromTable
from dart_eval.util.errors import UserError
from tests.helpers.matrices import in_turn
from tests.pruning.test_parts import METHODS, SLOTS, made


def _values(cls, field):
    """What a plain field may be."""
    kind, bounds = kind_of(cls, field.name), field.metadata
    if isinstance(kind, tuple):
        return st.sampled_from(kind)
    if kind is bool:
        return st.booleans()
    low, high = bounds["least"], bounds["most"]
    if kind is int:
        return st.integers(low, (low or 0) + 50)
    if bounds["above"] is not None:
        return st.floats(bounds["above"], high or 9.0, exclude_min=True, allow_subnormal=False)
    return st.floats(-3.0 if low is None else low, 9.0 if high is None else high)


@st.composite
def compositions(draw):
    """A method, and other parts and values at any of its paths."""
    method, given = draw(st.sampled_from(METHODS)), {}
    for slot in SLOTS:
        if draw(st.integers(0, 4)):  # few others: of many, most do not go together
            continue
        known = [cls for cls in parts()[slot].values() if cls is not FromTable]
        cls = draw(st.sampled_from(known))
        given[slot] = cls.name
        for field in plain_fields(cls):
            if draw(st.booleans()):
                given[f"{slot}.{field.name}"] = draw(_values(cls, field))
    return method, given


def _possible(method, given):
    try:
        return make(method, given)
    except UserError:  # parts that do not go together
        return None


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(compositions())
def test_what_is_written_of_a_method_makes_it_again(drawn):
    found = _possible(*drawn)
    assume(found is not None)
    again = made(found.spec)
    assert again == found and again.spec == found.spec and again.params() == found.params()
    as_text = {path: text_of(value) for path, value in found.params().items()}
    for base in ("dense", found.name):  # all parts and fields, whatever the method that they go into
        assert make(base, found.params()) == make(base, as_text) == found
    parents = [path for path, _ in slots(found)]
    assert parents == [slot for slot in SLOTS if slot in found.params()]


@pytest.mark.parametrize(("name", "slot"), in_turn(METHODS, SLOTS))
def test_any_part_in_any_slot_of_any_method_comes_back(name, slot):
    """One at a time, with all fields another than by default; what cannot be is said to be so."""
    for cls in parts()[slot].values():
        fields = plain_fields(cls)
        given = {slot: cls.name} | {f"{slot}.{f.name}": _another(cls, f) for f in fields if cls is not FromTable}
        found = _possible(name, given)
        if found is not None:
            assert made(found.spec) == found
            assert found.params()[slot] == cls.name


def _another(cls, field):
    """Another value than the default."""
    kind, value = kind_of(cls, field.name), field.default
    if isinstance(kind, tuple):
        return next(word for word in kind if word != value)
    return not value if kind is bool else value + 1 if kind is int else value * 0.9 + 0.05
