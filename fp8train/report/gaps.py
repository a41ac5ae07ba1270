"""Section of the report about the gap: the test across seeds, the placebo, trends, and weights against arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fp8train.report import page
from fp8train.report.arm_rows import arm_table, compared_runs, or_baseline, run_table, slots
from fp8train.report.conclusion import interval_text, more_seeds
from fp8train.report.divergence import lost_steps
from fp8train.report.interval_chart import Gaps, interval_chart
from fp8train.report.page import typeset
from fp8train.units import NOTHING, count_text, loss_text, percent_text, ratio_text, signed_text


def gap_section(verdict: Mapping[str, Any]) -> list[str]:
    """The test with its picture where there are several seeds; then what one run differs from another in."""
    parts = []
    if len(verdict["seeds"]) > 1:
        parts += [_interval_figure(verdict), _test_table(verdict)]
    return [*parts, _trend_table(verdict), _crossed_table(verdict)]


def _interval_figure(verdict: Mapping[str, Any]) -> str:
    rows, words = [], []
    for arm, slot in slots(verdict).items():
        entry = verdict["arms"][arm]
        test = verdict["comparisons"].get(arm, {}).get("test")
        if test is None or test["mean"] is None:
            continue
        gaps = [gap for gap in test["gaps"] if gap is not None]
        text = "chance alone" if arm == verdict["placebo"] else test["status"]
        edges = {"mean": test["mean"], "low": test["low"], "high": test["high"]}
        rows.append(Gaps(label=entry["label"], slot=slot, values=gaps, words=text, **edges))
        words.append(f"{entry['label']} {percent_text(test['mean'], signed=True)} ({interval_text(test)}), {text}")
    if not rows:
        return ""
    first = next(iter(verdict["comparisons"].values()))["test"]
    chart = interval_chart(
        rows,
        title=f"Gap of the {first['quantity']} against the baseline: " + "; ".join(words),
        x_label=f"gap of the {first['quantity']}, %",
        margin=verdict["margin_percent"],
    )
    reading = (
        "An arm whose bar lies inside the grey margin is equivalent, one whose bar lies outside is not; a bar over an "
        "edge is open."
    )
    if verdict["learning"]["doubt"] is not None:
        reading = f"Where the bars lie decides nothing here: {typeset(verdict['learning']['in_short'])}."
    caption = (
        "<strong>Gap across seeds.</strong> Circles: one seed each, the arm against the baseline of the same weights "
        f"and tokens. Filled, with a bar: their mean and its {100 * first['confidence']:.0f}\u202f% interval. {reading}"
    )
    return page.figure(chart, caption)


def _test_table(verdict: Mapping[str, Any]) -> str:
    names = (
        "Seeds",
        "Mean gap",
        "Between seeds, sd",
        "Interval",
        "p, equivalent",
        "Verdict",
        "More seeds needed",
        "Less the placebo",
    )
    rows = []
    for arm, comparison in verdict["comparisons"].items():
        test, beside = comparison["test"], comparison["against_placebo"]
        less = NOTHING if beside is None else f"{percent_text(beside['mean'], signed=True)} ({interval_text(beside)})"
        cells = [
            count_text(test["count"]),
            percent_text(test["mean"], signed=True),
            percent_text(test["sd"]),
            interval_text(test),
            _p_text(test["p_equivalent"]),
            test["status"],
            _seeds_text(test),
            less,
        ]
        rows.append((arm, cells))
    looks = ", ".join(f"{look['seeds']} seeds" for look in verdict["looks"]) or "none"
    caption = (
        f"<strong>Equivalence test</strong>, margin \u00b1{verdict['margin_percent']:g}\u202f%: two one-sided t-tests "
        f"on the gaps of the seeds, {100 * verdict['alpha']:.3g}\u202f% each. Looks so far: {looks}; each is one more "
        "chance to be wrong, which compare.looks plans for. More seeds needed: roughly, for an 80\u202f% chance of a "
        "definite verdict, with the measured spread between seeds taken as the true one, if the true gap is zero, and "
        "if it is the measured one."
    )
    return arm_table(verdict, caption, names, rows, words=["Verdict"])


def _p_text(p: float | None) -> str:
    return NOTHING if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _seeds_text(test: Mapping[str, Any]) -> str:
    if not more_seeds(test):
        return NOTHING
    values = [test[key] for key in ("seeds_needed_if_equal", "seeds_needed")]
    return ", ".join("over 1,000" if value is None else str(max(1, value - test["count"])) for value in values)


def _trend_table(verdict: Mapping[str, Any]) -> str:
    """What happens to the gap on the way, one row a run."""
    names = ("Rise over last half", "Gap at peak LR", "Gap in LR decay")
    rows = []
    for arm, run, pair in compared_runs(verdict):
        if pair:
            slope, decay = pair["gap_slope"], pair["decay_gap"]
            shown = (slope["percent_over_half"], decay["before_percent"], decay["inside_percent"])
            rows.append((arm, run, [percent_text(value, signed=True) for value in shown]))
    caption = (
        "<strong>Trend of the training loss gap</strong>, unsmoothed, in percent of the baseline's loss. A gap that "
        "rises, or that opens in the decay of the learning rate, would grow with a longer run."
    )
    return run_table(verdict, caption, names, rows)


def stability_section(verdict: Mapping[str, Any]) -> list[str]:
    """How every run ended, and what it met on the way."""
    names = ("Steps done", "Skipped steps", "Spikes", "Gradient norm, ratio", "End")
    rows = []
    for arm, run, pair in compared_runs(verdict):
        end = run["diverged"]
        cells = [
            count_text(run["steps"]),
            count_text(lost_steps(run)),
            count_text(run["spikes"]),
            or_baseline(pair, ratio_text(pair.get("grad_norm_ratio"))),
            f"diverged at step {count_text(end['step'])}" if end else "finished",
        ]
        rows.append((arm, run, cells))
    caption = (
        "<strong>How each run went.</strong> Skipped: loss or gradient was not finite. Gradient norm: before clipping, "
        "median over the steps of its ratio to the baseline's."
    )
    return [run_table(verdict, caption, names, rows)]


def _crossed_table(verdict: Mapping[str, Any]) -> str:
    """Each one's weights in each one's arithmetic: mean over the seeds."""
    base_label = verdict["arms"][verdict["baseline"]]["label"]
    names = (
        f"{base_label} weights, {base_label} arithmetic",
        f"{base_label} weights, arm's arithmetic",
        f"Arm's weights, {base_label} arithmetic",
        "Arm's weights, arm's arithmetic",
        "Weights cost",
        "Arithmetic costs",
    )
    rows = []
    for arm, comparison in verdict["comparisons"].items():
        table = comparison["mean"]["crossed"]
        cells = [loss_text(table[f"{w}_in_{a}"]) for w in ("baseline", "arm") for a in ("baseline", "arm")]
        cells += [signed_text(table["weights_nats"]), signed_text(table["arithmetic_nats"])]
        rows.append((arm, cells))
    mean = f", mean of {len(verdict['seeds'])} seeds" * (len(verdict["seeds"]) > 1)
    caption = (
        f"<strong>Worse weights or worse arithmetic?</strong> Held-out loss, nats per token{mean}. Weights cost: what "
        "the arm's weights lose in the baseline's arithmetic, which is damage done in training. Arithmetic costs: what "
        "the arm's arithmetic loses on the baseline's weights."
    )
    return arm_table(verdict, caption, names, rows)
