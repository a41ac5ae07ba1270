"""Numbers as text, with units, in plain ASCII; and which are numbers at all."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, TypeGuard

NOTHING = "-"
FLOP_UNITS = (" FLOP", " kFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP", " EFLOP", " ZFLOP")


def loss_text(nats: float | None) -> str:
    """A loss in nats, four decimals: `2.2704`."""
    return f"{nats:.4f}" if _present(nats) else NOTHING


def signed_text(value: float | None, digits: int = 4) -> str:
    """A difference with its sign: `+0.0027`; zero carries none."""
    if not _present(value):
        return NOTHING
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text


def percent_text(percent: float | None, *, digits: int = 2, signed: bool = False) -> str:
    """A percentage: `0.12 %`, signed `+0.12 %`."""
    if not _present(percent):
        return NOTHING
    return (signed_text(percent, digits) if signed else f"{percent:.{digits}f}") + " %"


def ratio_text(ratio: float | None) -> str:
    """A ratio: `0.71x`."""
    return f"{ratio:.2f}x" if _present(ratio) else NOTHING


def count_text(count: float | None) -> str:
    """A whole number with thousands separators: `1,228,800`."""
    return f"{count:,.0f}" if _present(count) else NOTHING


def short_count_text(count: float | None) -> str:
    """A count in three digits: `3.47 M`, `8.03 B`."""
    return _scaled(count, 1000.0, ("", " K", " M", " B", " T")) if _present(count) else NOTHING


def flops_text(flops: float | None) -> str:
    """Floating-point operations in three digits: `25.6 TFLOP`."""
    return _scaled(flops, 1000.0, FLOP_UNITS) if _present(flops) else NOTHING


def bytes_text(size: float | None) -> str:
    """A size in binary units: `1.31 GiB`."""
    return _scaled(size, 1024.0, (" B", " KiB", " MiB", " GiB", " TiB")) if _present(size) else NOTHING


def seconds_text(seconds: float | None) -> str:
    """A duration: `8.2 s`, `3 min 12 s`, `5 h 07 min`, `2 d 04 h`."""
    if not _present(seconds):
        return NOTHING
    if seconds < 59.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def finite(value: Any) -> float | None:
    """The number as a float; None where there is none or it is not finite."""
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None


def _present(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _scaled(value: float, base: float, units: tuple[str, ...]) -> str:
    """Three significant digits and the largest unit that leaves at least 1."""
    power = 0
    while power < len(units) - 1 and abs(value) >= base * 0.9995:  # 999.6 would print as 1000
        value, power = value / base, power + 1
    if power == 0:
        return f"{value:.0f}{units[0]}"
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}{units[power]}"
