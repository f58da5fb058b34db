"""Write docs/options.md from the list of options. A test says when the page is out of date."""

from __future__ import annotations

from pathlib import Path
from types import NoneType
from typing import Literal, get_args, get_origin

from dart_eval.cli import options
from dart_eval.results.show import escaped
from dart_eval.sweep.options import DEFAULTS, HINTS, OPTIONS, default_of

PAGE = Path(__file__).parents[1] / "docs" / "options.md"


def page() -> str:
    """The text of docs/options.md: what stands there before the first heading stays."""
    lines = [PAGE.read_text(encoding="utf-8").partition("\n## ")[0]]
    for panel in options.PANELS:
        lines += [f"## {panel}\n", "| option | what it means | default |", "| --- | --- | --- |"]
        for name in DEFAULTS:
            if OPTIONS[name].panel == panel:
                kinds = [kind for kind in get_args(HINTS[name]) if kind is not NoneType] or [HINTS[name]]
                choices = [HINTS[name]] if get_origin(HINTS[name]) is Literal else kinds
                meaning = OPTIONS[name].help
                if get_origin(choices[0]) is Literal:
                    meaning += f" One of {', '.join(get_args(choices[0]))}."
                default = default_of(name) or ("off" if DEFAULTS[name] is False else "")
                lines.append(f"| `{name}` | {escaped(meaning)} | {escaped(default)} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
