"""Products of families and settings: the whole of them in `make test`, enough of them in the fast lane."""

import pytest


def product(families, settings, first="llama"):
    """Pairs of a family and a setting, as pytest's parameters; all but the fast lane's are marked slow.

    The fast lane takes every setting on the first family and on one of the others, in turn: so each family has some.
    """
    others = [f for f in families if f != first]
    found = []
    for i, setting in enumerate(settings):
        values = setting if isinstance(setting, tuple) else (setting,)
        for family in families:
            fast = family in (first, others[i % len(others)])
            found.append(pytest.param(family, *values, marks=[] if fast else [pytest.mark.slow]))
    return found


def on_families(names, families, settings, first="llama"):
    """Parametrize a test over the product; the fixture `model` makes the family's model."""
    return pytest.mark.parametrize(("model", *names), product(families, settings, first), indirect=["model"])
