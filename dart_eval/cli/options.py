"""Options of the verbs: those of a run, made from the list in `sweep.options`, and what other verbs make theirs of."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar, cast

import typer
from typer.models import OptionInfo

from dart_eval.sweep.options import CLUSTER, DEFAULTS, MODEL, OPTIONS, OUTPUT, PRUNING, TASKS, default_of, option_of
from dart_eval.util.errors import UserError, nearest
from dart_eval.util.retired import retired

PANELS = (TASKS, PRUNING, MODEL, OUTPUT, CLUSTER)
FORMATS = ("table", "md", "csv", "tex", "json")  # of what a verb prints
BOARD, COSTS = "board", "costs"  # views of `tables`

Verb = TypeVar("Verb", bound=Callable[..., None])


def takes(*names: str) -> Callable[[Verb], Verb]:
    """Give a verb these options of a run. It gets their values by name, None for an option that was not typed.

    Args:
        names: of options in `sweep.options`.
    """
    shared: dict[str, object] = {}
    for name in sorted(names, key=lambda name: PANELS.index(OPTIONS[name].panel)):
        shared |= _of_run(name)

    def wrap(verb: Verb) -> Verb:
        @functools.wraps(verb)
        def called(**given: object) -> None:
            for off in [name for name in given if name.startswith("no_") and name in shared]:
                if given.pop(off):
                    given[off[3:]] = False
            verb(**given)

        own = inspect.signature(verb, eval_str=True)
        parameters = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            for name, annotation in shared.items()
        ]
        parameters += [p.replace(kind=p.KEYWORD_ONLY) for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        called.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        return cast(Verb, called)

    return wrap


def _of_run(name: str) -> dict[str, object]:
    """Return the annotation of an option of a run. A flag has one more, `--no-`; the less useful one is hidden."""
    known, default = OPTIONS[name], default_of(name)
    text = f"{known.help}  \\[default: {default}]" if default else known.help
    if not known.metavar:
        on, off = option_of(name), f"--no-{option_of(name)[2:]}"
        return {
            name: Annotated[bool | None, own(text, known.panel, "", on, hidden=default == "on")],
            f"no_{name}": Annotated[bool | None, own(known.off, known.panel, "", off, hidden=not known.off)],
        }
    kind: Any = list[str] if isinstance(DEFAULTS[name], tuple) or name in ("gen_kwargs", "seed") else str
    short = [word for word in known.second if word.startswith("-")]  # the long ones are for `token_normalize_func`
    return {name: Annotated[kind | None, own(text, known.panel, known.metavar, option_of(name), *short)]}


def own(help: str, panel: str | None, metavar: str | None, *names: str, **more: Any) -> OptionInfo:
    """Return an option; `names` as typed, if they differ from the parameter's name. A flag has an empty `metavar`."""
    return typer.Option(*names, help=help, rich_help_panel=panel, metavar=metavar, **more)


def one_of(
    known: Sequence[str], what: str, help: str, panel: str | None = None, metavar: str | None = None
) -> OptionInfo:
    """Return an option that takes one of a few words. what: a noun for them, in messages."""

    def checked(value: str | None) -> str | None:
        if value is not None and value not in known:
            left = retired("view", value) if what == "view" else None
            raise left or UserError(f"unknown {what} {value!r}", nearest(value, known))
        return value

    return own(help, panel, metavar or "|".join(known), callback=checked)


Force = Annotated[bool, own("Replace a file that holds something else.", None, "", "--force")]
Verbose = Annotated[bool, own("Show the libraries' messages and tracebacks.", OUTPUT, "", "--verbose")]
