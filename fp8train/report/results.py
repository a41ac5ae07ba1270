"""Section of the report about the losses: curves with a band over the seeds, their difference, both in tables."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fp8train.report import page
from fp8train.report.arm_rows import (
    LONG_RUN_ROWS,
    compared_runs,
    or_baseline,
    run_table,
    runs_of,
    slots,
    thinned,
    whole,
)
from fp8train.report.charts import Curve, Range, line_chart, nice_range, spanning
from fp8train.report.divergence import any_diverged
from fp8train.report.page import typeset
from fp8train.report.run_record import Arms, Table
from fp8train.report.trajectory import SMOOTHING, ema, paired
from fp8train.units import count_text, loss_text, percent_text, signed_text

TABLE_ROWS = 12
LAG = f"about {SMOOTHING / (1 - SMOOTHING):.0f} logged steps"  # mean age of what an EMA averages, once it has begun

Smooth = Mapping[str, Mapping[int, np.ndarray]]  # arm -> seed -> smoothed training loss [rows]


def loss_section(verdict: Mapping[str, Any], arms: Arms) -> list[str]:
    """Loss curves, their difference, and both in tables."""
    smooth = {arm: {seed: drawn(run.train.columns["loss"]) for seed, run in runs.items()} for arm, runs in arms.items()}
    parts = [_loss_figure(verdict, arms, smooth), _difference_figure(verdict, arms)]
    parts += [_loss_table(verdict), _source_table(verdict), _error_table(verdict)]
    return [*parts, page.details("Loss by step, as a table", _steps_table(verdict, arms, smooth))]


def drawn(losses: np.ndarray) -> np.ndarray:
    """Smoothed losses [rows], with a gap at those that are not finite, over which the average is carried."""
    return np.where(np.isfinite(losses), ema(losses), np.nan)


def over_seeds(tables: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Curves (steps, values) of several seeds at the steps that all of them have: steps [n], values [seeds, n]."""
    common = functools.reduce(np.intersect1d, (steps for steps, _ in tables))
    return common, np.array([values[np.searchsorted(steps, common)] for steps, values in tables])


def banded(label: str, slot: int, tables: Sequence[tuple[np.ndarray, np.ndarray]], **options: Any) -> Curve:
    """The mean over the seeds, with a band from the lowest to the highest of them where there are several."""
    steps, values = over_seeds(tables)
    band = (values.min(0), values.max(0)) if len(values) > 1 and not options.get("markers") else None
    return Curve(label=label, slot=slot, steps=steps, values=values.mean(0), band=band, **options)


def _loss_figure(verdict: Mapping[str, Any], arms: Arms, smooth: Smooth) -> str:
    """Training loss of every arm, raw and smoothed, and its held-out losses."""
    curves: list[Curve] = []
    for arm, slot in slots(verdict).items():
        runs = arms[arm]
        left = whole(runs)
        for run in [run for run in runs.values() if len(runs) == 1 or run.diverged]:
            curves.append(
                Curve(label="", slot=slot, steps=run.train.steps, values=run.train.columns["loss"], faint=True)
            )
        tables = [(run.train.steps, smooth[arm][seed]) for seed, run in left.items()]
        curves.append(banded(verdict["arms"][arm]["label"], slot, tables, wide=slot == 0))
        held_out = [(run.evals.steps, run.evals.columns["eval_loss"]) for run in left.values()]
        curves.append(banded("", slot, held_out, markers=True))
    y_range, cut = _loss_range(verdict, arms, curves)
    title = f"Loss of each arm over the training steps. {verdict['sentence']}"
    chart = line_chart(curves, title=title, y_label="loss, nats per token", y_range=y_range, height=320)
    seeds = len(verdict["seeds"])
    behind = f"Behind it: every logged step{thinned(arms)}."
    if seeds > 1:
        behind = f"It is the mean of {_seeds_words(verdict)}; shaded: from the lowest to the highest of them."
    circles = f"Circles: held-out loss in the arm's own precision{', mean of the seeds' * (seeds > 1)}."
    circles += f" They lie below the bold line while the loss falls fast, since that line lags by {LAG}."
    text = f"Bold: training loss, smoothed (EMA {SMOOTHING:g}). {behind} {circles}{cut}"
    return page.figure(chart, f"<strong>Training and held-out loss.</strong> {text}")


