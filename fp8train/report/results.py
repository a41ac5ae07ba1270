"""Sections of the report about what the arms reached: loss, speed, memory. Each returns its parts as HTML."""

from __future__ import annotations

import functools
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fp8train.report import page
from fp8train.report.charts import Bars, Curve, bar_chart, line_chart, nice_range
from fp8train.report.page import Column, typeset
from fp8train.report.run_record import Arms, RunRecord, first_run
from fp8train.report.trajectory import ema, paired
from fp8train.report.verdict import MARGIN_PERCENT
from fp8train.units import bytes_text, count_text, loss_text, percent_text, ratio_text, seconds_text, signed_text

LONG_RUN_ROWS = 2000  # from here the first steps would flatten the rest of the loss curve
TABLE_ROWS = 12
EMULATING_BACKENDS = ("cpu", "reference")
EMULATION_NOTE = (
    "This backend computes the same FP8 numbers with wider instructions, because the machine has none for FP8. "
    "The losses carry over to a GPU, the speed does not."
)

Smooth = Mapping[str, Mapping[int, np.ndarray]]  # arm -> seed -> smoothed training loss [rows]


def loss_section(verdict: Mapping[str, Any], arms: Arms) -> list[str]:
    """Loss curves, their difference, and both in tables."""
    smooth = {arm: {seed: ema(run.train.columns["loss"]) for seed, run in runs.items()} for arm, runs in arms.items()}
    parts = [_nonfinite_alert(entry) for entry in verdict["arms"].values()]
    parts += [_loss_figure(verdict, arms, smooth), _difference_figure(verdict, arms)]
    parts += [_loss_table(verdict), _error_table(verdict)]
    return [*parts, page.details("Loss by step, as a table", _steps_table(verdict, arms, smooth))]


def _nonfinite_alert(entry: Mapping[str, Any]) -> str:
    count = sum(run["nonfinite_losses"] for run in entry["runs"])
    text = (
        f"{entry['label']}: the loss was not finite at {count_text(count)} logged steps, which are gaps in the curves."
    )
    return page.paragraph(text, "alert") if count else ""


def _loss_figure(verdict: Mapping[str, Any], arms: Arms, smooth: Smooth) -> str:
    """Training loss of every arm, raw and smoothed, and its held-out losses."""
    curves: list[Curve] = []
    for slot, arm, index, run in _runs(arms):
        loss, held_out = run.train.columns["loss"], run.evals.columns["eval_loss"]
        if len(arms[arm]) == 1:
            curves.append(Curve(label="", slot=slot, steps=run.train.steps, values=loss, faint=True))
        label = verdict["arms"][arm]["label"] if index == 0 else ""
        smoothed = list(smooth[arm].values())[index]
        curves.append(Curve(label=label, slot=slot, steps=run.train.steps, values=smoothed, wide=slot == 0))
        curves.append(Curve(label="", slot=slot, steps=run.evals.steps, values=held_out, markers=True))
    y_range, cut = _loss_range(curves, max(len(run.train) for *_, run in _runs(arms)))
    title = f"Loss of each arm over the training steps. {verdict['sentence']}"
    chart = line_chart(curves, name="loss", title=title, y_label="loss, nats per token", y_range=y_range, height=380)
    caption = (
        "<strong>Training and held-out loss.</strong> Bold: training loss, smoothed (EMA 0.9). Behind it: every logged "
        f"step{_thinned(arms)}. Circles: held-out loss in the arm's own precision.{cut}"
    )
    return page.figure(chart, caption)


