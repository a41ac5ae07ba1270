"""From a matplotlib figure to one inline <svg> element: the page's font, CSS variables for colours, few digits."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

TEXT_SIZE = 12.5

# Colours exist only as placeholders while matplotlib draws; `_to_inline` replaces them by CSS variables.
INK, MUTED, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
SERIES = tuple(f"#0a0a{index:02x}" for index in range(6))
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"} | {
    color: f"--series-{index}" for index, color in enumerate(SERIES)
}


@contextmanager
def style() -> Iterator[None]:
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "fp8train",  # ids without chance: the same numbers give the same file
        "font.family": "sans-serif",
        "font.size": TEXT_SIZE,
        "path.simplify": False,
        "axes.unicode_minus": True,
    }
    with matplotlib.rc_context(settings):
        yield


def to_inline(figure: Figure, name: str, title: str) -> str:
    """The figure as one <svg> element: no fixed size, the page's font, CSS variables for colours, ids of its own."""
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # one property, `font`, before matplotlib 3.10
    text = re.sub(r"font: (?:(bold|\d+) )?([\d.]+)px [^;\"]*", r"font-size: \2px; font-weight: \1", text)
    text = re.sub(r"font-family: [^;\"]*;\s*", "", text).replace("font-weight: ;", "")
    text = re.sub(r' transform="rotate\(-?0 [^"]*\)"', "", text)
    # matplotlib's style sheet holds a rule for `*`, which would reach the whole page
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    # the figure's transparent background
    text = re.sub(r"<g id=\"patch_1\">.*?</g>\s*", "", text, count=1, flags=re.DOTALL)
    for color, variable in VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    text = re.sub(r'(\bid="|href="#|url\(#)', lambda match: f"{match[1]}{name}-", text)
    head = re.match(r"<svg[^>]*>", text)
    view = re.search(r'viewBox="[^"]*"', text)
    assert head is not None and view is not None
    label = html.escape(title, quote=True)
    opening = f'<svg {view[0]} class="chart" role="img" aria-label="{label}" stroke-linejoin="round">'
    return opening + _shorter(text[head.end() :].strip())


def _shorter(text: str) -> str:
    """Coordinates with two decimals (a hundredth of a pixel) instead of six."""
    return re.sub(r"-?\d+\.\d{3,}", lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."), text)