def _difference_figure(verdict: Mapping[str, Any], arms: Arms) -> str:
    """Relative loss error of every arm against the baseline, raw and smoothed, with the held-out gaps."""
    baseline, curves = arms[verdict["baseline"]], list[Curve]()
    framed = list[Curve]()  # what the range is of: of runs that diverged only where there are no others
    for arm, slot in slots(verdict).items():
        if arm == verdict["baseline"]:
            continue
        runs = arms[arm]
        both = [(baseline[seed], run) for seed, run in runs.items()]
        ended = [pair for pair in both if any(run.diverged for run in pair)]
        pairs = [pair for pair in both if pair not in ended] or both
        thin = [_relative(one.train, other.train, "loss", smoothed=False) for one, other in ended or both[:1]]
        for steps, values in thin if ended or len(both) == 1 else ():
            curves.append(Curve(label="", slot=slot, steps=steps, values=values, faint=True))
        smooth = [_relative(one.train, other.train, "loss", smoothed=True) for one, other in pairs]
        held_out = [_relative(one.evals, other.evals, "eval_loss", smoothed=False) for one, other in pairs]
        bold = [banded(verdict["arms"][arm]["label"], slot, smooth), banded("", slot, held_out, markers=True)]
        framed += [*bold, *curves[-1:] * (len(both) == 1)] if len(ended) < len(both) else []
        curves += bold
    limit = verdict["margin_percent"]
    margin = f"\u00b1{limit:g}\u202f%"
    shown = [part for curve in framed or curves for part in (curve.values, *(curve.band or ()))]
    chart = line_chart(
        curves,
        title="Loss relative to the baseline over the training steps: "
        + "; ".join(_error_words(verdict, arm) for arm in verdict["comparisons"]),
        y_label=f"loss relative to {verdict['arms'][verdict['baseline']]['label']}, %",
        y_range=nice_range(shown, least=2 * limit),
        band=(-limit, limit, f"margin {margin}"),
        y_format=lambda value: f"{value:+.3g}".replace("-", "\u2212") if value else "0",
    )
    several = len(verdict["seeds"]) > 1
    behind = "shaded in its colour: from the lowest to the highest seed" if several else "behind it: step by step"
    placebo = " The placebo shows what noise of FP8's size does by chance." if verdict["placebo"] else ""
    if several and any_diverged(verdict):
        behind += "; thin: seeds that diverged, up to there"
    reading = "" if several else ", a scale to read by, not a test"
    caption = (
        "<strong>Difference.</strong> Above zero the arm is worse than the baseline. Bold: both losses smoothed "
        f"first (EMA 0.9){', mean of the seeds' * several}; {behind}; circles: held-out loss. Grey: the margin of "
        f"{margin}{reading}.{placebo}"
    )
    return page.figure(chart, caption)


def _relative(baseline: Table, other: Table, column: str, *, smoothed: bool) -> tuple[np.ndarray, np.ndarray]:
    """(steps, difference in percent of the baseline)."""
    steps, base, new = paired(baseline, other, column)
    base, new = (drawn(base), drawn(new)) if smoothed else (base, new)
    return steps, 100 * (new - base) / base


def _seeds_words(verdict: Mapping[str, Any]) -> str:
    return f"{len(verdict['seeds'])} seeds" + ", or of those that did not diverge" * any_diverged(verdict)


def _loss_range(verdict: Mapping[str, Any], arms: Arms, curves: Sequence[Curve]) -> tuple[Range | None, str]:
    """Range of the loss axis and the sentence that admits what it cuts off.

    A short run is shown whole (None); of a long one all that follows its first 1 % of steps. A run that diverged would
    flatten the others.
    """
    finished = spanning([run.train.columns["loss"] for *_, run in runs_of(arms) if run.diverged is None])
    if any_diverged(verdict):
        return finished, " Thin: runs that diverged, up to there; they may leave the frame."
    after = max((int(curve.steps[-1]) for curve in curves if len(curve.steps)), default=0) // 100
    frame = spanning([curve.values[curve.steps > after] for curve in curves])
    if max(len(run.train) for *_, run in runs_of(arms)) < LONG_RUN_ROWS or frame is None:
        return None, ""
    highest = max(float(np.nanmax(curve.values)) for curve in curves if np.isfinite(curve.values).any())
    cut = f" The first {count_text(after)} steps leave the frame (highest value {loss_text(highest)})."
    return frame, cut if highest > frame[1] else ""


