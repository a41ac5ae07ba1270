"""Section of the report about the layers: which operands lose most in rounding, and when. From the telemetry rows."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fp8train.report import page
from fp8train.report.arm_rows import arm_table, slots
from fp8train.report.drawing import ALERT, SERIES, Drawing
from fp8train.report.page import code, typeset
from fp8train.report.run_record import Arms, RunRecord
from fp8train.telemetry.table import Sample, samples, worst
from fp8train.units import NOTHING, count_text, percent_text

SHOWN = 10
MOST_COLUMNS = 48  # sampled steps of the picture; of more, the worst of each stretch is shown
CELL = 18  # pixels
STATISTICS = {
    "row_error_p99": ("Row error, p99", 100.0, " %"),
    "row_error_max": ("largest", 100.0, " %"),
    "sqnr_db": ("SQNR, dB", 1.0, ""),
    "underflow_frac": ("Flushed", 100.0, " %"),
    "saturated_frac": ("Saturated", 100.0, " %"),
    "nonfinite": ("Non-finite", 1.0, ""),
    "kurtosis": ("Kurtosis", 1.0, ""),
}


def layers_section(verdict: Mapping[str, Any], arms: Arms) -> list[str]:
    """Worst operands and the picture layer x step of every arm that rounds; a note where none was sampled."""
    parts = []
    for arm, runs in arms.items():
        seed, run = next(iter(runs.items()))
        sampled = [(row["step"], kept) for row in run.telemetry if (kept := [s for s in samples(row) if not s.what_if])]
        if sampled:
            label = verdict["arms"][arm]["label"] + (f", seed {seed}" if len(runs) > 1 else "")
            parts += [_picture(label, slots(verdict)[arm], sampled), _worst_table(verdict, arm, sampled[-1])]
    if not parts:
        return [page.paragraph("No run sampled the operands of its linears (telemetry.every).", "note")]
    return [_error_table(verdict, arms), *parts]


def operand_errors(run: RunRecord) -> dict[str, float]:
    """Median over linears and samples of the relative rounding error of x, w and dy: 10^(-SQNR / 20)."""
    found: dict[str, list[float]] = {}
    for row in run.telemetry:
        for sample in samples(row):
            sqnr = sample.stats.get("sqnr_db")
            if not sample.what_if and sqnr is not None:
                found.setdefault(sample.operand, []).append(10 ** (-sqnr / 20))
    return {operand: float(np.median(values)) for operand, values in found.items()}


def _error_table(verdict: Mapping[str, Any], arms: Arms) -> str:
    """Measured rounding errors beside the placebo's noise."""
    rows = []
    for arm, runs in arms.items():
        errors = operand_errors(next(iter(runs.values())))
        noise = verdict["arms"][arm]["noise"]
        if errors or noise:
            shown = [errors.get(operand, noise or None) for operand in ("x", "w", "dy")]
            cells = [NOTHING if value is None else percent_text(100 * value) for value in shown]
            rows.append((arm, [*cells, "noise, as set" if noise else "rounding, measured"]))
    caption = (
        "<strong>Relative error of the operands</strong>, root mean square: median over linears and sampled steps. The "
        "placebo is a fair one where its noise is as large as the rounding."
    )
    return arm_table(verdict, caption, ("x", "w", "dy", "Source"), rows, words=["Source"])


def _worst_table(verdict: Mapping[str, Any], arm: str, sampled: tuple[int, Sequence[Sample]]) -> str:
    step, found = sampled
    rows = []
    for sample in worst(found, SHOWN):
        cells = [_statistic(sample, name) for name in STATISTICS]
        rows.append([code(sample.fqn), sample.operand, *(typeset(cell) for cell in cells)])
    label = html.escape(verdict["arms"][arm]["label"])
    caption = f"<strong>Worst operands</strong> of {label} at step {count_text(step)}, the largest row error first. "
    caption += "x.T and dy.T: as wgrad reads them, in blocks along the tokens."
    names = ["Linear", "Operand", *(heading for heading, _, _ in STATISTICS.values())]
    return page.table(caption, names, rows, words=("Linear", "Operand"))


def _statistic(sample: Sample, name: str) -> str:
    value = sample.stats.get(name)
    _, factor, unit = STATISTICS[name]
    return NOTHING if value is None else f"{factor * value:.3g}{unit}"


def _picture(label: str, slot: int, sampled: Sequence[tuple[int, Sequence[Sample]]]) -> str:
    """Layer x step: the darker a cell, the larger the worst row error of an operand in that layer."""
    layers = list(dict.fromkeys(_layer(sample.fqn) for _, found in sampled for sample in found))
    values = np.full((len(layers), len(sampled)), np.nan)
    for column, (_, found) in enumerate(sampled):
        for sample in found:
            row, (broken, error) = layers.index(_layer(sample.fqn)), sample.badness
            values[row, column] = np.nanmax([values[row, column], np.inf if broken else error])
    stretches = np.array_split(np.arange(len(sampled)), min(len(sampled), MOST_COLUMNS))
    cells = np.array([[np.nanmax(row[part], initial=-1.0) for part in stretches] for row in values])
    steps = [sampled[part[0]][0] for part in stretches]
    good = cells[np.isfinite(cells) & (cells >= 0)]
    low, high = (float(good.min()), float(good.max())) if len(good) else (0.0, 1.0)
    at_layer, at_step = np.unravel_index(int(np.argmax(cells)), cells.shape)
    name = f"{layers[at_layer]} at step {steps[at_step]:,}"
    title = (
        f"{label}: largest row error of each layer over the steps, {100 * low:.3g} to {100 * high:.3g} %; worst: {name}"
    )
    svg = _grid(layers, steps, cells, low, high, slot=slot, title=title)
    caption = (
        f"<strong>Where rounding hurts, {html.escape(label)}.</strong> One row a decoder layer, one column a sampled "
        f"step; the darker, the larger the error of the worst rows (p99) of any operand: from {100 * low:.3g} to "
        f"{100 * high:.3g}\u202f%. Worst: {html.escape(name)}. Outlined: values that are not finite."
    )
    return page.figure(svg, caption)


def _grid(
    layers: Sequence[str], steps: Sequence[int], cells: np.ndarray, low: float, high: float, *, slot: int, title: str
) -> str:
    """The picture as one element."""
    drawing = Drawing((0.0, float(len(steps))), (float(len(layers)), 0.0))
    gap = min(0.1, len(steps) / 900)  # about a pixel
    for row, column in zip(*np.nonzero(cells >= 0), strict=True):
        value = float(cells[row, column])
        shade = 1.0 if not np.isfinite(value) else 0.08 + 0.92 * (value - low) / ((high - low) or 1.0)
        edge = "" if np.isfinite(value) else ALERT
        across, down = (column, column + 1 - gap), (row + 0.95, row + 0.05)
        drawing.box(across, down, SERIES[slot], opacity=shade, edge=edge)
    ends = [(0.5, f"step {steps[0]:,}"), (len(steps) - 0.5, f"{steps[-1]:,}")]
    return drawing.html(
        title,
        height=CELL * len(layers),
        x_ticks=ends if len(steps) > 1 else ends[:1],
        y_ticks=[(row + 0.5, layer) for row, layer in enumerate(layers)],
        kind="named",
    )


def _layer(fqn: str) -> str:
    """The decoder layer of a module path: `layers.3`; the path itself outside any."""
    found = re.match(r"(.*?(?:^|\.)(?:layers?|h|blocks?)\.\d+)(?=\.|$)", fqn)
    return found[1] if found else fqn
