"""Methods as classes with options: what each takes, that every spelling is one, and what a class says of itself."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dart_eval.pruning.methods.dart import Dart
from dart_eval.pruning.registry import BUILT_IN, make, methods, parse
from dart_eval.util.errors import UserError

DRIFT = {
    "remask": "drift", "remask.window": 10, "remask.sigma": 0.5, "remask.floor": 0.1, "remask.patience": 2,
    "remask.cooldown": 2, "remask.min_windows": 4, "remask.skip_first": True, "remask.act": True, "remask.ring": 24,
    "remask.dense_tokens": 0, "remask.blend": 0.25, "remask.release": 0,
}  # fmt: skip
CODE = {
    "remask.window": 5, "remask.sigma": 0.1, "remask.patience": 1, "remask.cooldown": 0, "remask.min_windows": 2,
    "remask.skip_first": False, "remask.dense_tokens": 30, "remask.blend": 0.0,
}  # fmt: skip
DEPTH = {
    "allocation": "depth", "allocation.sensitivity": "ffn", "allocation.protect": True, "allocation.magnitude": True,
}  # fmt: skip
COLUMNS = {"entries.levels": "0-2-4-6-8", "entries.group": 128}
DEFAULTS = {
    "random": {"score.seed": 0}, "flap": {"score.variance": "true"}, "griffin": {"draw": "best"},
    "dart": DRIFT | DEPTH, "dart-code": DRIFT | CODE | DEPTH, "cats": {"choice.threshold": "none"},
    "teal": {"allocation": "uniform"}, "wina": {"allocation": "uniform", "entries.weigh": "gate"},
    "grinqh": COLUMNS, "decdec": COLUMNS | {"entries.levels": "3-7"},
    "graded-both": COLUMNS | {"entries.neurons": 0.25, "entries.more": 2.0, "entries.known": 0.2},
    "rounding": {"entries.bits": "q4_k"}, "noise": {"noise.seed": 0},
    "rsparse": {"budget.columns": 0.99}, "sirius": {"of": "griffin", "every": 16, "threshold": 0.1},
}  # fmt: skip


def made(spec):
    return make(*parse(spec))


def test_the_defaults_of_the_built_in_methods_are_these():
    """Written out: nothing of a base is left to be guessed."""
    for name in BUILT_IN:
        method = make(name)
        values = {path: getattr(method, one.field) for path, one in method.valid_options().items()}
        assert values == DEFAULTS.get(name, {}) and method.spec == name and made(method.spec) == method
        assert method.params() == (method.recorded or {"method": name}) | values


def value(name, path, given):
    method = make(name, {methods()[name].options()[path].path: given})
    return getattr(method, method.options()[path].field)


def test_an_option_takes_what_its_kind_is_and_nothing_beyond_its_bounds():
    for name in BUILT_IN:
        for path in methods()[name].options().keys() - {"allocation.file"}:
            check_option(name, path)


def check_option(name, path):
    one = methods()[name].options()[path]
    if one.when is not None and one.when != make(name).params().get(path.partition(".")[0]):
        with pytest.raises(UserError, match=f"{path} goes with"):
            make(name, {path: one.default})
        return
    wrong = ["much", "", None]
    if one.words:
        choices = [word for word in one.words if word != "table"]
        assert one.default in choices and all(value(name, path, word) == word for word in choices)
        wrong += [f"{one.words[0]}x"]
    elif one.kind is bool:
        for word, truth in (("on", True), ("off", False), ("True", True), ("no", False)):
            assert value(name, path, word) is truth
    elif one.kind is not str:
        assert one.kind in (int, float)
        assert one.kind is float or one.least is not None  # no count may be negative
        step = 1 if one.kind is int else 1e-9
        for bound in (b for b in (one.least, one.most) if b is not None):
            assert value(name, path, str(bound)) == bound and type(value(name, path, bound)) is one.kind
        wrong += [one.least - step] if one.least is not None else []
        wrong += [one.most + step] if one.most is not None else []
        wrong += [one.above, one.above - 1] if one.above is not None else []
        wrong += [True, math.nan, math.inf, "nan"] + ([1.5, "1.5"] if one.kind is int else [])
    if one.kind is not str:
        for bad in wrong:
            with pytest.raises(UserError, match=path):
                make(name, {path: bad})


@given(
    st.sampled_from(["dart", "dart-code"]), st.integers(1, 99), st.floats(0, 1), st.booleans(),
    st.sampled_from(["depth", "uniform"]), st.integers(0, 9),
)  # fmt: skip
def test_what_is_written_of_a_method_makes_it_again(name, window, blend, act, allocation, release):
    given = {
        "remask.window": window, "remask.blend": blend, "remask.act": act, "allocation": allocation,
        "remask.release": release,
    }  # fmt: skip
    method = make(name, given)
    again = made(method.spec)
    assert again == method and hash(again) == hash(method) and again.params() == method.params()
    assert make(name, {k: str(v) for k, v in given.items()}) == method
    nested = {"remask": {k.partition(".")[2]: v for k, v in given.items() if "." in k}, "allocation": allocation}
    assert make(name, nested) == method


def test_a_class_is_made_as_its_name_is():
    assert Dart(remask_window=8) == make("dart", {"remask.window": "8"}) == made("dart:remask.window=8")


@pytest.mark.parametrize(("spec", "word"), [
    ("dart:remask.windw=8", "did you mean remask.window"), ("griffin:remask.window=8", "dart:"),
    ("dart:remask=never:remask.window=8", "remask=drift"), ("griffin:choice=gate", "a method"),
    ("dart:allocation=table", "needs a file"), ("dart:allocation=table:allocation.file=nowhere.json", "JSON file"),
    ("dart:remask.window=8:remask.window=16", "twice"), ("griffin:draw", "NAME"), ("griffin:=drift", "NAME"),
    ("grifin", "did you mean griffin"), ("pop", "left in 0.3"),
])  # fmt: skip
@pytest.mark.slow
def test_what_does_not_exist_or_comes_twice_is_refused(spec, word):
    with pytest.raises(UserError, match=word):
        made(spec)


def test_a_table_may_stand_beside_its_allocation(tmp_path):
    """`allocation=table:FILE` is as short as can be."""
    file = tmp_path / "a b:c.json"
    file.write_text('{"keep": [0.7, 0.3, 0.5]}')
    method = made(f"dart:allocation=table:{file}")
    assert method.contents() == [file.read_bytes()]
    assert method == make("dart", {"allocation": "table", "allocation.file": str(file)})


def test_what_classes_say_of_themselves():
    def those(tells):
        return {name for name in BUILT_IN if getattr(make(name), tells)}

    prompted = {"griffin", "dart", "dart-code", "oracle", "sirius"}
    assert those("prunes") == set(BUILT_IN) - {"dense"}
    assert those("sized") == set(BUILT_IN) - {"dense", "rounding", "noise"}
    assert those("looks_ahead") == {"oracle"} and those("upper_bound") == {"oracle", "oracle-token"}
    assert those("needs_context") == prompted == (those("keeps_state") - {"noise"})
