"""`dart-eval bench`: one verb for each thing that can be measured."""

from __future__ import annotations

import shlex

import typer
from typer.core import TyperGroup

from dart_eval.cli.bench_decode import decode
from dart_eval.cli.bench_overhead import overhead
from dart_eval.cli.bench_scoring import scoring
from dart_eval.errors import UserError

FLAGS = {"--scoring": "scoring", "--overhead": "overhead"}  # of version 0.1, in place of verbs


class _Verbs(TyperGroup):
    """A group that answers options in place of a verb, as version 0.1 took them, with the line to write."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        if args and args[0].startswith("-") and args[0] not in ctx.help_option_names and not ctx.resilient_parsing:
            verb = next((FLAGS[word] for word in args if word in FLAGS), "decode")
            line = shlex.join(["dart-eval", "bench", verb, *(word for word in args if word not in FLAGS)])
            raise UserError(f"bench takes a verb before {args[0]}", f"write: {line}")
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Verbs,
    help="Measure how fast methods decode, how fast answers are scored, or what methods keep and add.",
    no_args_is_help=True,
)
app.command("decode")(decode)
app.command("scoring")(scoring)
app.command("overhead")(overhead)
