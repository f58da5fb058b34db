"""Formats of numbers, for the terminal, the tables, `compare`, `check`, the report and the paper."""

from __future__ import annotations

import math
from functools import partial
from typing import TypeGuard

from dart_eval.results import metrics

NO_NUMBER = "no number"  # for a metric whose answers were NaN or infinite


def number(value: float, digits: int | None = None) -> str:
    """A metric's value: four digits after the point below 10, two below 100, one beyond."""
    return f"{value:.{_digits(value) if digits is None else digits}f}"


THREE, FOUR = partial(number, digits=3), partial(number, digits=4)


def _digits(value: float) -> int:
    return 4 if abs(value) < 10 else 1 if abs(value) >= 100 else 2


def with_error(metric: str, value: float, stderr: float | None) -> str:
    """A value and its standard error, with equally many digits."""
    if not math.isfinite(value):
        return NO_NUMBER
    known = metrics.kind_of(metric).digits
    digits = _digits(value) if known is None else known
    text = number(value, digits)
    return text if stderr is None or math.isnan(stderr) else f"{text} ± {number(stderr, digits)}"


def short(metric: str, value: float, stderr: float | None) -> str:
    """Format a value and its standard error briefly: shares in per cent, `44.0 ±5.0`.

    A perplexity of a million and more, of a broken model, is written `8.4e9 ±3.7e9`.
    """
    if not math.isfinite(value):
        return NO_NUMBER
    scale = 100.0 if metrics.kind_of(metric).percent else 1.0
    digits = 1 if scale > 1 or abs(value) >= 10 else 2

    def text(x: float) -> str:
        return _power(x) if abs(value) >= 1e6 else f"{scale * x:.{digits}f}"

    return text(value) if stderr is None or math.isnan(stderr) else f"{text(value)} ±{text(stderr)}"


def _power(value: float) -> str:
    """`8.4e9`; `inf`."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def chance(p: float | None) -> str:
    """A p-value."""
    return "-" if p is None else "< .0001" if p < 1e-4 else f"{p:.4f}"


def signed(value: float) -> str:
    """A difference: `+0.0300`."""
    return f"{value:+.4f}"


def interval(low: float | None, high: float | None) -> str:
    """The ends of an interval of a difference."""
    return "-" if low is None or high is None else f"{signed(low)} to {signed(high)}"


def sparsity(value: float) -> str:
    """A sparsity as people say it: `70 %`."""
    return f"{100 * value:.4g} %"


def percent(value: float, *ends: float) -> str:
    """A share of 1 in whole per cent, with the ends of its interval: `30 %`, `30 % [25, 36]`."""
    whole, *others = (f"{round(100 * x) + 0}" for x in (value, *ends))
    return f"{whole} %" + (f" [{', '.join(others)}]" if others else "")


def multiple(value: float, *ends: float) -> str:
    """Format a multiple, with the ends of its interval: `1.08x [1.07, 1.10]`, `29.8x`, `2.1e7x`."""
    if not math.isfinite(value):
        return NO_NUMBER
    digits = 3 if abs(value - 1) < 0.0495 else 2 if value < 10 else 1 if value < 100 else 0
    texts = [f"{x:.{digits}f}" if x < 1e4 else _power(x) for x in (value, *ends)]
    return f"{texts[0]}x" + (f" [{', '.join(texts[1:])}]" if ends else "")


def size(value: float, unit: str = "B") -> str:
    """A count or bytes as `9.7 MB`, `180 kB`: two digits, or all before the point."""
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.{1 if value < 10 * limit else 0}f} {prefix}{unit}"
    return f"{value:.0f} {unit}".rstrip()


def small_share(value: float) -> str:
    """A share that is often tiny, in per cent: `0.12 %`, `< 0.01 %`."""
    digits = ".0f" if value >= 0.995 else ".2g"
    return "0 %" if value == 0 else "< 0.01 %" if value < 1e-4 else f"{100 * value:{digits}} %"


def finite(value: object) -> TypeGuard[float]:
    """Whether `value` is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
