"""Names of version 0.1: each still gives the method that it gave, and a warning says what to write instead."""

import warnings

import pytest

from dart_eval.pruning.registry import make, parse
from dart_eval.pruning.renamed import OLD, RENAMED
from dart_eval.util.errors import UserError

# Every old name on its own: what was typed, what is to be typed.
ALONE = {
    "normalise": ("dart:normalise=l1", "dart:score.norm=l1"),
    "aggregate": ("dart:aggregate=ema", "dart:score.average=ema"),
    "decay": ("dart:decay=0.9", "dart:score.decay=0.9"),
    "skip_first": ("dart:skip_first=on", "dart:score.skip_first=on"),
    "down_norm": ("oracle:down_norm=1", "oracle:score.down_norm=on"),
    "seed": ("random:seed=7", "random:score.seed=7"),
    "sensitivity": ("dart:sensitivity=residual", "dart:allocation.sensitivity=residual"),
    "protect": ("dart:protect=off", "dart:allocation.protect=off"),
    "magnitude": ("dart:magnitude=false", "dart:allocation.magnitude=false"),
    "window": ("dart:window=8", "dart:remask.window=8"),
    "sigma": ("dart-code:sigma=1.5", "dart-code:remask.sigma=1.5"),
    "floor": ("dart:floor=0.2", "dart:remask.floor=0.2"),
    "patience": ("dart:patience=3", "dart:remask.patience=3"),
    "cooldown": ("dart:cooldown=0", "dart:remask.cooldown=0"),
    "min_windows": ("dart:min_windows=1", "dart:remask.min_windows=1"),
    "detect_skip_first": ("dart:detect_skip_first=off", "dart:remask.skip_first=off"),
    "renew": ("dart:renew=off", "dart:remask.act=off"),
    "ring": ("dart-choice:ring=16", "dart-choice:remask.ring=16"),
    "dense_tokens": ("dart-code:dense_tokens=0", "dart-code:remask.dense_tokens=0"),
    "blend": ("dart:blend=0.5", "dart:remask.blend=0.5"),
    "memory": ("dart:memory=running", "dart:remask.old=running"),
    "reference": ("dart:reference=kept", "dart:remask.reference=kept"),
    "every": ("dart:every=4", "dart:remask.every=4"),
    "every_blend": ("dart:every=4:every_blend=0.6", "dart:remask.every=4:remask.every_blend=0.6"),
    "stages": ("dart:stages=1.5", "dart:choice=gate-up:choice.mask_ratio=1.5"),
    "down": ("dart-choice:down=0.8", "dart-choice:choice.write_share=0.8"),
    "compensate": ("dart:compensate=on", "dart:compensation=mean"),
    "detect": ("dart:detect=off", "dart:remask=never"),
}
TOGETHER = [
    # Without a detector masks are made anew every so often, or never; what the detector alone had says nothing.
    ("dart:detect=off:every=4", "dart:remask=every:remask.tokens=4"),
    ("dart:detect=off:every=4:ring=9:memory=running:every_blend=0.6",
     "dart:remask=every:remask.tokens=4:remask.ring=9:remask.old=running:remask.blend=0.6"),
    ("dart:detect=off:every=4:window=3:blend=0.9:reference=kept:renew=off", "dart:remask=every:remask.tokens=4"),
    ("dart:detect=off:window=3:ring=9:every_blend=0.2:every=0", "dart:remask=never"),
    ("dart:detect=on:window=3", "dart:remask.window=3"),
    ("dart:detect=on:every=4:every_blend=0.6", "dart:remask.every=4:remask.every_blend=0.6"),
    ("dart:renew=off:every=4", "dart:remask.act=off:remask.every=4"),
    # What a method had of its own stays.
    ("dart-choice:detect=off:every=4", "dart-choice:remask=every:remask.tokens=4:remask.ring=8:remask.old=running"),
    ("dart-choice:detect=off", "dart-choice:remask=never"),
    ("dart-choice:stages=1.4", "dart-choice:choice.mask_ratio=1.4"),
    # A mask alone: no token chooses, and a share of what it writes says nothing.
    ("dart-choice:stages=1", "dart-choice:choice=none"),
    ("dart-choice:stages=1:down=0.5:compensate=off", "dart-choice:choice=none:compensation=none"),
    ("dart:stages=1.5:down=0.6", "dart:choice=gate-up:choice.mask_ratio=1.5:choice.write_share=0.6"),
    # `score` took the factors of the vocabulary, beside the activations.
    ("dart:score=magnitude", "dart"),
    ("dart:score=max:down_norm=on", "dart:score.vocabulary=max:score.down_norm=on"),
    ("dart-choice:score=product", "dart-choice:score.vocabulary=product"),
    # Both kinds of names beside each other.
    ("dart:window=8:remask.sigma=1", "dart:remask.window=8:remask.sigma=1"),
    ("dart:allocation=uniform:window=8", "dart:allocation=uniform:remask.window=8"),
]  # fmt: skip


def made(spec):
    return make(*parse(spec))


def quietly(spec):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return made(spec)


def test_every_old_name_is_tried():
    assert set(ALONE) == set(OLD)
    assert set(RENAMED) < set(OLD)


@pytest.mark.parametrize(("old", "new"), [*ALONE.values(), *TOGETHER])
def test_an_old_name_gives_the_method_that_it_gave(old, new):
    with pytest.warns(Warning, match="names of version 0.1.*write ") as caught:
        found = made(old)
    assert found == quietly(new)
    assert len(caught) == 1
    # What the warning says to write does the same, beside what was new already, and brings no other.
    said = str(caught[0].message).rpartition("write ")[2]
    kept = [f"{k}={v}" for k, v in parse(old)[1].items() if "." in k or k == "allocation"]
    assert quietly(":".join([said, *kept])) == found


@pytest.mark.parametrize("factor", ["max", "mean", "combined", "product"])
def test_every_factor_of_the_vocabulary_is_one_still(factor):
    with pytest.warns(Warning, match=f"write dart:score.vocabulary={factor}"):
        assert made(f"dart:score={factor}").mask.score.vocabulary == factor


def test_a_table_beside_its_allocation_is_taken_without_a_word(tmp_path):
    """`allocation=table:FILE` is no old name: it is as short as can be."""
    file = tmp_path / "a b:c.json"
    file.write_text('{"keep": [0.7, 0.3, 0.5]}')
    found = quietly(f"dart:allocation=table:{file}")
    assert found.allocation.table == [0.7, 0.3, 0.5] and found.files() == [str(file)]
    assert found == make("dart", {"allocation": "table", "allocation.file": str(file)})


def test_new_names_bring_no_warning():
    for name in ("weights", "wanda", "random"):
        assert quietly(f"magnitude:score={name}").mask.score.name == name


@pytest.mark.parametrize(("spec", "words"), [
    ("dart:window=8:remask.window=9", "remask.window is given twice"),
    ("dart:detect=off:remask=drift", "remask is given twice"),
    ("dart:stages=4", "mask_ratio is 4; it must be at most 3"),
    ("dart:stages=wide", "stages is 'wide'; it must be a number"),
    ("dart:detect=perhaps", "detect is 'perhaps'; it must be on or off"),
    ("dart:every=often", "every is 'often'; it must be a whole number"),
    ("dart:normalise=l3", "norm is 'l3'; did you mean l[12]"),
    ("magnitude:window=8", "mask=static has no|there is no 'remask'"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*names of version 0.1")
def test_what_was_refused_is_refused(spec, words):
    with pytest.raises(UserError, match=words):
        made(spec)
