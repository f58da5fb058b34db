"""Products of models and settings: most of them in `make test`, enough of them in the fast lane."""

import itertools

import pytest


def product(models, settings, first="llama", every=1):
    """Pairs of a model and a setting, as pytest's parameters; those that the fast lane leaves out are marked slow.

    Every setting runs on one model, in turn, and the first setting on all of them. The fast lane takes every setting
    (or every n-th) on its own model.
    """
    models, found = [first, *(m for m in models if m != first)], []
    for i, setting in enumerate(settings):
        values = setting if isinstance(setting, tuple) else (setting,)
        turn, left_out = divmod(i, every)
        own = models[(i if left_out else turn) % len(models)]
        for model in models if i == 0 else [own]:
            fast = not left_out and model == own
            found.append(pytest.param(model, *values, marks=[] if fast else [pytest.mark.slow]))
    return found


def on_families(names, families, settings, every=1):
    """Parametrize a test over the product; the fixture `model` makes the family's model."""
    return pytest.mark.parametrize(("model", *names), product(families, settings, every=every), indirect=["model"])


def in_turn(*lists):
    """The product of lists, as pytest's parameters; a tuple in a list is several. Of the fast lane is a tuple of the
    first entries, one of the second, and so on: as many as the longest list has, shorter ones from their start again.
    """
    fast = {tuple(i % len(some) for some in lists) for i in range(max(map(len, lists)))}
    found = []
    for place in itertools.product(*(range(len(some)) for some in lists)):
        entries = [some[i] for some, i in zip(lists, place, strict=True)]
        values = [v for entry in entries for v in (entry if isinstance(entry, tuple) else (entry,))]
        found.append(pytest.param(*values, marks=[] if place in fast else [pytest.mark.slow]))
    return found
