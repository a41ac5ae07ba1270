"""Drawings that fit any width: an SVG that is stretched while its strokes are not, and text as HTML around it.

So one drawing serves a wide screen, a phone and paper, and its letters are as large as those of the page. Colours are
CSS variables, so that it serves a light and a dark page as well.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import numpy as np

SIZE = 1000  # units of the SVG, either way
MUTED, GRID, PAPER, ALERT = (f"var(--{name})" for name in ("muted", "grid", "paper", "alert"))
SERIES = tuple(f"var(--series-{index})" for index in range(6))


class Drawing:
    """Shapes over a range of x and a range of y, in the order in which they are drawn.

    Args:
        x_range, y_range: (value at the left or lower edge, value at the right or upper edge); they differ.
    """

    def __init__(self, x_range: tuple[float, float], y_range: tuple[float, float]) -> None:
        self.x_range, self.y_range = x_range, y_range
        self._inside: list[str] = []  # cut off at the edges
        self._above: list[str] = []

    def line(
        self, xs: np.ndarray, ys: np.ndarray, color: str, *, width: float, opacity: float = 1.0, dashed: bool = False
    ) -> None:
        """A line through points, `width` pixels wide; a NaN is a gap in it."""
        good = np.isfinite(ys)
        begins = good & ~np.append(False, good[:-1])
        parts = (
            f"{'M' if begin else ''}{x:g} {y:g}"
            for x, y, begin in zip(self._x(xs)[good], self._y(ys)[good], begins[good], strict=True)
        )
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self._inside.append(
            f'<path d="{" ".join(parts)}" fill="none" stroke="{color}" stroke-width="{width:g}" '
            f'stroke-opacity="{opacity:g}" stroke-linecap="round" stroke-linejoin="round"{dashes}/>'
        )

    def area(self, xs: np.ndarray, low: np.ndarray, high: np.ndarray, color: str, *, opacity: float) -> None:
        """What lies between two curves over the same x; points without a value are left out."""
        good = np.isfinite(low) & np.isfinite(high)
        there = self._x(xs)[good]
        around = np.concatenate([there, there[::-1]])
        heights = np.concatenate([self._y(low)[good], self._y(high)[good][::-1]])
        points = " ".join(f"{x:g} {y:g}" for x, y in zip(around, heights, strict=True))
        self._inside.append(f'<polygon points="{points}" fill="{color}" fill-opacity="{opacity:g}"/>')

    def box(
        self, x_range: tuple[float, float], y_range: tuple[float, float], color: str, *, opacity: float, edge: str = ""
    ) -> None:
        """A rectangle, with a line around it of the colour `edge`."""
        (left, right), (bottom, top) = self._x(np.array(x_range)), self._y(np.array(y_range))
        outline = f' stroke="{edge}" stroke-width="2"' if edge else ""
        self._inside.append(
            f'<rect x="{left:g}" y="{top:g}" width="{right - left:g}" height="{bottom - top:g}" fill="{color}" '
            f'fill-opacity="{opacity:.2f}"{outline}/>'
        )

    def dots(self, xs: np.ndarray, ys: np.ndarray, color: str, *, filled: bool = False) -> None:
        """Circles, which stay round; none where there is no value, or outside the range of y."""
        low, high = sorted(self.y_range)
        shown = np.isfinite(ys) & (ys >= low) & (ys <= high)
        points = "".join(f"M{x:g} {y:g}h0" for x, y in zip(self._x(xs)[shown], self._y(ys)[shown], strict=True))
        rings = [(color, 11)] if filled else [(color, 9), (PAPER, 5.5)]
        self._above += [
            f'<path d="{points}" stroke="{ring}" stroke-width="{width:g}" stroke-linecap="round"/>'
            for ring, width in rings
            if points
        ]

    def html(
        self,
        title: str,
        *,
        height: int,
        head: str = "",
        x_ticks: Sequence[tuple[float, str]] = (),
        y_ticks: Sequence[tuple[float, str]] = (),
        x_name: str = "",
        rows: str = "",
        kind: str = "",
    ) -> str:
        """The drawing as an element of the page.

        Args:
            title: text alternative: what it shows, with its main number.
            height: pixels.
            head, rows: HTML above the drawing, and over it.
            x_ticks, y_ticks: values and their words.
            x_name: quantity and unit below the axis.
            kind: a further class of the style.
        """
        across = "".join(f'<span style="left:{self._x(at) / 10:g}%">{text}</span>' for at, text in x_ticks)
        up = "".join(f'<span style="top:{self._y(at) / 10:g}%">{html.escape(text)}</span>' for at, text in y_ticks)
        return (
            f'<div class="chart {kind}" role="img" aria-label="{html.escape(title, quote=True)}">{head}'
            f'<div class="plot" style="height:{height}px"><svg viewBox="0 0 {SIZE} {SIZE}" preserveAspectRatio="none" '
            f'aria-hidden="true"><svg>{"".join(self._inside)}</svg>{"".join(self._above)}</svg>'
            f'<div class="y">{up}</div><div class="x">{across}<b>{html.escape(x_name)}</b></div>{rows}</div></div>'
        )

    def _x(self, values: float | np.ndarray) -> np.ndarray:
        low, high = self.x_range
        return np.round((np.asarray(values, dtype=np.float64) - low) / (high - low) * SIZE, 1)

    def _y(self, values: float | np.ndarray) -> np.ndarray:
        low, high = self.y_range
        return np.round((high - np.asarray(values, dtype=np.float64)) / (high - low) * SIZE, 1)


def ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """Multiples of 1, 2, 2.5 or 5 times a power of ten within a range, as many as there can be up to `most`.

    Args:
        whole: whole numbers only.
    """
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    sizes = [size * power for size in (1, 2, 2.5, 5, 10, 20, 25, 50)]
    step = next(size for size in sizes if size >= rough and not (whole and size % 1))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]