def _difference_figure(verdict: Mapping[str, Any], arms: Arms) -> str:
    """Relative loss error of every arm against the baseline, raw and smoothed, with the held-out gaps."""
    baseline = list(arms[verdict["baseline"]].values())
    curves: list[Curve] = []
    for slot, arm, index, run in _runs(arms):
        if arm == verdict["baseline"]:
            continue
        steps, base, new = paired(baseline[index].train, run.train, "loss")
        if len(arms[arm]) == 1:
            curves.append(Curve(label="", slot=slot, steps=steps, values=100 * (new - base) / base, faint=True))
        smooth = ema(base)
        label = verdict["arms"][arm]["label"] if index == 0 else ""
        curves.append(Curve(label=label, slot=slot, steps=steps, values=100 * (ema(new) - smooth) / smooth))
        steps, base, new = paired(baseline[index].evals, run.evals, "eval_loss")
        curves.append(Curve(label="", slot=slot, steps=steps, values=100 * (new - base) / base, markers=True))
    margin = f"\u00b1{MARGIN_PERCENT}\u202f%"
    chart = line_chart(
        curves,
        name="difference",
        title="Loss relative to the baseline over the training steps: "
        + "; ".join(_error_words(verdict, arm) for arm in verdict["comparisons"]),
        y_label=f"loss relative to {verdict['arms'][verdict['baseline']]['label']}, %",
        y_range=nice_range([curve.values for curve in curves], least=2 * MARGIN_PERCENT),
        band=(-MARGIN_PERCENT, MARGIN_PERCENT, margin),
        y_format=lambda value: f"{value:+.3g}".replace("-", "\u2212") if value else "0",
    )
    caption = (
        "<strong>Difference.</strong> Above zero the arm is worse than the baseline. Bold: both losses smoothed "
        "first (EMA 0.9); behind it: step by step; "
        f"circles: held-out loss. Shaded: {margin}, within which DeepSeek-V3 reports its FP8 runs; a scale to "
        "read by, not a test."
    )
    return page.figure(chart, caption)


def _loss_range(curves: Sequence[Curve], rows: int) -> tuple[tuple[float, float] | None, str]:
    """Range of the loss axis and the sentence that admits what it cuts off.

    A short run is shown whole (None); of a long one all that follows its first 1 % of steps.
    """
    after = max((int(curve.steps[-1]) for curve in curves if len(curve.steps)), default=0) // 100
    tails = [part for curve in curves if len(part := curve.values[(curve.steps > after) & np.isfinite(curve.values)])]
    if rows < LONG_RUN_ROWS or not tails:
        return None, ""
    low, high = min(part.min() for part in tails), max(part.max() for part in tails)
    margin = 0.05 * (high - low) or 0.05
    highest = max(float(np.nanmax(curve.values)) for curve in curves if np.isfinite(curve.values).any())
    cut = f" The first {count_text(after)} steps leave the frame (highest value {loss_text(highest)})."
    return (low - margin, high + margin), cut if highest > high + margin else ""


def _loss_table(verdict: Mapping[str, Any]) -> str:
    names = ("Held-out loss", "Gap", "Gap, %", "Held-out in BF16", "Gap, %", "Bits per byte", "Training loss (EMA 0.9)")
    rows = []
    for arm, index, run in _arm_runs(verdict):
        pair = _pair(verdict, arm, index)
        gap, gap_bf16 = (pair[key] if pair else {} for key in ("heldout_gap", "heldout_gap_bf16"))
        cells = [
            loss_text(run["eval_loss"]),
            _or_baseline(pair, signed_text(gap.get("nats"))),
            _or_baseline(pair, percent_text(gap.get("percent"), signed=True)),
            loss_text(run["eval_loss_bf16"]),
            _or_baseline(pair, percent_text(gap_bf16.get("percent"), signed=True)),
            loss_text(run["bits_per_byte"]),
            loss_text(run["train_loss_ema"]),
            loss_text(run["train_loss"]),
        ]
        rows.append(_row(verdict, arm, run, cells))
    caption = (
        "<strong>Loss at the end</strong>, nats per token. <em>Held-out in BF16</em> scores the same weights with BF16 "
        "arithmetic: what is left of the gap there is in the weights."
    )
    return page.table(caption, _columns(verdict, *names, "Last step"), rows)


