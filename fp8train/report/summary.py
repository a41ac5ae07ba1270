"""A comparison as text, for the console: numbers of every arm, what ran in FP8, the verdict in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fp8train.report.comparable import quoted
from fp8train.report.conclusion import SPEED_KEYS, interval_text, mean
from fp8train.report.coverage_summary import (
    exceptions,
    gemm_shares,
    group_linears,
    layer_numbers,
    merged_coverage,
    refused_kernels,
)
from fp8train.report.divergence import any_diverged, diverged_seeds, finished
from fp8train.report.run_record import Arms, RunRecord
from fp8train.report.sentence import judged_arms
from fp8train.units import bytes_text, count_text, loss_text, percent_text, seconds_text, signed_text

SHOWN_EXCEPTIONS = 6


def summary(verdict: Mapping[str, Any], arms: Arms) -> str:
    """The comparison as text: a table with one column an arm, gaps by seed, what ran in FP8, the verdict in
    words.
    """
    several = len(verdict["seeds"]) > 1
    heading = f"mean of {len(verdict['seeds'])} seeds" if several else ""
    heading += ", of those that did not diverge" * (several and any_diverged(verdict))
    blocks = [
        _table([heading, *(verdict["arms"][arm]["label"] for arm in arms)], [_column(verdict, arm) for arm in arms])
    ]
    if several:
        blocks.append(_gaps(verdict))
    blocks += [text for arm, runs in arms.items() if (text := _coverage_lines(verdict["arms"][arm]["label"], runs))]
    caveats = "\n".join(f"- {line}" for line in verdict["caveats"])
    status = f"{verdict['status'].capitalize()}: " * (len(judged_arms(verdict)) == 1)
    blocks.append("\n".join([status + verdict["sentence"], *verdict["numbers"], caveats]))
    return "\n" + "\n\n".join(blocks)


def _column(verdict: Mapping[str, Any], arm: str) -> dict[str, str]:
    """One arm's numbers in words, by the name of their row; what is a difference stays empty for the baseline."""
    several, comparison = len(verdict["seeds"]) > 1, verdict["comparisons"].get(arm)
    run = mean(finished(verdict["arms"][arm]["runs"]))
    pair = comparison and (comparison["mean"] if several else comparison["seeds"][0])
    error, gap = (pair[key] if pair else {} for key in ("relative_loss_error", "heldout_gap"))
    share = run["fp8_flops_share"]
    gap_words = f"{signed_text(gap.get('nats'))} ({percent_text(gap.get('percent'), signed=True)})"
    at = "" if several else f" at step {count_text(error.get('ema_max_step'))}"
    by_source, gaps = {}, pair["source_gaps"] if pair else {}
    for name, loss in run["eval_losses"].items():
        of_source = f" ({percent_text(gaps[name], signed=True)})" if name in gaps else ""
        by_source[f"  of {name}"] = loss_text(loss) + of_source
    speed, to_loss = (quoted(verdict, arm, "speed", pair and pair[key]) for key in SPEED_KEYS.values())
    memory = quoted(verdict, arm, "memory", pair and pair["peak_memory_ratio"])
    return {
        "held-out loss, nats/token": loss_text(run["eval_loss"]),
        "  gap": gap_words if pair else "",
        **by_source,
        "  evaluated in BF16": loss_text(run["eval_loss_bf16"]),
        "  bits per byte": loss_text(run["bits_per_byte"]),
        "training loss, EMA 0.9": loss_text(run["train_loss_ema"]),
        "  relative loss error, final": percent_text(error.get("ema_final_percent"), signed=True) if pair else "",
        "  relative loss error, max": percent_text(error.get("ema_max_percent")) + at if pair else "",
        "FLOPs of linears in FP8": percent_text(None if share is None else 100 * share, digits=1),
        "tokens per second": count_text(run["tokens_per_second"]) + f" ({speed})" * bool(pair),
        "  to the same loss": to_loss if pair else "",
        "training time": seconds_text(run["train_seconds"]),
        "peak memory": bytes_text(run["peak_memory_bytes"]) + f" ({memory})" * bool(pair),
    }


def _gaps(verdict: Mapping[str, Any]) -> str:
    """The relative gap of every seed, the mean and its interval, one row an arm."""
    rows = []
    for arm, comparison in verdict["comparisons"].items():
        test = comparison["test"]
        own = diverged_seeds(verdict["arms"][arm])
        gaps = [
            percent_text(gap, signed=True)
            if not pair["diverged"]
            else "diverged"
            if seed in own
            else "baseline diverged"
            for seed, pair, gap in zip(verdict["seeds"], comparison["seeds"], test["gaps"], strict=True)
        ]
        cells = [*gaps, percent_text(test["mean"], signed=True), interval_text(test), test["status"]]
        rows.append([verdict["arms"][arm]["label"], *cells])
    test = next(iter(verdict["comparisons"].values()))["test"]
    seeds = [f"seed {seed}" for seed in verdict["seeds"]]
    header = [f"gap of {test['quantity']}", *seeds, "mean", f"{100 * test['confidence']:.0f} % interval", "verdict"]
    return _lines(header, rows)


def _table(header: Sequence[str], columns: Sequence[Mapping[str, str]]) -> str:
    names = max(columns, key=len)  # a run that diverged has no losses of sources
    return _lines(header, [[name, *(column.get(name, "") for column in columns)] for name in names])


def _lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells as columns two spaces apart, below a ruled header."""
    table = [list(header), *rows]
    widths = [max(len(row[index]) for row in table) for index in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])


def _coverage_lines(label: str, runs: Mapping[int, RunRecord]) -> str:
    """Which GEMMs ran in FP8 and which did not, and which kernels were refused; '' for an arm with neither."""
    coverage = merged_coverage({seed: run.coverage for seed, run in runs.items()})
    shares, refused = gemm_shares(coverage), refused_kernels(coverage)
    if not any(share.fp8_flops for share in shares):
        return f"{label}: {refused}" if refused else ""
    text = ", ".join(f"{share.gemm} {percent_text(100 * share.fp8_flops / share.flops, digits=1)}" for share in shares)
    lines = [f"{label}: in FP8 ran {text} of the FLOPs of all linears"]
    lines += [f"  {refused}"] if refused else []
    groups = exceptions(group_linears(coverage))
    for group in groups[:SHOWN_EXCEPTIONS]:
        outside = ", ".join(gemm for gemm, fp8 in group.fp8.items() if not fp8)
        layers = f" (layers {layer_numbers(group.fqns)})" if len(group.fqns) > 1 and layer_numbers(group.fqns) else ""
        lines.append(f"  not in FP8: {group.pattern}{layers}, {outside}: {group.reason or group.rule}")
    if len(groups) > SHOWN_EXCEPTIONS:
        lines.append(f"  and {len(groups) - SHOWN_EXCEPTIONS} further kinds of linears, in the report")
    return "\n".join(lines)
