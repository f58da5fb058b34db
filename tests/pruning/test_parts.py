"""Methods as compositions: what every field takes, how parts are put in their slots, and that every spelling is one."""

import itertools
import math

import pytest
from dart_eval.pruning.choices.cats import ByGate
from dart_eval.pruning.choices.choice import All
from dart_eval.pruning.choices.countdown import ByUp
from dart_eval.pruning.choices.oracle import ByHidden
from dart_eval.pruning.inputs.both import GradedBoth
from dart_eval.pruning.inputs.columns import GradedColumns
from dart_eval.pruning.inputs.rounded import RoundedEntries
from dart_eval.pruning.inputs.teal import Above
from dart_eval.pruning.inputs.wina import ByNorms
from dart_eval.pruning.kinds import kind_with
from dart_eval.pruning.masks.compensations import MeanOutput
from dart_eval.pruning.masks.mask import Ahead, Everything, FromPrompt, Static
from dart_eval.pruning.masks.remasks import Never, OnDrift
from dart_eval.pruning.masks.scores import Activation, Fluctuation, Random, Wanda, Weights
from dart_eval.pruning.part import kind_of, takes
from dart_eval.pruning.spelling import changed, plain_fields, slot_names, text_of

from dart_eval.cli.describe import part_rows, tree
from dart_eval.pruning.method import KINDS, Pruner
from dart_eval.pruning.methods.depth import DepthAware
from dart_eval.pruning.registry import BUILT_IN, PARTS, make, methods, parse, parts
from dart_eval.pruning.tables import FromTable, Global, Uniform
from dart_eval.results.board_text import ABSTRACTS
from dart_eval.util.errors import UserError

METHODS = [m.name for m in BUILT_IN]
FIELDS = [(cls, field) for cls in PARTS if cls is not FromTable for field in plain_fields(cls)]
SLOTS = ("mask", "score", "draw", "remask", "choice", "allocation", "compensation", "entries")


def made(spec):
    return make(*parse(spec))


# -- fields ----------------------------------------------------------------------------------------------------------


def test_every_part_says_what_it_is_and_every_field_what_it_means():
    assert set(parts()) == set(SLOTS)
    for cls in PARTS:
        assert parts()[cls.slot][cls.name] is cls
        assert cls.summary and not cls.summary.endswith(".") and "\n" not in cls.summary
        fields = [*(f.name for f in plain_fields(cls)), *slot_names(cls)]
        assert fields == [*dict.fromkeys(fields)]
        for field in plain_fields(cls):
            assert field.metadata["help"], (cls, field.name)
            assert "\n" not in field.metadata["help"]
    assert len({(cls.slot, cls.name) for cls in PARTS}) == len(PARTS)


def _field(cls, name, value):
    return getattr(cls(**{name: value}), name)


@pytest.mark.parametrize(("cls", "field"), FIELDS, ids=lambda x: getattr(x, "name", None))
def test_a_field_takes_what_its_kind_is_and_nothing_beyond_its_bounds(cls, field):
    name, kind, bounds = field.name, kind_of(cls, field.name), field.metadata
    assert _field(cls, name, text_of(field.default)) == field.default  # as a user types it
    if isinstance(kind, tuple):
        assert field.default in kind and all(_field(cls, name, word) == word for word in kind)
        wrong = [f"{kind[0]}x", "", 1, None]
    elif kind is bool:
        for word, value in (("on", True), ("off", False), ("True", True), ("no", False), (1, True), ("0", False)):
            assert _field(cls, name, word) is value
        wrong = ["maybe", 2, "", None]
    else:
        assert kind in (int, float)
        step = 1 if kind is int else 1e-9
        low, high, above = bounds["least"], bounds["most"], bounds["above"]
        assert kind is float or low is not None  # no count may be negative
        for bound in (b for b in (low, high) if b is not None):
            assert _field(cls, name, bound) == bound and type(_field(cls, name, bound)) is kind
        wrong = [b - step for b in (low,) if b is not None] + [b + step for b in (high,) if b is not None]
        wrong += [above, above - 1] if above is not None else []
        wrong += ["much", "", None, True, math.nan, math.inf, "nan"] + ([1.5, "1.5"] if kind is int else [])
        if above is not None:
            assert _field(cls, name, above + step) == above + step
    for value in wrong:
        with pytest.raises(UserError, match=name) as raised:
            _field(cls, name, value)
        assert raised.value.remedy, value


