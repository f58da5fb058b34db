"""Write docs/options.md from the list of options. A test says when the page is out of date."""

from __future__ import annotations

from pathlib import Path

from dart_eval.cli import options
from dart_eval.results.show import escaped
from dart_eval.sweep.options import DEFAULTS, OPTIONS, choices_of, default_of

PAGE = Path(__file__).parents[1] / "docs" / "options.md"


def page() -> str:
    """The text of docs/options.md: what stands there before the first heading stays."""
    lines = [PAGE.read_text(encoding="utf-8").partition("\n## ")[0]]
    for panel in options.PANELS:
        lines += [f"## {panel}\n", "| option | what it means | default |", "| --- | --- | --- |"]
        for name in DEFAULTS:
            if OPTIONS[name].panel == panel:
                words = f" One of {', '.join(choices_of(name))}." if choices_of(name) else ""
                default = default_of(name) or ("off" if DEFAULTS[name] is False else "")
                lines.append(f"| `{name}` | {escaped(OPTIONS[name].help + words)} | {escaped(default)} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
