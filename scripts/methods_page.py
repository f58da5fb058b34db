"""Write docs/methods.md from the registry. A test says when the page is out of date."""

from __future__ import annotations

import dataclasses
import textwrap
from pathlib import Path

from method_cards import card

from dart_eval.cli.describe import part_rows
from dart_eval.pruning.tables import FromTable, shipped_tables
from dart_eval.pruning.method import Pruner
from dart_eval.pruning.registry import BUILT_IN, PARTS
from dart_eval.results.writers import escaped

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
SLOTS = {
    "score": "how much a neuron matters, by the tokens of a context, a calibration text, or the weights",
    "mask": "which neurons a sequence may use",
    "draw": "how scores become a mask from the prompt",
    "remask": "when decoding replaces the mask from the prompt, and from which tokens",
    "choice": "which of all neurons a token computes, matrix by matrix",
    "allocation": "how the sparsity is spread over layers",
    "compensation": "what replaces the neurons that are left out",
    "entries": "which weights of a matrix a token reads, in methods that do not prune neurons",
}
TABLES = """`dart:allocation=table:llama-3.1-8b-70` takes a shipped table, at `--sparsity 0.7`. These are the tables of
the public code of DART. A name gives the model, the pruned percentage and the ablation: `no-mag` is
`allocation.magnitude=off` of `allocation=depth`, and `no-border` is `allocation.protect=off`. Three tables do not match
their names: `llama-3.2-3b-50` keeps .575, `llama-3.2-3b-50-no-mag-no-border` .514 and `llama-3.2-3b-72` .916 of the
neurons. A message names the sparsity that fits. `llama-3.2-3b-50-commented-out` is a comment in that code. It differs
from `llama-3.2-3b-50` in eight layers, and keeps .500. All names:
{}."""


def page() -> str:
    """The text of docs/methods.md: what stands there before the first heading stays."""
    head = PAGE.read_text(encoding="utf-8").partition("\n## ")[0]
    lines = [head, "## Methods\n", "| name | what it does | its parts |", "| --- | --- | --- |"]
    for method in BUILT_IN:
        spelled = dataclasses.replace(method, name=Pruner.name).spec
        named = ", ".join(f"`{part}`" for part in spelled.split(":")[1:]) or "the defaults"
        lines.append(f"| `{method.name}` | {escaped(method.summary)} | {escaped(named)} |")
    lines.append(
        "\nThe defaults are `mask=everything`, `choice=none`, `allocation=uniform` and `compensation=none`. A method "
        "with `entries` has no other part but an allocation.\n"
    )
    lines.append("## One by one\n")
    lines.append(
        "The lowest read is the smallest share of the FFN weight bytes that the method takes, in steps of 1 %, on the\n"
        "shape of Llama 3.1 8B. For most methods a second program follows the paper alone; a test compares both. In\n"
        "formulas and programs a = act(gate x), u = up x and h = a u; `Plain` is a model that is run by hand.\n"
    )
    for method in BUILT_IN:
        lines += card(method)
    for slot, what in SLOTS.items():
        lines.append(f"## {slot}: {what}\n")
        for cls in PARTS:
            if cls.slot == slot:
                (title, summary), *fields = part_rows(cls)
                lines.append(f"**`{title}`** {summary}.\n")
                if fields:
                    lines += ["| field and default | what it means |", "| --- | --- |"]
                    lines += [f"| `{escaped(left.strip())}` | {escaped(text)} |" for left, text in fields] + [""]
                if cls is FromTable:
                    names = ", ".join(f"`{name}`" for name in shipped_tables())
                    lines.append(TABLES.format(textwrap.fill(names, 120, break_on_hyphens=False)) + "\n")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