def _loss_table(verdict: Mapping[str, Any]) -> str:
    names = (
        "Held-out loss",
        "Gap",
        "Gap, %",
        "Held-out in BF16",
        "Gap in BF16, %",
        "Bits per byte",
        "Training loss (EMA 0.9)",
        "Last step",
    )
    rows = []
    for arm, run, pair in compared_runs(verdict):
        gap, gap_bf16 = (pair[key] if pair else {} for key in ("heldout_gap", "heldout_gap_bf16"))
        cells = [
            loss_text(run["eval_loss"]),
            or_baseline(pair, signed_text(gap.get("nats"))),
            or_baseline(pair, percent_text(gap.get("percent"), signed=True)),
            loss_text(run["eval_loss_bf16"]),
            or_baseline(pair, percent_text(gap_bf16.get("percent"), signed=True)),
            loss_text(run["bits_per_byte"]),
            loss_text(run["train_loss_ema"]),
            loss_text(run["train_loss"]),
        ]
        rows.append((arm, run, cells))
    caption = (
        "<strong>Loss at the end</strong>, nats per token. <em>Held-out in BF16</em> scores the same weights with BF16 "
        "arithmetic: what is left of the gap there is in the weights."
    )
    return run_table(verdict, caption, names, rows)


def _source_table(verdict: Mapping[str, Any]) -> str:
    """The held-out loss of each source of a mix; '' for one source."""
    names = list(dict.fromkeys(name for _, run, _ in compared_runs(verdict) for name in run["eval_losses"]))
    rows = []
    for arm, run, pair in compared_runs(verdict):
        gaps, cells = pair.get("source_gaps", {}), []
        for name in names:
            gap = f" ({percent_text(gaps[name], signed=True)})" if name in gaps else ""
            cells.append(loss_text(run["eval_losses"].get(name)) + gap)
        rows.append((arm, run, cells))
    caption = (
        "<strong>Held-out loss by source</strong> at the end, nats per token, and its gap. The loss of the mix is "
        "their mean, weighed by the shares of the mix."
    )
    return run_table(verdict, caption, names, rows) if names else ""


def _error_table(verdict: Mapping[str, Any]) -> str:
    names = ("Last step", "Last step, EMA 0.9", "Largest, EMA 0.9", "at step", "Steps compared")
    rows = []
    for arm, run, pair in compared_runs(verdict):
        if pair:
            error = pair["relative_loss_error"]
            cells = [
                percent_text(error["final_percent"], signed=True),
                percent_text(error["ema_final_percent"], signed=True),
                percent_text(error["ema_max_percent"]),
                count_text(error["ema_max_step"]),
                count_text(error["steps"]),
            ]
            rows.append((arm, run, cells))
    caption = "<strong>Relative loss error</strong> of the training loss against the baseline."
    return run_table(verdict, caption, names, rows)


def _steps_table(verdict: Mapping[str, Any], arms: Arms, smooth: Smooth) -> str:
    """About a dozen steps of the curves of both figures: smoothed training loss of every arm and its difference from
    the baseline, means over the seeds.
    """
    baseline = verdict["baseline"]
    base = arms[baseline]
    tokens = over_seeds([(run.train.steps, run.train.columns["tokens_seen"]) for run in whole(base).values()])
    headings, curves = ["Step", "Tokens"], []
    for arm, runs in arms.items():
        label = verdict["arms"][arm]["label"]
        headings += [label, *[f"{label}, difference"] * (arm != baseline)]
        loss = over_seeds([(run.train.steps, smooth[arm][seed]) for seed, run in whole(runs).items()])
        both = [seed for seed, run in runs.items() if run.diverged is None and base[seed].diverged is None]
        pairs = [(base[seed].train, runs[seed].train) for seed in both or runs]
        difference = over_seeds([_relative(*pair, "loss", smoothed=True) for pair in pairs])
        curves.append((arm, loss, difference))
    common = functools.reduce(np.intersect1d, (steps for _, (steps, _), _ in curves))
    picked = common[np.linspace(0, len(common) - 1, min(TABLE_ROWS, len(common))).round().astype(int)]
    rows = []
    for step in picked:
        cells = [count_text(step), count_text(_mean_at(tokens, step))]
        for arm, loss, difference in curves:
            text = percent_text(_mean_at(difference, step), signed=True)
            cells += [loss_text(_mean_at(loss, step)), *[typeset(text)] * (arm != baseline)]
        rows.append(cells)
    mean = f", mean of {_seeds_words(verdict)}" * (len(verdict["seeds"]) > 1)
    return page.table(f"Training loss, smoothed (EMA {SMOOTHING:g}), nats per token{mean}.", headings, rows)


def _mean_at(curve: tuple[np.ndarray, np.ndarray], step: int) -> float | None:
    """Mean over the seeds at a step; None where the curve (over_seeds) has none."""
    found = np.flatnonzero(curve[0] == step)
    return float(curve[1][:, found[0]].mean()) if len(found) else None


def _error_words(verdict: Mapping[str, Any], arm: str) -> str:
    error = verdict["comparisons"][arm]["mean"]["relative_loss_error"]
    largest, final = percent_text(error["ema_max_percent"]), percent_text(error["ema_final_percent"], signed=True)
    return f"{verdict['arms'][arm]['label']} largest {largest}, at the end {final}"
