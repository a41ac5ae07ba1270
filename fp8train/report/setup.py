"""Sections of the report about how the arms ran: FP8 coverage, configuration, environment, method. As HTML."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from fp8train.arguments import flattened
from fp8train.backends.coverage import GEMMS
from fp8train.report import page
from fp8train.report.arm_rows import slots
from fp8train.report.charts import Bar, bar_chart
from fp8train.report.comparable import LEAST_TIMED
from fp8train.report.coverage_summary import (
    GemmShare,
    LinearGroup,
    exceptions,
    gemm_shares,
    group_linears,
    layer_numbers,
    merged_coverage,
    refused_kernels,
)
from fp8train.report.learning import LEAST_FALL, LEAST_STEPS
from fp8train.report.page import code, typeset
from fp8train.report.run_record import Arms, RunRecord, first_run
from fp8train.report.trajectory import SMOOTHED_SPAN
from fp8train.spikes import LEAST_LEAP, RECENT, SIGMAS, WINDOW
from fp8train.units import bytes_text, count_text, flops_text, percent_text

OWN_KEYS = ("run_dir", "time_limit_seconds")  # every arm has its own, and the numbers do not depend on them
OWN_FACTS = ("date", "command", "resumed_step", "recipe_hash", "init_hash", "data_hash")  # as above, or seen elsewhere


def coverage_section(verdict: Mapping[str, Any], arms: Arms) -> list[str]:
    parts = []
    for arm, runs in arms.items():
        coverage = merged_coverage({seed: run.coverage for seed, run in runs.items()})
        label = verdict["arms"][arm]["label"]
        shares, groups = gemm_shares(coverage), group_linears(coverage)
        total, fp8 = sum(share.flops for share in shares), sum(share.fp8_flops for share in shares)
        if refused := refused_kernels(coverage):
            parts.append(page.paragraph(f"{label}: {refused}.", "alert"))
        if not fp8:
            parts.append(
                page.paragraph(
                    f"{label}: no GEMM ran in FP8." if groups else f"{label}: the run counted no GEMMs.", "note"
                )
            )
            continue
        if broken := [group for group in groups if group.broken]:
            names = ", ".join(f"{group.pattern} ({', '.join(group.broken)})" for group in broken)
            parts.append(
                page.paragraph(f"{label}: these GEMMs were planned in FP8 and also ran outside it: {names}.", "alert")
            )
        for reason in dict.fromkeys(group.reason for group in groups if group.changed):
            names = ", ".join(group.pattern for group in groups if group.changed and group.reason == reason)
            parts.append(page.paragraph(f"{label}: during the run, {reason}: {names}.", "note"))
        whose = "a run's" if len(runs) == 1 else f"{len(runs)} runs'"
        words = f"{label}: {percent_text(100 * fp8 / total, digits=1)} of {whose} {flops_text(total)} ran in FP8"
        bars = [_share_bar(share, slots(verdict)[arm]) for share in shares]
        chart = bar_chart(bars, title=f"{words}: " + ", ".join(f"{bar.label} {bar.words}" for bar in bars))
        parts += [page.figure(chart, f"<strong>{typeset(words)}.</strong>")]
        parts += [_coverage_table(label, groups, total), _linears_table(label, groups)]
    return parts


def _linears_table(label: str, groups: Sequence[LinearGroup]) -> str:
    """Every linear in a row of its own, on request."""
    names = ("Module", *GEMMS, "N x K", "Rule", "Reason")
    rows = [
        [code(fqn), *_outcome(group), typeset(_shape(group)), code(group.rule), typeset(group.reason)]
        for group in groups
        for fqn in group.fqns
    ]
    table = page.table(f"Linears of {html.escape(label)}.", names, rows, words=names)
    return page.details(f"All {count_text(len(rows))} linears of {label}", table)


def _coverage_table(label: str, groups: Sequence[LinearGroup], total: float) -> str:
    outside = sum(not all(group.fp8.values()) for group in groups)
    rows = []
    for group in [*exceptions(groups), *(group for group in groups if all(group.fp8.values()))]:
        layers = layer_numbers(group.fqns).replace("-", "\u2013") if len(group.fqns) > 1 else ""
        name = code(group.pattern) + (f'<br><span class="note">layers {typeset(layers)}</span>' if layers else "")
        share = typeset(percent_text(100 * group.flops / total, digits=1))
        rows.append(
            [
                name,
                count_text(len(group.fqns)),
                typeset(_shape(group)),
                *_outcome(group),
                share,
                typeset(group.reason or f"rule {group.rule}"),
            ]
        )
    first = f"; the {'one' if outside == 1 else count_text(outside)} with a GEMM outside FP8 first" if outside else ""
    caption = f"<strong>Where FP8 ran</strong>, {html.escape(label)}: linears of one kind in one row{first}."
    names = ("Linears", "Count", "N x K", *GEMMS, "Share of FLOPs", "Why")
    return page.table(caption, names, rows, words=("Linears", *GEMMS, "Why"))


def configuration_section(arms: Arms) -> list[str]:
    values = _by_key(arms, lambda run: run.config)
    rows = [[code(key), *map(code, _told(of).values())] for key, of in values.items() if _differs(key, of, OWN_KEYS)]
    caption = f"<strong>What differs between the arms.</strong> {typeset(_environment_words(arms))}"
    whole = page.listing(yaml.safe_dump(first_run(arms).config, sort_keys=False))
    parts = [page.table(caption, ["Key", *arms], rows, words=("Key", *arms))]
    parts.append(page.details("Whole configuration of the first arm", whole))
    for arm, runs in arms.items():
        if recipe := next(iter(runs.values())).recipe:
            parts.append(page.details(f"Recipe of {arm}", page.listing(recipe)))
    return parts


def _environment_words(arms: Arms) -> str:
    """Whether the arms ran on the same machine and software, over all seeds; what differed, by key."""
    rest = "Every other key is the same"
    if not all(run.environment for runs in arms.values() for run in runs.values()):
        return f"{rest}; not every run recorded its environment."
    words = [
        f"{key} ({', '.join(f'{arm}: {text}' for arm, text in _told(of).items())})"
        for key, of in _by_key(arms, lambda run: run.environment).items()
        if _differs(key, of, OWN_FACTS)
    ]
    return f"{rest}; the environment differs in {', '.join(words)}." if words else f"{rest}, and so is the environment."


def environment_section(arms: Arms) -> list[str]:
    rows = []
    for key, of in _by_key(arms, lambda run: run.environment).items():
        told = _told(of)
        each = "<br>".join(f"{html.escape(arm)}: {code(text)}" for arm, text in told.items())
        same = len(set(told.values())) == 1
        rows.append([code(key), code(next(iter(told.values()))) if same else each])
    if not rows:
        return [page.paragraph("The runs did not record their environment.", "note")]
    caption = "<strong>Machine and software</strong> that the arms ran on."
    return [page.table(caption, ("What", "Value"), rows, words=("What", "Value"))]


def _by_key(arms: Arms, part: Callable[[RunRecord], Mapping[str, Any]]) -> dict[str, dict[str, list[str]]]:
    """Dotted key of that part of a run -> arm -> its value in words, of every seed."""
    flat = {arm: [flattened(part(run)) for run in runs.values()] for arm, runs in arms.items()}
    keys = dict.fromkeys(key for runs in flat.values() for run in runs for key in run)
    return {key: {arm: [_plain(run.get(key), key) for run in runs] for arm, runs in flat.items()} for key in keys}


def _differs(key: str, values: Mapping[str, Sequence[str]], own: Sequence[str]) -> bool:
    """Whether the arms have unlike values in a seed: one run may have been trained apart from the others."""
    return key not in own and len(set(map(tuple, values.values()))) > 1


def _told(values: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Arm -> its values over the seeds, each once."""
    return {arm: " and ".join(dict.fromkeys(of)) for arm, of in values.items()}


