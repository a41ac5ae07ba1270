"""Charts of the report: curves over steps and bars, each with its key, as HTML.

Long runs are thinned so that no extreme is lost.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fp8train.report.drawing import GRID, MUTED, SERIES, Drawing, ticks
from fp8train.report.page import typeset

Range = tuple[float, float]
POINTS = 1200  # vertices of a thinned curve: more than the pixels that it covers


@dataclasses.dataclass(kw_only=True, slots=True)
class Curve:
    """One line of a chart.

    label: its name in the key; '' for what belongs to another line. slot: number of its colour. steps, values: [n],
    NaN where there is none; steps may be another quantity that rises.
    faint: drawn behind, as a thin line; as the range from lowest to highest where it has many points. markers: only
    points, no line. dashed: for a constant.
    wide: a broad pale line, which stays visible beneath another. band: lowest and highest value at each step, shaded.
    """

    label: str
    slot: int
    steps: np.ndarray
    values: np.ndarray
    faint: bool = False
    markers: bool = False
    dashed: bool = False
    wide: bool = False
    band: tuple[np.ndarray, np.ndarray] | None = None


@dataclasses.dataclass(kw_only=True, slots=True)
class Bar:
    """One row of a bar chart: name, length as a share of the whole, colour slot, words beside it."""

    label: str
    share: float
    slot: int
    words: str


def line_chart(
    curves: Sequence[Curve],
    *,
    title: str,
    y_label: str,
    x_label: str = "step",
    x_integer: bool = True,
    height: int = 280,
    y_range: Range | None = None,
    band: tuple[float, float, str] | None = None,
    y_format: Callable[[float], str] = "{:,g}".format,
) -> str:
    """Curves over steps.

    Args:
        title: text alternative: what the chart shows, with its main number.
        y_label: quantity and unit, written above the axis.
        x_integer: ticks at whole numbers only.
        height: pixels between the axes.
        band: (low, high, words): a range of values to read the curves against, shaded; with it a line at zero is drawn.
        y_range: what the axis spans; None fits it to the values.

    Returns:
        str: one element.
    """
    x_range, y_range = _frame(curves, y_range)
    drawing = Drawing(x_range, y_range)
    marks = ticks(*y_range, 6)
    if band is not None:
        drawing.box(x_range, band[:2], GRID, opacity=0.8)
    for mark in marks:
        drawing.line(np.array(x_range), np.array([mark] * 2), GRID, width=1)
    if band is not None:
        drawing.line(np.array(x_range), np.zeros(2), MUTED, width=1)
    # from behind to the front
    for curve in sorted(curves, key=lambda curve: 3 * curve.markers + 2 * (not curve.faint) - curve.wide):
        _draw(drawing, curve)
    drawing.line(np.array(x_range), np.array([y_range[0]] * 2), MUTED, width=1)
    named = [(SERIES[curve.slot], html.escape(curve.label)) for curve in curves if curve.label]
    named += [(GRID, band[2])] if band is not None else []
    return drawing.html(
        title,
        height=height,
        head=f'<div class="head"><span>{typeset(y_label)}</span>{key(named)}</div>',
        x_ticks=[(mark, f"{mark:,g}") for mark in ticks(*x_range, 6, whole=x_integer)],
        y_ticks=[(mark, y_format(mark)) for mark in marks],
        x_name=x_label,
    )


def key(named: Sequence[tuple[str, str]]) -> str:
    """The key of a chart: a swatch of each colour (CSS) and what it stands for (HTML)."""
    swatch = '<span class="key"><span class="swatch" style="background:{}"></span>{}</span>'
    return "".join(swatch.format(color, label) for color, label in named)


def bar_chart(bars: Sequence[Bar], *, title: str) -> str:
    """Bars on one common scale from 0 to 1, with their words beside them."""
    rows = (
        f'<div><span>{html.escape(bar.label)}</span><span class="bar"><i style="width:{100 * bar.share:.2f}%;'
        f'background:{SERIES[bar.slot]}"></i></span><span>{typeset(bar.words)}</span></div>'
        for bar in bars
    )
    label = html.escape(title, quote=True)
    return f'<div class="chart bars" role="img" aria-label="{label}">{"".join(rows)}</div>'


def thin(steps: np.ndarray, values: np.ndarray, points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Fewer vertices for the same picture: of every run of steps its first, lowest, highest and last point stay.

    Args:
        steps, values: [n]; values may hold NaN (a gap), which stays a gap where a whole run of steps has no value.

    Returns:
        steps, values: at most `points` of them, in order; unchanged where there are no more than that.
    """
    if len(steps) <= points:
        return steps, values
    kept: list[int] = []
    for start, stop in _runs(len(steps), max(1, points // 4)):
        window = values[start:stop]
        if np.isfinite(window).any():
            kept += sorted({start, start + int(np.nanargmin(window)), start + int(np.nanargmax(window)), stop - 1})
        else:
            kept.append(start)
    index = np.array(kept)
    return steps[index], values[index]


def envelope(
    steps: np.ndarray, values: np.ndarray, bins: int = POINTS // 2
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lowest and highest value of every run of steps: (first step of each run, lowest, highest); runs without a
    value are left out.
    """
    rows = [
        (steps[start], np.nanmin(values[start:stop]), np.nanmax(values[start:stop]))
        for start, stop in _runs(len(steps), bins)
        if np.isfinite(values[start:stop]).any()
    ]
    at, low, high = zip(*rows, strict=True) if rows else ((), (), ())
    return np.array(at), np.array(low), np.array(high)


def band_outline(
    steps: np.ndarray, low: np.ndarray, high: np.ndarray, bins: int = POINTS // 2
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A band with fewer vertices that still covers all of it: as it is where there are no more than `bins`."""
    if len(steps) <= bins:
        return steps, low, high
    at, lowest, _ = envelope(steps, low, bins)
    _, _, highest = envelope(steps, high, bins)
    return at, lowest, highest


def _runs(count: int, bins: int) -> Iterator[tuple[int, int]]:
    """`count` indices cut into at most `bins` runs of nearly equal length."""
    edges = np.linspace(0, count, min(bins, count) + 1).astype(int).tolist()
    return zip(edges[:-1], edges[1:], strict=True)


def _draw(drawing: Drawing, curve: Curve) -> None:
    color = SERIES[curve.slot]
    if curve.markers:
        drawing.dots(curve.steps, curve.values, color)
        return
    if curve.band is not None:
        drawing.area(*band_outline(curve.steps, *curve.band), color, opacity=0.2)
    if curve.faint and len(curve.steps) > POINTS:
        drawing.area(*envelope(curve.steps, curve.values), color, opacity=0.22)
        return
    steps, values = thin(curve.steps, curve.values)
    width, opacity = (0.9, 0.4) if curve.faint else (6.0, 0.5) if curve.wide else (2.0, 1.0)
    drawing.line(steps, values, color, width=width, opacity=opacity, dashed=curve.dashed)


def _frame(curves: Sequence[Curve], y_range: Range | None) -> tuple[Range, Range]:
    """Axis limits: all steps, and the range asked for or else all values (faint ones count, so that none is cut off
    in secret).
    """
    steps = np.concatenate([curve.steps for curve in curves if len(curve.steps)] or [np.array([0, 1])])
    x_range = (min(0.0, float(steps.min())), max(float(steps.max()), 1.0))
    values = [part for curve in curves for part in (curve.values, *(curve.band or ()))]
    return x_range, y_range or spanning(values) or (0.0, 1.0)


def spanning(values: Sequence[np.ndarray]) -> Range | None:
    """A range that shows every value, with a margin; None where none is finite."""
    finite = np.concatenate([part[np.isfinite(part)] for part in values] or [np.array([])])
    if not len(finite):
        return None
    low, high = float(finite.min()), float(finite.max())
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def nice_range(values: Sequence[np.ndarray], *, least: float) -> Range:
    """A range symmetric about zero that shows every value, at least +-`least`."""
    highest = max((float(np.nanmax(np.abs(part))) for part in values if np.isfinite(part).any()), default=0.0)
    reach = max(least, highest if math.isfinite(highest) else 0.0) * 1.15
    return -reach, reach
