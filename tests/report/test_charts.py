"""Charts: thinning loses no extreme, names are never cut off, colours come from the page."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from fp8train.report.charts import Bar, Curve, bar_chart, envelope, line_chart, nice_range, thin
from fp8train.report.drawing import ticks


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


def chart(**changes: object) -> str:
    steps, values = noisy(300)
    curves = [
        Curve(label="", slot=0, steps=steps, values=values, faint=True),
        Curve(label="BF16", slot=0, steps=steps, values=values, wide=True),
        Curve(label="FP8 <blockwise>", slot=1, steps=steps, values=values + 0.01),
        Curve(label="", slot=1, steps=steps[::100], values=values[::100], markers=True),
    ]
    options = {"title": 'a "title"', "y_label": "nats per token"} | changes
    return line_chart(curves, **options)  # type: ignore[arg-type]


def test_chart_is_self_contained_and_follows_the_page() -> None:
    text = chart(band=(-0.25, 0.25, "margin"))
    root = ElementTree.fromstring(text)
    assert root.attrib["role"] == "img" and root.attrib["aria-label"] == 'a "title"'
    assert not re.findall(r"#[0-9a-fA-F]{6}\b", text), "a colour that the page cannot change"
    assert {"var(--series-0)", "var(--series-1)", "var(--paper)", "var(--muted)"} <= set(
        re.findall(r"var\(--[\w-]+\)", text)
    )
    assert "http" not in text and "FP8 &lt;blockwise&gt;" in text


def test_names_of_the_lines_stand_above_the_chart_so_that_no_width_cuts_them_off() -> None:
    root = ElementTree.fromstring(chart(band=(-0.25, 0.25, "margin")))
    head, plot = root
    assert [entry.find("span").tail for entry in head.findall("span[@class='key']")] == [  # type: ignore[union-attr]
        "BF16",
        "FP8 <blockwise>",
        "margin",
    ]
    assert next(plot.iter("svg")).attrib["preserveAspectRatio"] == "none" and not list(plot.iter("text"))


def test_points_lie_where_their_values_are() -> None:
    steps, values = np.array([0, 50, 100]), np.array([1.0, 3.0, math.nan])
    curves = [Curve(label="", slot=1, steps=steps, values=values)]
    text = line_chart(curves, title="t", y_label="y", y_range=(1.0, 5.0))
    assert '<path d="M0 1000 500 500" fill="none" stroke="var(--series-1)"' in text
    assert '<span style="left:40%">40</span>' in text and '<span style="top:50%">3</span>' in text


@pytest.mark.parametrize(
    ("low", "high", "whole", "wanted"),
    [
        (0.0, 300.0, True, [0, 50, 100, 150, 200, 250, 300]),
        (-2.3, 2.3, False, [-2, -1, 0, 1, 2]),
        (0.0, 3.0, True, [0, 1, 2, 3]),
        (2.21, 2.29, False, [2.22, 2.24, 2.26, 2.28]),
    ],
)
def test_ticks_are_round_numbers_within_the_range(low: float, high: float, whole: bool, wanted: list[float]) -> None:
    assert ticks(low, high, 6, whole=whole) == pytest.approx(wanted)


def test_same_numbers_give_the_same_drawing() -> None:
    assert chart() == chart()


def test_long_run_is_a_small_drawing() -> None:
    steps, values = noisy(100_000)
    svg = line_chart([Curve(label="x", slot=0, steps=steps, values=values)], title="t", y_label="y")
    assert len(svg) < 100_000


@pytest.mark.parametrize(
    "values", [np.array([]), np.array([np.nan, np.nan]), np.array([2.0, 2.0])], ids=["empty", "no number", "constant"]
)
def test_curve_without_extent_is_drawn(values: np.ndarray) -> None:
    curve = Curve(label="x", slot=0, steps=np.arange(1, len(values) + 1), values=values)
    ElementTree.fromstring(line_chart([curve], title="t", y_label="y"))


def test_bar_lengths_are_the_shares() -> None:
    bars = [Bar(label="BF16", share=1.0, slot=0, words="one"), Bar(label="FP8", share=0.256, slot=1, words="a quarter")]
    assert re.findall(r"width:([\d.]+)%", bar_chart(bars, title="t")) == ["100.00", "25.60"]


def test_symmetric_range_shows_every_value() -> None:
    assert nice_range([np.array([0.1, -2.0, np.nan])], least=0.5) == pytest.approx((-2.3, 2.3))
    assert nice_range([np.array([])], least=0.5) == pytest.approx((-0.575, 0.575))
