"""Charts: thinning loses no extreme, labels never overlap, the SVG takes its colours from the page."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from fp8train.report.charts import (
    LABEL_GAP,
    Bars,
    Curve,
    bar_chart,
    envelope,
    line_chart,
    nice_range,
    spread_labels,
    thin,
)


def noisy(count: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(1, count + 1), np.random.default_rng(0).normal(2.0, 0.1, count)


def test_thinning_keeps_a_spike_of_one_step() -> None:
    steps, values = noisy(100_000)
    values[54_321], values[99_998] = 9.0, -9.0
    few_steps, few_values = thin(steps, values, points=1200)
    assert len(few_steps) <= 1200 and np.all(np.diff(few_steps) > 0)
    assert few_values.max() == 9.0 and few_values.min() == -9.0
    assert few_steps[np.argmax(few_values)] == 54_322
    assert (few_values[0], few_values[-1]) == (values[0], values[-1])


def test_short_curve_is_not_thinned() -> None:
    steps, values = noisy(300)
    assert thin(steps, values)[1] is values


def test_gap_of_a_whole_run_of_steps_stays_a_gap() -> None:
    steps, values = noisy(10_000)
    values[4000:6000] = np.nan
    few_steps, few_values = thin(steps, values, points=400)
    assert np.isnan(few_values[(few_steps > 4100) & (few_steps < 5900)]).all()


def test_envelope_holds_every_value() -> None:
    steps, values = noisy(10_000)
    at, low, high = envelope(steps, values, bins=100)
    for start, lowest, highest, part in zip(at, low, high, np.split(values, 100), strict=True):
        assert lowest == part.min() and highest == part.max() and start in steps


@pytest.mark.parametrize(
    "wanted", [[10.0, 11.0], [50.0, 10.0, 12.0, 11.0], [5.0, 5.0, 5.0], [0.0, 100.0], [], [30.0, 17.0, 16.0, 15.0, 2.0]]
)
def test_labels_keep_order_and_distance(wanted: list[float]) -> None:
    placed = spread_labels(wanted, LABEL_GAP)
    order = np.argsort(wanted, kind="stable")
    assert np.all(np.diff(np.array(placed)[order]) >= LABEL_GAP - 1e-9)
    if len(wanted) > 1 and np.all(np.diff(np.sort(wanted)) >= LABEL_GAP):
        assert placed == wanted


def chart(**changes: object) -> str:
    steps, values = noisy(300)
    curves = [
        Curve(label="", slot=0, steps=steps, values=values, faint=True),
        Curve(label="BF16", slot=0, steps=steps, values=values, wide=True),
        Curve(label="FP8 <blockwise>", slot=1, steps=steps, values=values + 0.01),
        Curve(label="", slot=1, steps=steps[::100], values=values[::100], markers=True),
    ]
    options = {"name": "loss", "title": 'a "title"', "y_label": "nats per token"} | changes
    return line_chart(curves, **options)  # type: ignore[arg-type]


def test_svg_is_self_contained_and_follows_the_page() -> None:
    svg = chart(band=(-0.25, 0.25, "margin"))
    root = ElementTree.fromstring(svg.replace("xlink:href", "href"))
    assert root.attrib["role"] == "img" and root.attrib["aria-label"] == 'a "title"'
    assert not re.findall(r"#[0-9a-fA-F]{6}\b", svg), "a colour that the page cannot change"
    assert {"var(--series-0)", "var(--series-1)", "var(--paper)", "var(--muted)"} <= set(
        re.findall(r"var\(--[\w-]+\)", svg)
    )
    assert "http" not in svg and "font-family" not in svg and "<style" not in svg
    assert "FP8 &lt;blockwise&gt;" in svg, "text stays text"


def test_ids_carry_the_name_of_the_chart() -> None:
    svg = chart(name="speed")
    ids = re.findall(r'\bid="([^"]+)"', svg)
    assert ids and all(name.startswith("speed-") for name in ids) and len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg)) <= set(ids)


def test_same_numbers_give_the_same_drawing() -> None:
    assert chart() == chart()


def test_long_run_is_a_small_drawing() -> None:
    steps, values = noisy(100_000)
    svg = line_chart([Curve(label="x", slot=0, steps=steps, values=values)], name="n", title="t", y_label="y")
    assert len(svg) < 100_000


@pytest.mark.parametrize(
    "values", [np.array([]), np.array([np.nan, np.nan]), np.array([2.0, 2.0])], ids=["empty", "no number", "constant"]
)
def test_curve_without_extent_is_drawn(values: np.ndarray) -> None:
    curve = Curve(label="x", slot=0, steps=np.arange(1, len(values) + 1), values=values)
    ElementTree.fromstring(line_chart([curve], name="n", title="t", y_label="y").replace("xlink:href", "href"))


def test_bar_lengths_are_the_amounts() -> None:
    rows = [Bars(label="BF16", parts=[(1.0, 0, "one")]), Bars(label="FP8", parts=[(0.5, 1, "half"), (0.25, None, "")])]
    svg = bar_chart(rows, name="b", title="t", total=1.0)
    widths = []
    for path in re.findall(r'<path d="([^"]*)"[^>]*style="fill: var\(--(?:series|grid)', svg):
        corners = [float(x) for x in re.findall(r"[ML] (-?[\d.]+) ", path)]
        widths.append(max(corners) - min(corners))
    assert widths == pytest.approx([770, 385, 192.5], abs=0.02)  # coordinates carry two decimals


def test_symmetric_range_shows_every_value() -> None:
    assert nice_range([np.array([0.1, -2.0, np.nan])], least=0.5) == pytest.approx((-2.3, 2.3))
    assert nice_range([np.array([])], least=0.5) == pytest.approx((-0.575, 0.575))
