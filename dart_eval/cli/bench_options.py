"""Options that the verbs of `dart-eval bench` have in common, and what is made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dart_eval.cli import complete, options
from dart_eval.errors import UserError, nearest

if TYPE_CHECKING:
    from dart_eval.pruning.method import Pruner

TIMING = "Timing"  # a panel of the help
FORMATS = ("table", "md", "json")
SHAPES = ("llama-3.1-8b", "llama-3.2-1b", "qwen2.5-1.5b")  # of `dart_eval.shapes`, which imports torch
DECODED = "griffin,dart,dart-code,dart-plus"

Methods = Annotated[
    str,
    typer.Option(
        metavar="NAMES",
        help="Measure these methods, comma-separated, as `dart-eval run --method` takes them.",
        rich_help_panel=options.PRUNING,
        autocompletion=complete.listed(complete.methods),
    ),
]
Rounds = Annotated[
    int,
    typer.Option(
        metavar="N", help="Take so many rounds, in each of which all sides have their turn.", rich_help_panel=TIMING
    ),
]
Format = Annotated[
    str,
    typer.Option(
        metavar="|".join(FORMATS),
        help="Print in this form.",
        rich_help_panel=options.OUTPUT,
        autocompletion=complete.words(FORMATS),
    ),
]


def check_format(format: str) -> None:
    """Refuse a form that there is not.

    Raises:
        UserError: with the forms that there are.
    """
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}", nearest(format, FORMATS))


def chosen(named: str, sparsity: float, example: str = "dart,dart-plus") -> list[Pruner]:
    """The methods of a comma-separated list; the sparsity is checked before them.

    Args:
        named: the list.
        sparsity: of all of them.
        example: what to give, for the message where the list is empty.

    Raises:
        UserError: a name or a number is wrong, or the list is empty.
    """
    from dart_eval.allocation import check_sparsity
    from dart_eval.pruning.registry import make, parse

    check_sparsity(sparsity)
    methods = [make(*parse(spec)) for spec in named.split(",") if spec.strip()]
    if not methods:
        raise UserError("no method given", f"for example --method {example}")
    return methods
