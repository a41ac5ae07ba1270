"""report.html of a comparison: the verdict in one sentence, then the curves, tables and settings behind it."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fp8train.report import page
from fp8train.report.conclusion import NOT_COMPARABLE, interval_text, mean
from fp8train.report.costs import memory_section, speed_section
from fp8train.report.divergence import finished
from fp8train.report.gaps import gap_section
from fp8train.report.layers import layers_section
from fp8train.report.page import code, typeset
from fp8train.report.results import loss_section
from fp8train.report.run_record import Arms, RunRecord, first_run
from fp8train.report.setup import configuration_section, coverage_section, environment_section, method
from fp8train.units import bytes_text, count_text, percent_text, ratio_text, short_count_text, signed_text


def write_report(path: Path, verdict: Mapping[str, Any], arms: Arms) -> None:
    """Write the report of a comparison, whole or not at all."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(build_report(verdict, arms), encoding="utf-8")
    os.replace(unfinished, path)


def build_report(verdict: Mapping[str, Any], arms: Arms) -> str:
    """The report as one HTML document.

    Args:
        verdict: content of verdict.json.
        arms: arm -> seed -> run, as the verdict was made from; the baseline comes first.
    """
    sections = {
        "loss": ("Loss", loss_section(verdict, arms)),
        "gap": ("Gap", gap_section(verdict)),
        "speed": ("Speed", speed_section(verdict, arms)),
        "memory": ("Memory", memory_section(verdict, arms)),
        "layers": ("Worst layers", layers_section(verdict, arms)),
        "coverage": ("FP8 coverage", coverage_section(verdict, arms)),
        "configuration": ("Configuration", configuration_section(arms)),
        "environment": ("Environment", environment_section(arms)),
        "method": ("How the numbers are made", [method()]),
    }
    links = "".join(f'<a href="#{key}">{html.escape(heading)}</a>' for key, (heading, _) in sections.items())
    header = _header(verdict, arms) + f'<nav aria-label="Sections">{links}</nav>'
    body = "\n".join(page.section(key, heading, *parts) for key, (heading, parts) in sections.items())
    folders = ", ".join(code(run.path.as_posix()) for runs in arms.values() for run in runs.values())
    labels = " and ".join(verdict["arms"][arm]["label"] for arm in arms)
    return page.page(
        title=f"{labels} compared", header=header, body=body, footer=f"Written by fp8train from {folders}."
    )


def _header(verdict: Mapping[str, Any], arms: Arms) -> str:
    first = first_run(arms)
    model = first.config.get("model") or {}
    facts = [str(model.get("name") or "model"), f"{short_count_text(first.result.get('parameters'))} parameters"]
    facts += [
        f"{count_text(verdict['shared'][0]['tokens_seen'])} tokens",
        str(first.result.get("device") or ""),
        _date(first),
    ]
    eyebrow = "".join(f"<span>{typeset(fact)}</span>" for fact in facts if fact and not fact.startswith("- "))
    status = f'<span class="status">{html.escape(_sentence_case(verdict["status"]))}</span>'
    reason = page.paragraph(f"{_sentence_case(verdict['reason'])}. {verdict['learning']['scope']}", "lead")
    damaged = [line for runs in arms.values() for run in runs.values() for line in run.damaged]
    if damaged:
        noun = "line" if len(damaged) == 1 else "lines"
        reason += page.paragraph(f"{len(damaged)} damaged {noun} of metrics left out, the first: {damaged[0]}", "alert")
    heading = f"<h1>{typeset(verdict['sentence'])}</h1>"
    if len(verdict["seeds"]) > 1:
        eyebrow += f"<span>{len(verdict['seeds'])} seeds</span>"
    return f'<div class="eyebrow">{status}{eyebrow}</div>\n{heading}\n{reason}\n{_tiles(verdict)}'


def _tiles(verdict: Mapping[str, Any]) -> str:
    """Key figures of the primary comparison."""
    arm = verdict["primary"]
    comparison = verdict["comparisons"][arm]
    new, base = (mean(finished(verdict["arms"][name]["runs"])) for name in (arm, comparison["against"]))
    average, test = comparison["mean"], comparison["test"]
    gap, error = average["heldout_gap"], average["relative_loss_error"]
    share = None if new["fp8_flops_share"] is None else 100 * new["fp8_flops_share"]
    doubt, speed = comparison["speed"]["not_quoted"], ratio_text(average["tokens_per_second_ratio"])
    speed_tile = (speed, f"{ratio_text(average['time_to_loss_ratio'])} to the same loss")
    if doubt is not None:
        speed_tile = (_sentence_case(NOT_COMPARABLE), doubt)
    memory = ratio_text(average["peak_memory_ratio"])
    sizes = f"{bytes_text(new['peak_memory_bytes'])} against {bytes_text(base['peak_memory_bytes'])}"
    if (different := comparison["memory"]["not_quoted"]) is not None:
        memory, sizes = _sentence_case(NOT_COMPARABLE), f"{sizes}: {different}"
    largest, final = percent_text(error["ema_max_percent"]), percent_text(error["ema_final_percent"], signed=True)
    seeds = len(finished(comparison["seeds"]))
    means = f"; means of {seeds} seeds" if seeds > 1 else ""
    detail = f"{signed_text(gap['nats'])} nats per token"
    if test["low"] is not None:
        detail = f"{100 * test['confidence']:.0f} % interval {interval_text(test)}"
    return page.tiles(
        [
            ("Held-out loss gap", percent_text(gap["percent"], signed=True), detail),
            ("Largest relative loss error", largest, f"{final} at the end{means}"),
            ("Tokens per second", *speed_tile),
            ("Peak memory", memory, sizes),
            ("Ran in FP8", percent_text(share, digits=1), "of the FLOPs of all linears"),
        ]
    )


def _date(run: RunRecord) -> str:
    return str(run.environment.get("date") or run.environment.get("started") or "")[:10]


def _sentence_case(text: str) -> str:
    return text[:1].upper() + text[1:]
