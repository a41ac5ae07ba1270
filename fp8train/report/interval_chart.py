"""Chart of the gaps: for every arm a circle for each seed, the interval of their mean, and the margin behind."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Sequence

import numpy as np

from fp8train.report.charts import key
from fp8train.report.drawing import GRID, MUTED, SERIES, Drawing, ticks
from fp8train.report.page import typeset

ROW = 64  # pixels


@dataclasses.dataclass(kw_only=True, slots=True)
class Gaps:
    """One row: label, colour slot, a value for each seed, mean and interval (None for one seed), words for it."""

    label: str
    slot: int
    values: list[float]
    mean: float
    low: float | None
    high: float | None
    words: str


def interval_chart(rows: Sequence[Gaps], *, title: str, x_label: str, margin: float) -> str:
    """Rows from the top, on one scale with zero and the band of +-margin.

    Args:
        title: text alternative: what the chart shows, with its main number.

    Returns:
        str: one element.
    """
    edges = [edge for row in rows for edge in (*row.values, row.low, row.high) if edge is not None]
    reach = 1.08 * max([1.5 * margin, *(abs(edge) for edge in edges if math.isfinite(edge))])
    drawing = Drawing((-reach, reach), (len(rows), 0.0))
    whole = np.array([0.0, len(rows)])
    drawing.box((-margin, margin), (len(rows), 0.0), GRID, opacity=0.8)
    drawing.line(np.zeros(2), whole, MUTED, width=1)
    drawing.line(np.array([-reach, reach]), np.full(2, float(len(rows))), MUTED, width=1)
    names = []
    for index, row in enumerate(rows):
        color = SERIES[row.slot]
        if row.low is not None and row.high is not None:
            ends, at = np.array([row.low, row.high]), np.full(2, index + 0.56)
            drawing.line(ends, at, color, width=7, opacity=0.45)
        drawing.dots(np.array([row.mean]), np.array([index + 0.56]), color, filled=True)
        drawing.dots(np.array(row.values), np.full(len(row.values), index + 0.82), color)
        words = (
            f'<span class="row" style="top:{ROW * index + 3}px">{html.escape(row.label)}: {typeset(row.words)}</span>'
        )
        names.append(words)
    return drawing.html(
        title,
        height=ROW * len(rows),
        head=f'<div class="head">{key([(GRID, typeset(f"margin +-{margin:g} %"))])}</div>',
        x_ticks=[(at, _signed(at)) for at in ticks(-reach, reach, 6)],
        x_name=x_label,
        rows="".join(names),
        kind="rows",
    )


def _signed(value: float) -> str:
    return "0" if abs(value) < 1e-12 else f"{value:+.3g}".replace("-", "\u2212")
