"""Charts of the report: inline SVG whose colours are CSS variables, so that one drawing serves a light and a dark page.

Text stays text (it takes the page's font and can be selected); long runs are thinned so that no extreme is lost.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fp8train.report.svg import GRID, INK, MUTED, PAPER, SERIES, TEXT_SIZE, style, to_inline

WIDTH = 920  # SVG units; one unit is one CSS pixel on a wide screen
LEFT, RIGHT = 72, 150  # margins for tick labels and for the direct labels at the curves' ends
TOP, BOTTOM = 34, 30  # margins for the axis name and for the steps
POINTS = 1200  # vertices of a thinned curve: more than the pixels that it covers
LABEL_GAP = 16  # least distance between two direct labels, in SVG units


@dataclasses.dataclass(kw_only=True, slots=True)
class Curve:
    """One line of a chart.

    label: direct label at its end. slot: number of its colour. steps, values: [n], NaN where there is none; steps may
    be another quantity that rises.
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
class Bars:
    """One row of stacked bars: label at its left, `parts` of (share or amount, colour slot or None for neutral, text
    inside).
    """

    label: str
    parts: list[tuple[float, int | None, str]]


def line_chart(
    curves: Sequence[Curve],
    *,
    name: str,
    title: str,
    y_label: str,
    x_label: str = "step",
    x_integer: bool = True,
    height: int = 320,
    y_range: tuple[float, float] | None = None,
    band: tuple[float, float, str] | None = None,
    y_format: Callable[[float], str] | None = None,
) -> str:
    """Curves over steps, each labelled at its end.

    Args:
        name: prefix of the element ids, unique on the page.
        title: text alternative: what the chart shows, with its main number.
        y_label: quantity and unit, written above the axis.
        x_integer: ticks at whole numbers only.
        band: (low, high, words): a range of values to read the curves against, shaded; with it a line at zero is drawn.
        y_range: what the axis spans; None fits it to the values.

    Returns:
        str: one <svg> element.
    """
    with style():
        figure = Figure(figsize=(WIDTH / 72, height / 72))
        axes = _axes(figure, height)
        for curve in curves:
            _draw(axes, curve)
        _frame(axes, curves, y_range)
        if band is not None:
            axes.axhspan(band[0], band[1], color=GRID, alpha=0.7, linewidth=0, zorder=0.5)
            axes.axhline(0, color=MUTED, linewidth=1, zorder=1.5)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
        if y_format is not None:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: y_format(value)))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=x_integer, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if x_integer else f"{value:,g}"))
        axes.annotate(
            y_label,
            (0, 1),
            xycoords="axes fraction",
            xytext=(-LEFT + 2, 14),
            textcoords="offset points",
            color=MUTED,
            va="baseline",
        )
        axes.annotate(
            x_label,
            (1, 0),
            xycoords="axes fraction",
            xytext=(34, -17.5),
            textcoords="offset points",
            color=MUTED,
            va="baseline",
        )
        _label_ends(axes, curves, band, height)
        return to_inline(figure, name, title)


def bar_chart(rows: Sequence[Bars], *, name: str, title: str, total: float, row_height: int = 34) -> str:
    """Horizontal stacked bars on one common scale from 0 to `total`, with their numbers written inside."""
    height = row_height * len(rows) + 8
    with style():
        figure = Figure(figsize=(WIDTH / 72, height / 72))
        left = 150
        axes = figure.add_axes((left / WIDTH, 0, (WIDTH - left) / WIDTH, 1))
        axes.set_axis_off()
        axes.set_xlim(0, total)
        axes.set_ylim(len(rows) - 0.5 + 4 / row_height, -0.5 - 4 / row_height)
        for index, row in enumerate(rows):
            start = 0.0
            for amount, slot, text in row.parts:
                color = GRID if slot is None else SERIES[slot % len(SERIES)]
                axes.barh(index, amount, left=start, height=0.66, color=color, linewidth=0)
                wide = amount / total * (WIDTH - left) > 7.5 * len(text) + 14
                if text and (wide or start + amount < total * 0.8):
                    inside = INK if slot is None else PAPER
                    axes.annotate(
                        text,
                        (start + (0 if wide else amount), index),
                        xytext=(8, 0),
                        textcoords="offset points",
                        color=inside if wide else INK,
                        va="center_baseline",
                    )
                start += amount
            axes.annotate(
                row.label,
                (0, index),
                xytext=(-12, 0),
                textcoords="offset points",
                color=INK,
                ha="right",
                va="center_baseline",
            )
        return to_inline(figure, name, title)


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