def test_a_value_that_is_wrong_is_told_with_its_bound_or_the_nearest_word():
    for spec, words in (
        ("dart:remask.window=0", "window is 0; it must be at least 1"),
        ("dart:remask.blend=1.5", "blend is 1.5; it must be at most 1"),
        ("dart:remask.window=ten", "dart: remask.window is 'ten'; it must be a whole number"),
        ("dart:remask.window=2.5", "window is '2.5'; it must be a whole number"),
        ("dart:remask.sigma=big", "sigma is 'big'; it must be a number"),
        ("griffin:score.norm=l3", "norm is 'l3'; known: l1, l2, none"),
        ("dart:remask.act=perhaps", "act is 'perhaps'; it must be on or off"),
    ):
        with pytest.raises(UserError, match=words):
            made(spec)


# -- the built-in methods --------------------------------------------------------------------------------------------


def test_the_built_in_methods_are_these_compositions():
    """Written out: nothing of a base, and no default, is left to be guessed."""
    l2, none = (Activation(norm=norm) for norm in ("l2", "none"))
    drift = {
        "window": 10, "sigma": 0.5, "floor": 0.1, "patience": 2, "cooldown": 2, "min_windows": 4, "skip_first": True,
        "act": True, "ring": 24, "dense_tokens": 0, "blend": 0.25,
    }  # fmt: skip
    code = {"window": 5, "sigma": 0.1, "patience": 1, "cooldown": 0, "min_windows": 2, "skip_first": False,
            "dense_tokens": 30, "blend": 0.0}  # fmt: skip
    depth = DepthAware(sensitivity="ffn", protect=True, magnitude=True)
    wanted = {
        "dense": Pruner(Everything(), All(), Uniform()),
        "random": Pruner(Static(score=Random(seed=0))),
        "magnitude": Pruner(Static(score=Weights())),
        "static": Pruner(Static(score=l2)),
        "wanda-sp": Pruner(Static(score=Wanda())),
        "flap": Pruner(Static(score=Fluctuation(variance="true")), Global(), MeanOutput()),
        "griffin": Pruner(FromPrompt(score=l2, remask=Never())),
        "dart": Pruner(FromPrompt(score=none, remask=OnDrift(**drift)), allocation=depth),
        "dart-code": Pruner(FromPrompt(score=none, remask=OnDrift(**(drift | code))), allocation=depth),
        "cats": Pruner(choice=ByGate(threshold="none")),
        "m-countdown": Pruner(choice=ByUp()),
        "oracle-token": Pruner(choice=ByHidden()),
        "teal": Pruner(entries=Above()),
        "wina": Pruner(entries=ByNorms(weigh="gate")),
        "graded-both": Pruner(entries=GradedBoth(levels="0-2-4-6-8", group=128, neurons=0.25, more=2.0, known=0.2)),
        "grinqh": Pruner(entries=GradedColumns(levels="0-2-4-6-8", group=128)),
        "decdec": Pruner(entries=GradedColumns(levels="3-7", group=128)),
        "rounding": Pruner(entries=RoundedEntries(bits="q4_k")),
        "oracle": Pruner(Ahead(score=l2)),
    }
    assert [*methods()][: len(METHODS)] == METHODS and set(METHODS) == set(wanted)
    for method in BUILT_IN:
        assert method == wanted[method.name] and method.summary and not method.summary.endswith(".")
        assert make(method.name) == method == made(method.spec) and make(method.name).spec == method.name


def test_what_a_composition_is_follows_from_its_parts():
    def those(tells):
        return {m.name for m in BUILT_IN if getattr(m, tells)}

    choosing = {"cats", "m-countdown", "oracle-token"}
    prompted = {"griffin", "dart", "dart-code"}
    assert those("prunes") == set(METHODS) - {"dense"}
    assert those("sized") == set(METHODS) - {"dense", "rounding"}
    assert {m.name for m in BUILT_IN if m.choice.chooses} == choosing
    assert all(m.spec == m.name for m in BUILT_IN)
    assert those("looks_ahead") == {"oracle"}
    assert those("upper_bound") == {"oracle", "oracle-token"}
    assert those("needs_context") == {*prompted, "oracle"}
    assert those("keeps_state") == {*prompted, "oracle"}
    # What any part of it needs or does, all of it needs or does.
    for spec, tells, value in (
        ("cats:allocation=depth", "needs_context", True), ("cats:allocation=depth", "keeps_state", True),
        ("random:compensation=mean", "keeps_state", False), ("random:compensation=mean", "calibrates", True),
        ("dense:choice=hidden", "upper_bound", True),
    ):  # fmt: skip
        assert getattr(made(spec), tells) is value, (spec, tells)


