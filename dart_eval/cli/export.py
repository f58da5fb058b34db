"""`dart-eval export`: results as files of lm-eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dart_eval.cli.options import one_of, own
from dart_eval.cli.view import say

Folder = Annotated[Path, typer.Argument(help="Folder that `dart-eval run --output` wrote.")]
To = Annotated[str, one_of(("lm-eval",), "format", "Format: lm-eval.", metavar="FORMAT")]
Output = Annotated[
    Path | None, own(r"Write to this folder.  \[default: export/lm-eval in the results folder]", None, "DIR")
]
Force = Annotated[bool, own("Replace files of an earlier export.", None, "", "--force")]


def export(folder: Folder = Path("out"), to: To = "lm-eval", output: Output = None, force: Force = False) -> None:
    """Write results_*.json and samples_*.jsonl as lm-eval writes them. The results themselves do not change.

    [bold]Example[/bold]

    \b
    dart-eval export out --to lm-eval
    """
    from dart_eval.export.lm_eval import export as write_all
    from dart_eval.results.store import Store

    target = output or folder / "export" / to
    written = write_all(Store(folder), target, force)
    say(f"wrote {len(written)} file{'s' if len(written) > 1 else ''} to {target}")
