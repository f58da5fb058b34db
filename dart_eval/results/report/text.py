"""Numbers and lists as people read them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeGuard

THIN = "\u202f"  # narrow no-break space, between a number and its unit


def finite(value: Any) -> TypeGuard[float]:
    """Whether `value` is a number that can be drawn and compared."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, like: float | None = None) -> str:
    """A value with the digits its size deserves (or those of `like`); a dash for what is no number."""
    if not finite(value):
        return "-" if value is None else str(value).replace("inf", "∞")
    size = abs(value if like is None else like)
    digits = 4 if size < 10 else 1 if size >= 100 else 2
    return f"{value:.{digits}f}".replace("-", "\u2212")


def with_error(value: Any, stderr: Any) -> str:
    """`value ± standard error`, or the value alone where there is none."""
    return f"{number(value)} ± {number(stderr, like=value)}" if finite(stderr) and finite(value) else number(value)


def percent(share: float, digits: int = 0) -> str:
    """A share in per cent."""
    return f"{100 * share:.{digits}f}{THIN}%".replace("-", "\u2212") if finite(share) else "-"


def sparsity(value: float) -> str:
    """A sparsity in per cent, with the digits it was asked with."""
    return f"{round(100 * value, 4):g}{THIN}%"


def size(value: float) -> str:
    """Bytes with a binary unit."""
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= limit:
            return f"{value / limit:.3g}{THIN}{unit}" if value < 1000 * limit else f"{value / limit:.0f}{THIN}{unit}"
    return f"{value:.0f}{THIN}B"


def span(values: Iterable[Any], show: Callable[[float], str]) -> str:
    """`low` or `low to high`, each through `show`; a dash for none."""
    numbers = [v for v in values if finite(v)]
    if not numbers:
        return "-"
    low, high = show(min(numbers)), show(max(numbers))
    return low if low == high else f"{low} to {high}"


def listed(items: Sequence[str], most: int = 6) -> str:
    """`a, b and c`; after `most` items, how many more there are."""
    items = [str(i) for i in items]
    if len(items) > most:
        items = [*items[:most], f"{len(items) - most} more"]
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""


def several(n: int, one: str, many: str | None = None) -> str:
    """`1 document`, `2 documents`."""
    return f"{n} {one if n == 1 else many or one + 's'}"