@pytest.mark.parametrize(("spec", "words"), [
    ("magnitude:allocation=depth", "allocation=depth does not go with mask=static; give one of global, table"),
    ("griffin:score=weights", "score=weights does not go with mask=prompt; give one of activation, "),
    ("oracle:score=random", "score=random does not go with mask=ahead"),
    ("cats:allocation=global", "allocation=global does not go with mask=everything"),
    ("teal:mask=prompt",
     "the method leaves out inputs or weights, but mask=prompt leaves out neurons; .*dense:mask=prompt"),
    ("griffin:entries=norms", "the method leaves out neurons, but entries=norms leaves out inputs or weights"),
    ("teal:allocation=depth", "allocation=depth does not go with entries=threshold"),
    ("griffin:choice=gate", "griffin: choice left in 0.3 .*a token's choice is a method"),
    ("dart:allocation=table", "allocation=table needs a file"),
    ("dart:allocation=table:allocation.file=nowhere.json", "nowhere.json is not a file; .*save-allocation"),
])  # fmt: skip
def test_parts_that_do_not_go_together_are_refused(spec, words):
    name = spec.partition(":")[0]
    with pytest.raises(UserError, match=words) as raised:
        made(spec)
    assert str(raised.value).count(f"{name}: ") == 1  # whose they are, once


# -- other parts in a method's slots ---------------------------------------------------------------------------------


SPELLINGS = [
    {"remask": "drift", "remask.window": 8, "remask.blend": 0.5},
    {"remask.blend": "0.5", "remask.window": "8", "remask": "drift"},
    {"remask": {"part": "drift", "window": 8, "blend": 0.5}},
    {"remask": {"blend": 0.5, "window": 8, "part": "drift"}},
    {"remask": {"part": "drift", "window": 8}, "remask.blend": 0.5},
    {"remask.blend": 0.5, "remask": {"part": "drift", "window": 8.0}},
    {"remask": OnDrift(window=8, blend=0.5)},
    {"remask": OnDrift(window=8), "remask.blend": 0.5},
    {"remask": OnDrift(window=9, blend=0.5), "remask.window": 8},
    {"remask": {"part": OnDrift(window=8), "blend": 0.5}},
    {"mask.remask": "drift", "mask.remask.window": 8, "remask.blend": 0.5},
    {"mask": {"remask": {"part": "drift", "window": 8, "blend": 0.5}}},
    {"mask": FromPrompt(score=Activation(norm="l2"), remask=OnDrift(window=8, blend=0.5))},
    {"mask": "prompt", "score": "activation", "score.norm": "l2", "remask": OnDrift(window=8, blend=0.5)},
]  # fmt: skip


@pytest.mark.parametrize("given", SPELLINGS, ids=str)
def test_every_way_to_write_it_makes_the_same_method(given):
    found = make("griffin", given)
    assert found == Pruner(FromPrompt(score=Activation(norm="l2"), remask=OnDrift(window=8, blend=0.5)))
    assert found.name == "griffin" and found.spec == "griffin:remask=drift:remask.window=8:remask.blend=0.5"
    assert made(found.spec) == found and hash(made(found.spec)) == hash(found)


def test_the_order_of_what_is_given_says_nothing():
    given = {
        "remask": "drift",
        "remask.window": 3,
        "allocation": "depth",
        "allocation.protect": "off",
        "score.norm": "l1",
    }
    found = {make("griffin", dict(order)) for order in itertools.permutations(given.items())}
    assert len(found) == 1


def test_a_slot_that_is_named_again_keeps_what_the_method_has_in_it():
    """Another part in a slot begins from its own defaults; the same one goes on from the method's values."""
    wider = make("dart-code", {"remask": "drift", "remask.ring": 8})
    assert wider.mask.remask.ring == 8 and wider.mask.remask.window == 5
    assert make("dart", {"score.norm": "l2"}).mask.remask == OnDrift()


def test_a_change_of_a_change_is_told_from_the_method_that_a_user_knows():
    first = make("griffin", {"remask": "drift"})
    second = changed(first, {"remask.window": 8}, parts(), kind_with)
    assert second.spec == "griffin:remask=drift:remask.window=8" and second.base == make("griffin")
    assert changed(second, {"remask": "never"}, parts(), kind_with).spec == "griffin"


