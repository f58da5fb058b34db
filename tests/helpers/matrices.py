"""Products of models and settings: most of them in `make test`, enough of them in the fast lane."""

import pytest


def product(models, settings, first="llama", every=1):
    """Pairs of a model and a setting, as pytest's parameters; those that the fast lane leaves out are marked slow.

    Every setting runs on the first model and on one or two of the others, in turn. The fast lane takes every setting
    (or every n-th) on the first model, and each of those on one of the others, so that all models have some.
    """
    others = [m for m in models if m != first]
    found = []
    for i, setting in enumerate(settings):
        values = setting if isinstance(setting, tuple) else (setting,)
        turn, left_out = divmod(i, every)
        here = {first, others[turn % len(others)], others[(turn + 1 + i) % len(others)]}
        for model in (m for m in models if m in here):
            fast = not left_out and model in (first, others[turn % len(others)])
            found.append(pytest.param(model, *values, marks=[] if fast else [pytest.mark.slow]))
    return found


def on_families(names, families, settings, every=1):
    """Parametrize a test over the product; the fixture `model` makes the family's model."""
    return pytest.mark.parametrize(("model", *names), product(families, settings, every=every), indirect=["model"])
