"""Sections of the report about what the arms cost: speed, time to the same loss, memory. As HTML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fp8train.report import page
from fp8train.report.arm_rows import (
    arm_table,
    compared_runs,
    or_baseline,
    run_table,
    runs_of,
    slots,
    thinned,
    whole,
)
from fp8train.report.charts import Bar, Curve, bar_chart, line_chart
from fp8train.report.comparable import NOT_COMPARABLE, doubt, quoted
from fp8train.report.conclusion import mean_ratio
from fp8train.report.divergence import finished
from fp8train.report.results import banded
from fp8train.report.run_record import Arms, first_run
from fp8train.report.sentence import judged_arms
from fp8train.report.trajectory import TARGETS, ema
from fp8train.units import NOTHING, bytes_text, count_text, seconds_text

EMULATION_NOTE = (
    "This backend computes the same FP8 numbers with wider instructions, because the machine has none for FP8. "
    "A GPU rounds alike, but sums in another order, which moves the loss of a single run; its speed is another."
)


def speed_section(verdict: Mapping[str, Any], arms: Arms) -> list[str]:
    """Throughput over the steps and its median."""
    names = ("Tokens per second, median", "10th to 90th percentile", "Ratio", "Training time")
    rows = []
    for arm, run, pair in compared_runs(verdict):
        ratio = quoted(verdict, arm, "speed", pair.get("tokens_per_second_ratio"))
        cells = [
            count_text(run["tokens_per_second"]),
            f"{count_text(run['tokens_per_second_p10'])} to {count_text(run['tokens_per_second_p90'])}",
            or_baseline(pair, ratio),
            seconds_text(run["train_seconds"]),
        ]
        rows.append((arm, run, cells))
    most = max(run["ran_on"]["runs_on_device"] or 1 for _, run, _ in rows)
    how = f" Runs of the comparison shared their device, up to {most - 1} beside each." if most > 1 else ""
    first = f"the first {first_run(arms).skip_steps} steps of every process (log.skip_steps)"
    caption = f"<strong>Speed</strong>, without {first}.{how}"
    emulated = any(run["emulates"] for _, run, _ in rows)
    note = page.paragraph(EMULATION_NOTE, "note") if emulated else ""
    table = run_table(verdict, caption, names, rows)
    note += _doubts(verdict, "speed")
    doubted = any(doubt(verdict, arm, "speed") for arm in verdict["comparisons"])
    over_time = "" if doubted else _time_figure(verdict, arms)  # it is drawn from the speeds
    return [note, _speed_figure(verdict, arms), table, over_time, _time_table(verdict)]


def _doubts(verdict: Mapping[str, Any], kind: str) -> str:
    """Why arms have no ratio; the caveats at the top say it of those that are judged."""
    others = [arm for arm in verdict["comparisons"] if arm not in judged_arms(verdict)]
    doubts = {verdict["arms"][arm]["label"]: why for arm in others if (why := doubt(verdict, arm, kind))}
    lines = (f"{label}: {kind} {NOT_COMPARABLE}: {why}." for label, why in doubts.items())
    return "".join(page.paragraph(line, "note") for line in lines)


def _speed_figure(verdict: Mapping[str, Any], arms: Arms) -> str:
    curves: list[Curve] = []
    words = []
    for arm, index, run in runs_of(arms):
        slot = slots(verdict)[arm]
        speed, entry = run.train.columns["tokens_per_second"], verdict["arms"][arm]
        curves.append(Curve(label="", slot=slot, steps=run.train.steps, values=speed, faint=True))
        median = entry["runs"][index]["tokens_per_second"]
        if median is not None:
            ends, label = run.train.steps[[0, -1]], entry["label"] if index == 0 else ""
            curves.append(Curve(label=label, slot=slot, steps=ends, values=np.full(2, median), dashed=slot > 0))
            words.append(f"{entry['label']} {count_text(median)}")
    finite = [curve.values[np.isfinite(curve.values)] for curve in curves]
    highest = max((float(np.percentile(values, 99.5)) for values in finite if len(values)), default=1.0)
    chart = line_chart(
        curves,
        title=f"Tokens per second over the training steps; median: {', '.join(words)}",
        y_label="tokens per second",
        y_range=(0, 1.12 * highest),
        height=260,
        y_format=count_text,
    )
    thin = f"Thin: each logged step{thinned(arms)}."
    caption = f"<strong>Throughput.</strong> {thin} Bold: the median without the first steps. The axis starts at zero."
    return page.figure(chart, caption)


def _time_figure(verdict: Mapping[str, Any], arms: Arms) -> str:
    """Smoothed training loss against the time that each arm takes at its median speed."""
    longest = 0.0
    found = []
    for arm, slot in slots(verdict).items():
        runs = arms[arm]
        speeds = [run["tokens_per_second"] for run in finished(verdict["arms"][arm]["runs"])]
        if any(speed is None for speed in speeds):
            return ""
        speed = float(np.exp(np.mean(np.log(speeds))))
        tables = [(run.train.columns["tokens_seen"], ema(run.train.columns["loss"])) for run in whole(runs).values()]
        if not all(np.isfinite(tokens).all() for tokens, _ in tables):
            return ""
        curve = banded(verdict["arms"][arm]["label"], slot, tables, wide=slot == 0)
        curve.steps = curve.steps / speed
        longest = max(longest, float(curve.steps[-1]))
        found.append(curve)
    size, unit = next(((size, unit) for size, unit in ((3600.0, "h"), (60.0, "min")) if longest > 2 * size), (1.0, "s"))
    for curve in found:
        curve.steps = curve.steps / size
    low = min((float(np.nanmin(curve.values)) for curve in found if np.isfinite(curve.values).any()), default=0.0)
    high = max((float(_at_tenth(curve)) for curve in found), default=1.0)
    margin = 0.08 * (high - low) or 0.1
    chart = line_chart(
        found,
        title="Smoothed training loss over training time at each arm's median speed; time to the same loss: "
        + "; ".join(_time_words(verdict, arm) for arm in verdict["comparisons"]),
        y_label="training loss, smoothed (EMA 0.9), nats per token",
        x_label=unit,
        x_integer=False,
        y_range=(low - margin, high + margin),
        height=300,
    )
    caption = (
        f"<strong>Loss over time</strong>, in {unit}, at each arm's median speed without the first steps. An arm "
        "whose curve lies lower got further in the same time. The first tenth of the fall leaves the frame."
    )
    return page.figure(chart, caption)


def _at_tenth(curve: Curve) -> float:
    """Value of a curve a tenth of its way along."""
    finite = curve.values[len(curve.values) // 10 :]
    finite = finite[np.isfinite(finite)]
    return float(finite[0]) if len(finite) else 0.0


def _time_words(verdict: Mapping[str, Any], arm: str) -> str:
    ratio = quoted(verdict, arm, "speed", verdict["comparisons"][arm]["mean"]["time_to_loss_ratio"])
    return f"{verdict['arms'][arm]['label']} {ratio}"


def _time_table(verdict: Mapping[str, Any]) -> str:
    """Raw and capability-matched speed ratio of every arm, with intervals over the seeds."""
    names = [*(f"Tokens to loss at {share:.0%}" for share in TARGETS), "Tokens to last loss"]
    sure = [arm for arm in verdict["comparisons"] if not doubt(verdict, arm, "speed")]
    names += ["Raw speed", "95 % interval", "Time to loss", "95 % interval"] if sure else []
    rows = []
    for arm, comparison in verdict["comparisons"].items():
        found = [pair["tokens_to_loss"] for pair in finished(comparison["seeds"])]
        ratios = [[_at(tokens, share) for tokens in found] for share in TARGETS]
        ratios.append([tokens["common"]["ratio"] for tokens in found])
        cells = [_ratio_cells(mean_ratio(of_seeds))[0] for of_seeds in ratios]
        for key in ("raw", "time_to_loss") if sure else ():
            cells += _ratio_cells(comparison["speed"][key] if arm in sure else None)
        rows.append((arm, cells))
    caption = (
        "<strong>Time to loss</strong> against the baseline: raw speed divided by how many times the tokens the arm "
        "needs for the same training loss, so that speed bought with loss does not count. Geometric means over the "
        "seeds; none where one of them never got there, or its curve stands still there."
    )
    return arm_table(verdict, caption, names, rows)


def _at(found: Mapping[str, Any], share: float) -> float | None:
    return next((target["ratio"] for target in found["targets"] if target["share"] == share), None)


def _ratio_cells(found: Mapping[str, Any] | None) -> list[str]:
    """A ratio near 1 in three decimals, and its interval (mean_ratio)."""
    if found is None:
        return [NOTHING, NOTHING]
    interval = "one seed" if found["low"] is None else f"{found['low']:.3f} to {found['high']:.3f}"
    return [f"{found['mean']:.3f}x", interval]


def memory_section(verdict: Mapping[str, Any], arms: Arms) -> list[str]:
    """Peak memory of every run, by kind where the runs tell."""
    sizes = [run["peak_memory_bytes"] for _, run, _ in compared_runs(verdict)]
    if any(size is None for size in sizes):
        return [page.paragraph("The runs did not measure their memory.", "note")]
    by_kind = {
        (arm, run["seed"]): arms[arm][run["seed"]].result.get("memory_bytes") or {}
        for arm, run, _ in compared_runs(verdict)
    }
    kinds = list(dict.fromkeys(kind for amounts in by_kind.values() for kind in amounts))
    rows = []
    for arm, run, pair in compared_runs(verdict):
        ratio = quoted(verdict, arm, "memory", pair.get("peak_memory_ratio"))
        cells = [bytes_text(run["peak_memory_bytes"]), or_baseline(pair, ratio)]
        cells += [bytes_text(by_kind[arm, run["seed"]].get(kind)) for kind in kinds]
        rows.append((arm, run, cells))
    bars = []
    for arm, entry in verdict["arms"].items():
        size = max(run["peak_memory_bytes"] for run in entry["runs"])
        bars.append(
            Bar(label=entry["label"], share=size / max(sizes), slot=slots(verdict)[arm], words=bytes_text(size))
        )
    words = ", ".join(f"{bar.label} {bar.words}" for bar in bars)
    chart = bar_chart(bars, title=f"Peak memory: {words}")
    on_gpu = str(first_run(arms).result.get("device") or "cpu") != "cpu"
    counted = "as the GPU allocator counted it"
    if not on_gpu:
        counted = "as the operating system counted it: interpreter, libraries and data are in it"
    names = ["Peak", "Ratio", *(kind.replace("_", " ").capitalize() for kind in kinds)]
    table = run_table(verdict, "<strong>Memory</strong> of each arm.", names, rows)
    most = "; the most of the seeds" if len(verdict["seeds"]) > 1 else ""
    figure = page.figure(chart, f"<strong>Peak memory</strong> of the training process, {counted}{most}.")
    return [_doubts(verdict, "memory"), figure, table]
