"""What `gpu_check.py` prints at its end, in 80 columns: the checks, the speeds, one column of a table."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

SPEEDS = """Speed: of one token at batch 1, over the speed of the untouched weights. Most:
what the bytes that are read allow. Share: speed / most. Card: bytes read a
second, over what the card can read. Control: the untouched model over itself.
One FFN is of Llama 3.1 8B, in a CUDA graph; the rest is a model of its shape.

  what                   where      read   speed    most  share  card  control"""


def line(found: dict[str, Any]) -> str:
    """One check, in lines of 80 columns."""
    said = found.get("why") or found["numbers"].get("said", "")
    head = f"  {found['check']:<15} {found['status']:<7} {found['seconds']:5.1f} s  "
    filled = textwrap.fill(said, 80, initial_indent=head, subsequent_indent=" " * len(head))
    return (filled or head).rstrip()


def report(made: dict[str, Any]) -> str:
    """All of a run: how many checks passed, the numbers, and what did not pass."""
    checks = made["checks"]
    counts = {s: sum(f["status"] == s for f in checks) for s in ("passed", "failed", "skipped")}
    head = f"{made['card']}: " + ", ".join(f"{n} {s}" for s, n in counts.items() if n) + f" in {made['seconds']:.0f} s"
    dry = ["Dry, on a CPU: no time and no value below means anything."] if made.get("dry") else []
    others = [line(f) for f in checks if f["status"] != "passed"]
    return "\n".join(["", *dry, *speeds(checks), *column(checks), head, *others])


def speeds(checks: list[dict[str, Any]]) -> Iterator[str]:
    """The lines of all speeds."""
    reads = next((f["numbers"].get("reads") for f in checks if f["check"] == "rate"), None)
    rows = [row for f in checks for row in f["numbers"].get("speeds", [])]
    if not rows:
        return
    yield SPEEDS
    for r in rows:
        card = f"{100 * r['rate'] / reads:.0f} %" if reads else "-"
        control = f"{r['control']:.2f}x" if "control" in r else "-"
        yield (
            f"  {r['what']:<22} {r['where']:<9} {r['read']:5.2f} {r['speedup']:6.2f}x {r['ceiling']:6.2f}x "
            f"{100 * r['share']:4.0f} % {card:>5} {control:>8}"
        )
    absent = {f"{what} ({why})" for f in checks for what, why in f["numbers"].get("absent", {}).items()}
    if absent:
        yield textwrap.fill(f"No product: {'; '.join(sorted(absent))}.", 80)
    yield ""


def column(checks: list[dict[str, Any]]) -> Iterator[str]:
    """The lines of one column of a table."""
    for numbers in (f["numbers"] for f in checks if f["numbers"].get("column")):
        rows = numbers["column"]
        title = f"{numbers['model']} on {rows[0]['n']} documents of {numbers['task']}:"
        yield textwrap.fill(title, 80)
        yield f"  {'method':<12} {'read':>5} {numbers['metric']:>10} {'of dense':>9}"
        for r in rows:
            error = f" ±{r['stderr']:.3f}" if r.get("stderr") is not None else ""
            recovery = f"{100 * r['recovery']:.0f} %" if r.get("recovery") is not None else "-"
            yield f"  {r['method']:<12} {r['read']:5.2f} {r['value']:10.3f} {recovery:>9}{error}"
        yield ""
