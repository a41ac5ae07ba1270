"""Chart of the gaps: for every arm a dot for each seed, the interval of their mean, and the margin behind."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fp8train.report.charts import WIDTH
from fp8train.report.svg import GRID, INK, MUTED, PAPER, SERIES, TEXT_SIZE, style, to_inline

LEFT, RIGHT, TOP, BOTTOM, ROW = 150, 172, 30, 34, 58


@dataclasses.dataclass(kw_only=True, slots=True)
class Gaps:
    """One row: label at its left, colour slot, a value for each seed, mean and interval (None for one seed), words at
    its right.
    """

    label: str
    slot: int
    values: list[float]
    mean: float
    low: float | None
    high: float | None
    words: str


def interval_chart(rows: Sequence[Gaps], *, name: str, title: str, x_label: str, margin: float) -> str:
    """Rows from the top, on one scale with zero and the band of +-margin.

    Args:
        name: prefix of the element ids, unique on the page.
        title: text alternative: what the chart shows, with its main number.

    Returns:
        str: one <svg> element.
    """
    height = TOP + BOTTOM + ROW * len(rows)
    edges = [edge for row in rows for edge in (*row.values, row.low, row.high) if edge is not None]
    reach = 1.08 * max([1.5 * margin, *(abs(edge) for edge in edges if math.isfinite(edge))])
    with style():
        figure = Figure(figsize=(WIDTH / 72, height / 72))
        axes = figure.add_axes(
            (LEFT / WIDTH, BOTTOM / height, (WIDTH - LEFT - RIGHT) / WIDTH, (height - TOP - BOTTOM) / height)
        )
        axes.set_xlim(-reach, reach)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        for side in ("top", "left", "right"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(MUTED)
        axes.set_yticks([])
        axes.tick_params(axis="x", colors=MUTED, length=0, pad=6, labelsize=TEXT_SIZE)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _signed(value)))
        axes.axvspan(-margin, margin, color=GRID, alpha=0.7, linewidth=0, zorder=0.5)
        axes.axvline(0, color=MUTED, linewidth=1, zorder=1)
        at: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "color": MUTED}
        axes.annotate(x_label, (0, 1), xytext=(-LEFT + 2, 14), va="baseline", **at)
        axes.annotate(f"margin \u00b1{margin:g}\u202f%", (0.5, 1), xytext=(0, 14), va="baseline", ha="center", **at)
        for index, row in enumerate(rows):
            color = SERIES[row.slot % len(SERIES)]
            if row.low is not None and row.high is not None:
                axes.plot([row.low, row.high], [index - 0.14] * 2, color=color, linewidth=7, alpha=0.45, zorder=2)
            axes.plot([row.mean], [index - 0.14], marker="D", markersize=7, color=color, zorder=4)
            axes.plot(
                row.values, [index + 0.2] * len(row.values), linestyle="none", marker="o", markersize=6, zorder=3,
                markerfacecolor=PAPER, markeredgecolor=color, markeredgewidth=1.6,
            )  # fmt: skip
            middle: dict[str, Any] = {"textcoords": "offset points", "va": "center_baseline"}
            axes.annotate(row.label, (-reach, index), xytext=(-12, 0), ha="right", color=INK, **middle)
            axes.annotate(row.words, (reach, index), xytext=(12, 0), ha="left", color=INK, **middle)
        return to_inline(figure, name, title)


def _signed(value: float) -> str:
    return "0" if abs(value) < 1e-12 else f"{value:+.3g}".replace("-", "\u2212")