def _error_table(verdict: Mapping[str, Any]) -> str:
    names = ("Last step", "Last step, EMA 0.9", "Largest, EMA 0.9", "at step", "Steps compared")
    rows = []
    for arm, index, run in _arm_runs(verdict):
        if pair := _pair(verdict, arm, index):
            error = pair["relative_loss_error"]
            cells = [
                percent_text(error["final_percent"], signed=True),
                percent_text(error["ema_final_percent"], signed=True),
                percent_text(error["ema_max_percent"]),
                count_text(error["ema_max_step"]),
                count_text(error["steps"]),
            ]
            rows.append(_row(verdict, arm, run, cells))
    caption = "<strong>Relative loss error</strong> of the training loss against the baseline."
    return page.table(caption, _columns(verdict, *names), rows)


def _steps_table(verdict: Mapping[str, Any], arms: Arms, smooth: Smooth) -> str:
    """About a dozen steps of the first seed: smoothed training loss of every arm and its difference."""
    seed, baseline = verdict["seeds"][0], verdict["baseline"]
    tables = {arm: runs[seed].train for arm, runs in arms.items()}
    common = functools.reduce(np.intersect1d, (table.steps for table in tables.values()))
    picked = common[np.linspace(0, len(common) - 1, min(TABLE_ROWS, len(common))).round().astype(int)]
    columns = [Column(heading="Step", number=True), Column(heading="Tokens", number=True)]
    for arm in arms:
        label = verdict["arms"][arm]["label"]
        columns += [Column(heading=label, number=True)]
        columns += [Column(heading=f"{label}, difference", number=True)] * (arm != baseline)
    rows = []
    for step in picked:
        at = {arm: int(np.searchsorted(table.steps, step)) for arm, table in tables.items()}
        losses = {arm: float(smooth[arm][seed][row]) for arm, row in at.items()}
        cells = [count_text(step), count_text(tables[baseline].columns["tokens_seen"][at[baseline]])]
        for arm, loss in losses.items():
            difference = percent_text(100 * (loss - losses[baseline]) / losses[baseline], signed=True)
            cells += [loss_text(loss), *[typeset(difference)] * (arm != baseline)]
        rows.append(cells)
    return page.table("Training loss, smoothed (EMA 0.9), nats per token.", columns, rows)


def speed_section(verdict: Mapping[str, Any], arms: Arms) -> list[str]:
    """Throughput over the steps and its median."""
    names = ("Tokens per second, median", "10th to 90th percentile", "Ratio", "Training time")
    rows = []
    for arm, index, run in _arm_runs(verdict):
        pair = _pair(verdict, arm, index)
        cells = [
            count_text(run["tokens_per_second"]),
            f"{count_text(run['tokens_per_second_p10'])} to {count_text(run['tokens_per_second_p90'])}",
            _or_baseline(pair, ratio_text(pair.get("tokens_per_second_ratio"))),
            seconds_text(run["train_seconds"]),
        ]
        rows.append(_row(verdict, arm, run, cells))
    caption = "<strong>Speed</strong>, warm-up steps left out. The arms ran one after the other."
    emulated = any(run["backend"] in EMULATING_BACKENDS for _, _, run in _arm_runs(verdict))
    note = page.paragraph(EMULATION_NOTE, "note") if emulated else ""
    return [note, _speed_figure(verdict, arms), page.table(caption, _columns(verdict, *names), rows)]


def _speed_figure(verdict: Mapping[str, Any], arms: Arms) -> str:
    curves: list[Curve] = []
    words = []
    for slot, arm, index, run in _runs(arms):
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
        name="speed",
        title=f"Tokens per second over the training steps; median: {', '.join(words)}",
        y_label="tokens per second",
        y_range=(0, 1.12 * highest),
        height=260,
        y_format=count_text,
    )
    thin = f"Thin: each logged step{_thinned(arms)}."
    caption = f"<strong>Throughput.</strong> {thin} Bold: the median after warm-up. The axis starts at zero."
    return page.figure(chart, caption)


