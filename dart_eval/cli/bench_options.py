"""Options that the verbs of `dart-eval bench` have in common, and what is made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dart_eval.errors import UserError, nearest

if TYPE_CHECKING:
    from dart_eval.pruning.method import Pruner

FORMATS = ("table", "md", "json")
SHAPES = ("llama-3.1-8b", "llama-3.2-1b", "qwen2.5-1.5b")  # of `dart_eval.shapes`, which imports torch
DECODED = "griffin,dart,dart-code,dart-plus"

Methods = Annotated[
    str,
    typer.Option(
        help="Methods, comma-separated, as `dart-eval run --method` takes them.",
        rich_help_panel="Pruning",
    ),
]
Sparsity = Annotated[
    float, typer.Option(help="Share of the FFN weights that a token does not read.", rich_help_panel="Pruning")
]
Rounds = Annotated[
    int, typer.Option(help="Number of rounds. In each, all that is compared takes its turn.", rich_help_panel="Timing")
]
Format = Annotated[
    str,
    typer.Option(
        help="Form of what is printed: table, md or json.",
        rich_help_panel="Output",
        autocompletion=lambda: list(FORMATS),
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
    from dart_eval.pruning.prune import check_sparsity
    from dart_eval.pruning.registry import make, parse

    check_sparsity(sparsity)
    methods = [make(*parse(spec)) for spec in named.split(",") if spec.strip()]
    if not methods:
        raise UserError("no method given", f"for example --method {example}")
    return methods
