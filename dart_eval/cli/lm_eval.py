"""`dart-eval lm-eval`: lm-eval's own command line, in which `--model dart` is known."""

from __future__ import annotations

import sys

import typer

TAKES = {"allow_extra_args": True, "ignore_unknown_options": True}  # lm-eval's own words
SHIPPED = "--include_path"


def lm_eval(context: typer.Context) -> None:
    """Run lm-eval's own command line, in which `--model dart` is known.

    `lm_eval run -h` lists the options. docs/recipes.md lists what `--model_args` takes.

    \b
    [bold]Examples[/bold]
    dart-eval lm-eval --model dart --model_args method=griffin --tasks arc_easy
    dart-eval lm-eval ls tasks
    """
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry, register_model

    from dart_eval.evaluation.task_names import tasks_dir
    from dart_eval.sweep.dart_lm import DartLM

    if "dart" not in model_registry:
        register_model("dart")(DartLM)
    words, named = context.args, {word.partition("=")[0] for word in context.args}
    if named & {"--tasks", "-t"} and SHIPPED not in named:
        words = [*words, SHIPPED, str(tasks_dir())]
    sys.argv = ["lm-eval", *words]
    cli_evaluate()