def spread_labels(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions as close to the wanted ones as a least distance allows; the order stays."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    groups: list[
        list[float]
    ] = []  # [sum of (wanted - own offset), members]: a group is placed as one, at the mean of what its members want
    for index in order:
        groups.append([wanted[index], 1])
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] + gap * groups[-2][1] > groups[-1][0] / groups[-1][1]:
            total, members = groups.pop()
            groups[-1][0] += total - gap * groups[-1][1] * members
            groups[-1][1] += members
    placed = [total / members + gap * position for total, members in groups for position in range(int(members))]
    result = [0.0] * len(wanted)
    for index, position in zip(order, placed, strict=True):
        result[index] = position
    return result


def _runs(count: int, bins: int) -> Iterator[tuple[int, int]]:
    """`count` indices cut into at most `bins` runs of nearly equal length."""
    edges = np.linspace(0, count, min(bins, count) + 1).astype(int).tolist()
    return zip(edges[:-1], edges[1:], strict=True)


def _draw(axes: Axes, curve: Curve) -> None:
    color = SERIES[curve.slot % len(SERIES)]
    if curve.markers:
        axes.plot(
            curve.steps,
            curve.values,
            linestyle="none",
            marker="o",
            markersize=6,
            markerfacecolor=PAPER,
            markeredgecolor=color,
            markeredgewidth=1.6,
            zorder=4,
            clip_on=False,
        )
        return
    if curve.band is not None:
        at, low, high = band_outline(curve.steps, *curve.band)
        axes.fill_between(at, low, high, color=color, alpha=0.2, linewidth=0, zorder=1.6)
    if curve.faint and len(curve.steps) > POINTS:
        at, low, high = envelope(curve.steps, curve.values)
        axes.fill_between(at, low, high, color=color, alpha=0.22, linewidth=0, zorder=1.8)
        return
    steps, values = thin(curve.steps, curve.values)
    axes.plot(
        steps,
        values,
        color=color,
        linewidth=0.8 if curve.faint else 6.0 if curve.wide else 1.8,
        alpha=0.38 if curve.faint else 0.5 if curve.wide else 1.0,
        linestyle=(0, (5, 3)) if curve.dashed else "solid",
        zorder=2 if curve.faint else 2.5 if curve.wide else 3,
        solid_capstyle="round",
        solid_joinstyle="round",
    )


def _axes(figure: Figure, height: int) -> Axes:
    axes = figure.add_axes(
        (LEFT / WIDTH, BOTTOM / height, (WIDTH - LEFT - RIGHT) / WIDTH, (height - TOP - BOTTOM) / height)
    )
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.grid(axis="y", color=GRID, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(axis="both", colors=MUTED, length=0, pad=6, labelsize=TEXT_SIZE)
    return axes


def _frame(axes: Axes, curves: Sequence[Curve], y_range: tuple[float, float] | None) -> None:
    """Axis limits: all steps, and the range asked for or else all values (faint ones count, so that none is cut off
    in secret).
    """
    steps = np.concatenate([curve.steps for curve in curves if len(curve.steps)] or [np.array([0, 1])])
    axes.set_xlim(min(0, steps.min()), max(steps.max(), 1))
    if y_range is None:
        parts = [part for curve in curves for part in (curve.values, *(curve.band or ()))]
        values = np.concatenate([part[np.isfinite(part)] for part in parts] or [np.array([])])
        low, high = (values.min(), values.max()) if len(values) else (0.0, 1.0)
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        y_range = (low - margin, high + margin)
    axes.set_ylim(*y_range)


def _label_ends(axes: Axes, curves: Sequence[Curve], band: tuple[float, float, str] | None, height: int) -> None:
    """Write each label beside the last value of its curve, moved apart where two would overlap; the band's at its
    upper edge.
    """
    ends = [(band[2], MUTED, band[1], "normal")] if band is not None else []
    for curve in curves:
        finite = np.flatnonzero(np.isfinite(curve.values))
        if curve.label and len(finite):
            ends.append((curve.label, SERIES[curve.slot % len(SERIES)], float(curve.values[finite[-1]]), "bold"))
    low, high = axes.get_ylim()
    units = height - TOP - BOTTOM
    wanted = [(min(max(value, low), high) - low) / (high - low) * units for _, _, value, _ in ends]
    for (label, color, _, weight), position in zip(ends, spread_labels(wanted, LABEL_GAP), strict=True):
        axes.annotate(
            label,
            (1, position / units),
            xycoords="axes fraction",
            xytext=(10, 0),
            textcoords="offset points",
            color=color,
            va="center_baseline",
            fontweight=weight,
            annotation_clip=False,
        )


def nice_range(values: Sequence[np.ndarray], *, least: float) -> tuple[float, float]:
    """A range symmetric about zero that shows every value, at least +-`least`."""
    highest = max((float(np.nanmax(np.abs(part))) for part in values if np.isfinite(part).any()), default=0.0)
    reach = max(least, highest if math.isfinite(highest) else 0.0) * 1.15
    return -reach, reach