@pytest.mark.parametrize(("name", "given", "words"), [
    ("dart", {"remask.window": 8, "mask.remask.window": 9}, "mask.remask.window is given twice; leave one"),
    ("dart", {"remask.window": 8, "remask": {"window": 9}}, "remask.window is given twice"),
    ("dart", {"remask": "drift", "mask": {"remask": "never"}}, "mask.remask is given twice"),
    ("griffin", {"remask": "drift", "remask.part": "never"}, "given twice"),
    ("griffin", {"allocation": "table:llama-3.1-8b-70", "allocation.file": "x"}, "allocation.file is given twice"),
    ("dart", {"remask.windw": 8}, "there is no 'remask.windw'; did you mean .*window"),
    ("dart", {"remsk.window": 8}, "there is no 'remsk'; did you mean remask"),
    ("dart", {"alocation": "depth"}, "there is no 'alocation'; did you mean allocation"),
    ("griffin", {"remask": "drft"}, "there is no remask=drft; did you mean drift"),
    ("griffin", {"remask.window": 8}, "remask=never has no.*; remask=drift has it"),
    ("cats", {"remask": "drift"}, "mask=everything has no.*; mask=prompt has it"),
    ("dart", {"remask.window.size": 8}, "remask.window is a plain field, and 'size' stands below it"),
    ("dart", {"remask.window": {}}, "remask.window"),
    ("griffin", {"score": OnDrift()}, "score takes no remask; give one of activation, wanda"),
    ("griffin", {"name": "mine"}, "there is no 'name'"),
    ("griffin", {"base": "dart"}, "there is no 'base'"),
    ("griffin", {"part": "drift"}, "there is no 'part'"),
    ("griffin", {"": "drift"}, "there is no ''"),
    ("griffin", {"remask": None}, "remask has no value"),
    ("random", {"score.seed": 10**18}, "score.seed is .*; it must be at most"),
    ("random", {"compensation.p": 1}, "random: compensation=none has no field 'p'; it has none"),
    ("grifin", {}, "unknown method 'grifin'; did you mean griffin"),
    ("xyzzy", {}, "unknown method 'xyzzy'; known: cats, dart, "),
])  # fmt: skip
def test_what_does_not_exist_or_comes_twice_is_refused(name, given, words):
    with pytest.raises(UserError, match=words):
        make(name, given)


def test_a_spec_that_is_none_is_refused():
    assert parse("griffin : remask = drift") == ("griffin", {"remask": "drift"})
    for spec in ("griffin:remask", "griffin:=drift", "griffin::remask=drift"):
        with pytest.raises(UserError, match="is not a method; write NAME"):
            parse(spec)
    with pytest.raises(UserError, match=r"^remask.window is given twice; leave one of them out"):
        parse("dart:remask.window=8:remask.window=16")


def test_a_table_may_stand_beside_its_allocation(tmp_path):
    """`allocation=table:FILE` is as short as can be."""
    file = tmp_path / "a b:c.json"
    file.write_text('{"keep": [0.7, 0.3, 0.5]}')
    found = made(f"dart:allocation=table:{file}")
    assert found.allocation.table == [0.7, 0.3, 0.5] and found.contents() == [file.read_bytes()]
    assert found == make("dart", {"allocation": "table", "allocation.file": str(file)})


# -- what is listed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_what_is_listed_of_a_method_is_what_makes_it(name):
    """Every line of `dart-eval ls` is a path and a value, with a word on each."""
    method = make(name)
    lines = tree(method)
    assert make("dense", dict(line.strip().split("=", 1) for line, _ in lines)) == method
    assert all(help for _, help in lines)
    assert {line.strip().split("=")[0] for line, _ in lines} == set(method.params())


def test_a_part_is_listed_with_its_fields_words_and_bounds():
    rows = dict(part_rows(OnDrift))
    assert rows["remask=drift"] == OnDrift.summary
    assert rows["  remask.window=10"].endswith("(at least 1)")
    assert rows["  remask.blend=0.25"].endswith("(at least 0, at most 1)")
    assert rows["  remask.act=true"] and len(rows) == 1 + len(plain_fields(OnDrift))
    assert dict(part_rows(GradedBoth))["  entries.neurons=0.25"].endswith("(above 0, at most 0.9)")
    assert [*dict(part_rows(FromPrompt))] == ["mask=prompt", "  score=activation", "  draw=best", "  remask=never"]


def test_methods_that_are_known_from_an_abstract_say_so_wherever_they_stand():
    said = {m.name for m in BUILT_IN if "(from the abstract)" in m.summary}
    assert said <= ABSTRACTS  # which the board marks, with retired ones
    assert all(m.paper for m in BUILT_IN if m.name in said)


def test_every_combination_of_the_parts_that_the_kinds_take_can_be_made(tmp_path):
    table = tmp_path / "table.json"
    table.write_text('{"keep": [0.5, 0.5]}')
    for kind in KINDS.values():
        slots_of_it = slot_names(kind)
        fitting = [[cls for cls in PARTS if issubclass(cls, takes(kind, slot))] for slot in slots_of_it]
        for classes in itertools.product(*fitting):
            parts_of_it = [cls(file=str(table)) if cls is FromTable else cls() for cls in classes]
            method = Pruner(**dict(zip(slots_of_it, parts_of_it, strict=True)))
            assert type(method) is kind