def method() -> str:
    entries = {
        "What the arms share": "Initial weights, the training tokens and their order, and the held-out windows: their "
        "hashes were compared. What differs is listed under Configuration.",
        "Held-out loss": "Mean cross-entropy over fixed windows that training never sees, in nats per token; in the "
        "arm's own precision, and with BF16 arithmetic on the same weights.",
        "Relative loss error": "(loss of the arm - loss of the baseline) / loss of the baseline. EMA 0.9: both losses "
        "are smoothed over logged steps by e = 0.9 e + 0.1 loss, starting at the first loss; DeepSeek-V3 "
        "(arXiv:2412.19437) smooths alike. Largest: the largest magnitude over all steps.",
        "Equivalence": "The seed is the unit: its arm and its baseline share weights and tokens, and their gap is one "
        "observation; windows of one run share its trajectory and are no replicates. Two one-sided t-tests at 5 % "
        "each, shared between the looks that were planned, margin in percent of the baseline's held-out loss: "
        "equivalent if the interval of the mean gap lies within the margin, inferior or superior if it lies beyond, "
        "otherwise inconclusive.",
        "Undecided": "A baseline that learned nothing is matched by any arm, also by one that learned nothing. So "
        f"its loss must have fallen, from before the first step or the first logged one to the end, by {LEAST_FALL:g} "
        "margins (with several seeds the lower end of the 90 % interval), so that an arm within the margin has kept at "
        f"least {1 - 1 / LEAST_FALL:.0%} of that, and in at least {LEAST_STEPS} steps, since Adam's first updates are "
        "close to the signs of the gradient and hide rounding. Otherwise no test is read, and more seeds do not help.",
        "Diverged": "A run without a finite loss at its end, or with too many steps that were not finite "
        "(optim.max_nonfinite_steps, optim.max_nonfinite_share). It has no gap: numbers are of the seeds that arm and "
        "baseline both finished. An arm is diverged if it did in a seed in which the baseline did not, and never the "
        "other way round; where the baseline diverged too the comparison is inconclusive. How many tokens such a run "
        "saw, and in which order, is known only from its data, seed and tokens a step.",
        "Placebo": "BF16 whose GEMM operands carry unbiased noise as large as FP8's rounding. Its gap is what such "
        "noise does by chance; an arm is only worse than chance if its gap stands out from the placebo's.",
        "Tokens to loss": "Both training losses are smoothed over the logarithm of tokens: by local lines with "
        f"tricube weights that reach a factor of {math.exp(SMOOTHED_SPAN):.2f} in tokens either way, the arm's as the "
        "baseline's and the smoothed difference of the two. A loss is reached where the curve first is as low; where "
        "it is flat nothing is read. Read where the baseline is after 50, 75 and 90 % of its tokens, and at the lowest "
        "loss that both reach.",
        "Gap in LR decay": "Mean over the steps after the last one at 90 % of the peak learning rate.",
        "Spikes": f"Logged steps whose loss is above the median of the last {RECENT} by {SIGMAS:g} robust deviations "
        f"of the last {WINDOW} and by {100 * LEAST_LEAP:g} %; in a row they count once. Where every step is logged and "
        "blackbox is at its defaults, these are the steps that a run's black box takes for spikes.",
        "Tokens per second": "Median over the logged steps, without the first log.skip_steps of every process: a "
        "start is slow, and so is a resume. result.json has the same of the last process alone, over all its steps. "
        f"A ratio needs {LEAST_TIMED} of them in every run: with fewer, no step lies beyond the 10th and 90th "
        "percentiles that say how much the steps vary.",
        "Share in FP8": "2 rows N K floating-point operations for every GEMM of a linear, counted by the operations "
        "themselves while training.",
        "Thinned curves": "A curve of many steps keeps the first, lowest, highest and last point of each run of them.",
    }
    return (
        '<dl class="method">'
        + "".join(f"<dt>{html.escape(name)}</dt><dd>{typeset(text)}</dd>" for name, text in entries.items())
        + "</dl>"
    )


def _share_bar(share: GemmShare, slot: int) -> Bar:
    fp8 = share.fp8_flops / share.flops if share.flops else 0.0
    return Bar(label=share.gemm, share=fp8, slot=slot, words=percent_text(100 * fp8, digits=1))


def _outcome(group: LinearGroup) -> list[str]:
    return [
        f'<span class="failing">{typeset(text)}, planned FP8</span>' if gemm in group.broken else typeset(text)
        for gemm, text in group.ran.items()
    ]


def _shape(group: LinearGroup) -> str:
    return " \u00d7 ".join(count_text(size) for size in group.shape)


def _plain(value: Any, key: str) -> str:
    if key.endswith("_bytes") and isinstance(value, int):
        return bytes_text(value)
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "null" if value is None else str(value)
