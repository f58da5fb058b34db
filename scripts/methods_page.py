"""Write docs/methods.md from the registry. A test says when the page is out of date."""

from __future__ import annotations

import textwrap
from pathlib import Path

from method_cards import card

from dart_eval.cli.ls import meaning
from dart_eval.pruning.method import Method, text_of
from dart_eval.pruning.registry import BUILT_IN, methods
from dart_eval.pruning.tables import shipped_tables
from dart_eval.results.show import escaped

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
TABLES = """`dart:allocation=table:llama-3.1-8b-70` takes a shipped table, at `--sparsity 0.7`. These are the tables of
the public code of DART. A name gives the model, the pruned percentage and the ablation: `no-mag` is
`allocation.magnitude=off` of `allocation=depth`, and `no-border` is `allocation.protect=off`. Three tables do not match
their names: `llama-3.2-3b-50` keeps .575, `llama-3.2-3b-50-no-mag-no-border` .514 and `llama-3.2-3b-72` .916 of the
neurons. A message names the sparsity that fits. `llama-3.2-3b-50-commented-out` is a comment in that code. It differs
from `llama-3.2-3b-50` in eight layers, and keeps .500. All names:
{}."""


def built_in() -> dict[str, type[Method]]:
    """The methods of this package by name."""
    return {name: cls for name, cls in methods().items() if name in BUILT_IN}


def page() -> str:
    """The text of docs/methods.md: what stands there before the first heading stays."""
    head = PAGE.read_text(encoding="utf-8").partition("\n## ")[0]
    lines = [head, "## Methods\n", "| name | what it does |", "| --- | --- |"]
    lines += [f"| `{name}` | {escaped(cls.summary)} |" for name, cls in built_in().items()] + [""]
    lines.append("## One by one\n")
    lines.append(
        "The lowest read is the smallest share of the FFN weight bytes that the method takes, in steps of 1 %, on the\n"
        "shape of Llama 3.1 8B. For most methods a second program follows the paper alone; a test compares both. In\n"
        "formulas and programs a = act(gate x), u = up x and h = a u; `Plain` is a model that is run by hand.\n"
    )
    for cls in built_in().values():
        lines += card(cls())
        options = cls.options()
        inherited = next((name for b in cls.__mro__[1:] if (name := getattr(b, "name", "")) in BUILT_IN), None)
        if options and inherited:
            changed = [
                f"`{p}={text_of(o.default)}`" for p, o in options.items() if o != built_in()[inherited].options().get(p)
            ]
            lines.append(f"Its options are those of `{inherited}`, with other defaults: {', '.join(changed)}.\n")
        elif options:
            lines += ["| option and default | counts with | what it means |", "| --- | --- | --- |"]
            for path, option in options.items():
                with_ = f"`{path.partition('.')[0]}={option.when}`" if option.when else ""
                lines.append(f"| `{path}={text_of(option.default)}` | {with_} | {escaped(meaning(option))} |")
            lines.append("")
        if cls.name == "dart":
            names = ", ".join(f"`{name}`" for name in shipped_tables())
            lines.append(TABLES.format(textwrap.fill(names, 120, break_on_hyphens=False)) + "\n")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
