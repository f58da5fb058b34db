"""The names of methods and of parts. The built-in ones stand here; other packages add theirs by entry points.

A package offers a whole method (a `Pruner`) in the group `dart_eval.methods`, a part (a class) in `dart_eval.parts`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoints, entry_points

from dart_eval.pruning.choices.cats import ByGate
from dart_eval.pruning.choices.choice import All
from dart_eval.pruning.choices.countdown import ByUp
from dart_eval.pruning.choices.oracle import ByHidden
from dart_eval.pruning.inputs.both import GradedBoth
from dart_eval.pruning.inputs.columns import GradedColumns
from dart_eval.pruning.inputs.rounded import RoundedEntries
from dart_eval.pruning.inputs.teal import Above
from dart_eval.pruning.inputs.wina import ByNorms
from dart_eval.pruning.kinds import InputSparsity, NeuronMask, StaticMask, TokenChoice, kind_with
from dart_eval.pruning.masks.allocations import FromTable, Global, Uniform
from dart_eval.pruning.masks.compensations import COMPENSATIONS, MeanOutput
from dart_eval.pruning.masks.depth import DepthAware
from dart_eval.pruning.masks.draws import DRAWS
from dart_eval.pruning.masks.mask import MASKS, Ahead, FromPrompt, Static
from dart_eval.pruning.masks.remasks import REMASKS, OnDrift
from dart_eval.pruning.masks.scores import SCORES, Activation, Fluctuation, Random, Wanda, Weights
from dart_eval.pruning.method import Pruner
from dart_eval.pruning.part import Part
from dart_eval.pruning.spelling import changed, flattened, text_of
from dart_eval.util.errors import UserError, nearest
from dart_eval.util.retired import retired
from dart_eval.util.text import settings_in

log = logging.getLogger(__name__)

GRIFFIN = Activation(norm="l2")
TABLE = "table:"  # and a file: `allocation=table:FILE`
BUILT_IN: tuple[Pruner, ...] = (
    TokenChoice(name="dense", summary="runs the model unpruned (control)"),
    StaticMask(
        name="random", summary="keeps a random set of neurons in each layer, the same for every text",
        mask=Static(score=Random()),
    ),
    StaticMask(
        name="magnitude", paper="2404.01365",
        summary="keeps the neurons with the largest norms of gate and up rows, the same for every text",
        mask=Static(score=Weights()),
    ),
    StaticMask(
        name="static", summary="keeps the neurons with the highest griffin scores on a calibration text",
        mask=Static(score=GRIFFIN),
    ),
    StaticMask(
        name="wanda-sp", paper="2306.11695",
        summary="keeps the neurons with the largest |down| times activation norm on a calibration text",
        mask=Static(score=Wanda()),
    ),
    StaticMask(
        name="flap", paper="2312.11983",
        summary="keeps the neurons that vary most on a calibration text, and adds the mean output of the rest",
        mask=Static(score=Fluctuation()), allocation=Global(), compensation=MeanOutput(),
    ),
    NeuronMask(
        name="griffin", paper="2404.01365",
        summary="keeps the neurons that were most active in the prompt, the same number in every layer",
        mask=FromPrompt(score=GRIFFIN),
    ),
    NeuronMask(
        name="dart", paper="2601.22632",
        summary="keeps the neurons most active in the prompt, more in sensitive layers, and re-masks on drift",
        mask=FromPrompt(remask=OnDrift()), allocation=DepthAware(),
    ),
    # The public code's settings. Its defects stay out: there a mask of MASKING_STEP 0 was never made anew, and half of
    # the layers of the forward with the alarm ran under the old one. Densities stay the prompt's here; the code
    # computed them anew.
    NeuronMask(
        name="dart-code", paper="2601.22632",
        summary="runs dart with the settings of its public code: eager detector, re-masks from 30 dense tokens",
        mask=FromPrompt(remask=OnDrift(
            window=5, sigma=0.1, patience=1, cooldown=0, min_windows=2, skip_first=False, dense_tokens=30, blend=0.0,
        )), allocation=DepthAware(),
    ),
    TokenChoice(
        name="cats", paper="2404.08763",
        summary="reads all of gate, and lets each token choose the neurons with the largest |act(gate x)|",
        choice=ByGate(),
    ),
    TokenChoice(
        name="m-countdown", paper="2505.17701",
        summary="reads all of up, and lets each token choose the neurons with the largest |up x|",
        choice=ByUp(),
    ),
    TokenChoice(
        name="oracle-token", summary="lets each token choose the largest |h|, known in advance (upper bound)",
        choice=ByHidden(),
    ),
    InputSparsity(
        name="teal", paper="2408.14690",
        summary="leaves out the columns of each matrix whose inputs are small, not neurons",
        entries=Above(),
    ),
    InputSparsity(
        name="wina", paper="2505.19427",
        summary="leaves out the columns of each matrix whose input times norm is small, not neurons",
        entries=ByNorms(),
    ),
    InputSparsity(
        name="grinqh", paper="2606.23419",
        summary="reads 0 to 8 bits of columns, more where inputs are larger (from the abstract)",
        entries=GradedColumns(),
    ),
    InputSparsity(
        name="decdec", paper="2412.20185",
        summary="reads 3 bits of all columns, and 4 more of those with the largest inputs",
        entries=GradedColumns(levels="3-7"),
    ),
    InputSparsity(
        name="graded-both",
        summary="reads more bits of the columns with larger inputs, and of the neurons that these leave most uncertain",
        entries=GradedBoth(),
    ),
    InputSparsity(
        name="rounding", summary="rounds the weights of decoded tokens; prompts read the original ones (control)",
        entries=RoundedEntries(),
    ),
    NeuronMask(
        name="oracle", summary="makes the mask from the same tokens that then run under it (upper bound)",
        mask=Ahead(score=GRIFFIN),
    ),
)  # fmt: skip
CHOICES = (All, ByGate, ByUp, ByHidden)
ALLOCATIONS = (Uniform, DepthAware, Global, FromTable)
ENTRIES = (GradedColumns, GradedBoth, Above, ByNorms, RoundedEntries)
PARTS: tuple[type[Part], ...] = (
    *SCORES, *MASKS, *DRAWS, *REMASKS, *CHOICES, *ALLOCATIONS, *COMPENSATIONS, *ENTRIES,
)  # fmt: skip


def methods() -> dict[str, Pruner]:
    """Return all methods by name: the built-in ones, then those of other installed packages.

    A method that cannot be imported is logged and skipped; the others must go on working.
    """
    by_name = {method.name: method for method in BUILT_IN}
    for name, method in offered("dart_eval.methods", entry_points):
        if not isinstance(method, Pruner):
            log.error("method %s of another package is no dart_eval.Pruner: left out", name)
        else:
            if method.name != name:  # records and commands call it by the name that finds it
                method = dataclasses.replace(method, name=name, base=None)
            by_name.setdefault(name, method)
    return by_name


def parts() -> dict[str, dict[str, type[Part]]]:
    """Return all parts by slot and name: the built-in ones, then those of other installed packages."""
    catalog: dict[str, dict[str, type[Part]]] = {}
    for cls in PARTS:
        catalog.setdefault(cls.slot, {})[cls.name] = cls
    for name, part in offered("dart_eval.parts", entry_points):
        slot = getattr(part, "slot", None)
        if not (isinstance(part, type) and issubclass(part, Part)) or slot not in catalog:
            log.error("part %s of another package is none of %s: left out", name, ", ".join(catalog))
        elif lacking := [word for word in ("name", "summary") if not isinstance(getattr(part, word, None), str)]:
            log.error("part %s of another package has no %s: left out", name, lacking[0])
        else:
            catalog[slot].setdefault(part.name, part)
    return catalog


@functools.cache  # a search of all installed packages takes milliseconds, and a spelling is read often
def offered(group: str, search: Callable[..., EntryPoints]) -> list[tuple[str, object]]:
    """Return the objects that other packages offer, by name. Import errors are logged and skipped.

    Args:
        group: the group of entry points.
        search: `importlib.metadata.entry_points`.
    """
    offers = []
    for entry in search(group=group):
        try:
            offers.append((entry.name, entry.load()))
        except Exception as error:
            kind = group.rpartition(".")[2][:-1]
            log.error("%s %s of another package cannot be imported: %s", kind, entry.name, error)
    return offers


def make(name: str, params: Mapping[str, object] | None = None) -> Pruner:
    """Return the method of that name, with other parts and values.

    Args:
        params: values by path (`spelling.changed`): `{"remask": "drift", "remask.window": 8}`.

    Raises:
        UserError: unknown name (nearest ones offered), unknown part or field, or a bad value.
    """
    by_name = methods()
    if name not in by_name:
        raise retired("method", name) or UserError(
            f"unknown method {name!r}", nearest(name, by_name) or "`dart-eval ls methods` lists them"
        )
    if not params:
        return by_name[name]
    settings = dict(params)
    if str(table := settings.get("allocation", "")).startswith(TABLE):
        if "allocation.file" in settings:
            raise UserError("allocation.file is given twice", "leave one of them out")
        settings |= {"allocation": "table", "allocation.file": str(table).removeprefix(TABLE)}
    return changed(by_name[name], settings, parts(), kind_with)


def spelled(name: str, settings: Mapping[str, object]) -> str:
    """Spell a name and settings as a user types them.

    `griffin`, `{"remask": {"part": "drift", "window": 8}}` -> `griffin:remask=drift:remask.window=8`.
    """
    return ":".join([name, *(f"{path}={text_of(value)}" for path, value in flattened(settings))])


def parse(spec: str) -> tuple[str, dict[str, str]]:
    """Parse the spelling of a method into its name and settings.

    `griffin:remask=drift:remask.window=8` -> ("griffin", {"remask": "drift", "remask.window": "8"}).

    Values may hold colons (`allocation=table:FILE`): one separates parameters only where a name and "=" follow.
    """
    name, colon, rest = spec.strip().partition(":")
    name = name if name.strip() in methods() else name.lower().replace("_", "-")  # GRIFFIN, wanda_sp
    params = {}
    for pair in settings_in(rest) if colon else []:
        key, sep, value = pair.partition("=")
        if not sep or not key:
            raise UserError(f"{spec!r} is not a method", "write NAME or NAME:key=value:key=value")
        if key.strip() in params:
            raise UserError(f"{key.strip()} is given twice", "leave one of them out")
        params[key.strip()] = value.strip()
    return name.strip(), params