def memory_section(verdict: Mapping[str, Any], arms: Arms) -> list[str]:
    """Peak memory of every run, by kind where the runs tell."""
    entries = list(_arm_runs(verdict))
    sizes = [run["peak_memory_bytes"] for _, _, run in entries]
    if any(size is None for size in sizes):
        return [page.paragraph("The runs did not measure their memory.", "note")]
    by_kind = {(arm, run["seed"]): arms[arm][run["seed"]].result.get("memory_bytes") or {} for arm, _, run in entries}
    kinds = list(dict.fromkeys(kind for amounts in by_kind.values() for kind in amounts))
    bars, rows = [], []
    for arm, index, run in entries:
        pair, size = _pair(verdict, arm, index), run["peak_memory_bytes"]
        seed = f", seed {run['seed']}" if len(verdict["seeds"]) > 1 else ""
        slot = list(arms).index(arm)
        bars.append(Bars(label=verdict["arms"][arm]["label"] + seed, parts=[(size, slot, bytes_text(size))]))
        cells = [bytes_text(size), _or_baseline(pair, ratio_text(pair.get("peak_memory_ratio")))]
        cells += [bytes_text(by_kind[arm, run["seed"]].get(kind)) for kind in kinds]
        rows.append(_row(verdict, arm, run, cells))
    words = ", ".join(f"{bar.label} {bar.parts[0][2]}" for bar in bars)
    chart = bar_chart(bars, name="memory", title=f"Peak memory: {words}", total=1.02 * max(sizes))
    on_gpu = str(first_run(arms).result.get("device") or "cpu") != "cpu"
    counted = "as the GPU allocator counted it"
    if not on_gpu:
        counted = "as the operating system counted it: interpreter, libraries and data are in it"
    columns = _columns(verdict, "Peak", "Ratio", *(kind.replace("_", " ").capitalize() for kind in kinds))
    table = page.table("<strong>Memory</strong> of each arm.", columns, rows)
    return [page.figure(chart, f"<strong>Peak memory</strong> of the training process, {counted}."), table]


def _runs(arms: Arms) -> Iterable[tuple[int, str, int, RunRecord]]:
    """(colour slot of the arm, arm, index of the seed, run) of every run."""
    for slot, (arm, runs) in enumerate(arms.items()):
        for index, run in enumerate(runs.values()):
            yield slot, arm, index, run


def _arm_runs(verdict: Mapping[str, Any]) -> Iterable[tuple[str, int, Mapping[str, Any]]]:
    """(arm, index of the seed, measures) of every run."""
    return ((arm, index, run) for arm, entry in verdict["arms"].items() for index, run in enumerate(entry["runs"]))


def _pair(verdict: Mapping[str, Any], arm: str, index: int) -> Mapping[str, Any]:
    """The comparison of a run with the baseline; empty for the baseline itself."""
    return verdict["comparisons"][arm]["seeds"][index] if arm in verdict["comparisons"] else {}


def _columns(verdict: Mapping[str, Any], *names: str) -> list[Column]:
    """Columns of a table with one row a run: arm, seed where there are several, then numbers."""
    seeds = ["Seed"] if len(verdict["seeds"]) > 1 else []
    return [Column(heading="Arm"), *(Column(heading=name, number=True) for name in (*seeds, *names))]


def _row(verdict: Mapping[str, Any], arm: str, run: Mapping[str, Any], cells: Sequence[str]) -> list[str]:
    slot = list(verdict["arms"]).index(arm)
    name = f'<span class="swatch series-{slot % 6}"></span>{html.escape(verdict["arms"][arm]["label"])}'
    return [
        f'<span class="key">{name}</span>',
        *[str(run["seed"])] * (len(verdict["seeds"]) > 1),
        *(typeset(cell) for cell in cells),
    ]


def _or_baseline(pair: Mapping[str, Any], text: str) -> str:
    return text if pair else "baseline"


def _error_words(verdict: Mapping[str, Any], arm: str) -> str:
    error = verdict["comparisons"][arm]["mean"]["relative_loss_error"]
    largest, final = percent_text(error["ema_max_percent"]), percent_text(error["ema_final_percent"], signed=True)
    return f"{verdict['arms'][arm]['label']} largest {largest}, at the end {final}"


def _thinned(arms: Arms) -> str:
    longest = max(len(run.train) for *_, run in _runs(arms))
    return f", as the range from lowest to highest ({count_text(longest)} steps)" if longest > LONG_RUN_ROWS else ""
