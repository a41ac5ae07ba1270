"""report.html of a comparison: the verdict, four answers, then the curves, tables and settings behind them."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from fp8train.report import page
from fp8train.report.answers import answers
from fp8train.report.arm_rows import arm_name
from fp8train.report.costs import memory_section, speed_section
from fp8train.report.gaps import gap_section, stability_section
from fp8train.report.layers import layers_section
from fp8train.report.page import code, typeset
from fp8train.report.results import loss_section
from fp8train.report.run_record import Arms, RunRecord, first_run
from fp8train.report.sentence import judged_arms
from fp8train.report.setup import configuration_section, coverage_section, environment_section, method
from fp8train.units import count_text, short_count_text

COUNTED = (
    "counted while training over all linears; attention, norms, embedding lookup and loss are none and stay out of FP8"
)


def build_report(verdict: Mapping[str, Any], arms: Arms) -> str:
    """The report as one HTML document.

    Args:
        verdict: content of verdict.json.
        arms: arm -> seed -> run, as the verdict was made from; the baseline comes first.
    """
    logged, every = "metrics.jsonl of each run", _size_words(verdict)
    sections = {
        "loss": ("Loss", f"{logged}; {every}", loss_section(verdict, arms)),
        "gap": ("Gap", f"verdict.json, made of {logged}; {every}", gap_section(verdict)),
        "speed": ("Speed", f"{logged}, on {_device(arms)}", speed_section(verdict, arms)),
        "memory": ("Memory", f"result.json of each run, on {_device(arms)}", memory_section(verdict, arms)),
        "coverage": ("FP8 coverage", f"coverage.json of each run, {COUNTED}", coverage_section(verdict, arms)),
        "stability": ("Stability", f"result.json and {logged}; {every}", stability_section(verdict)),
        "layers": ("Worst layers", f"{logged} (telemetry)", layers_section(verdict, arms)),
        "configuration": ("Configuration", "config.yaml and recipe.yaml of each run", configuration_section(arms)),
        "environment": ("Environment", "environment.json of each run", environment_section(arms)),
        "method": ("How the numbers are made", "", [method()]),
    }
    links = "".join(f'<a href="#{key}">{html.escape(heading)}</a>' for key, (heading, *_) in sections.items())
    header = _header(verdict, arms) + f'<nav aria-label="Sections">{links}</nav>'
    body = "\n".join(
        page.section(key, heading, page.paragraph(f"From {source}.", "source") if source else "", *parts)
        for key, (heading, source, parts) in sections.items()
    )
    folders = ", ".join(code(run.path.as_posix()) for runs in arms.values() for run in runs.values())
    labels = " and ".join(verdict["arms"][arm]["label"] for arm in arms)
    return page.page(
        title=f"{labels} compared", header=header, body=body, footer=f"Written by fp8train from {folders}."
    )


def _header(verdict: Mapping[str, Any], arms: Arms) -> str:
    first = first_run(arms)
    model = first.config.get("model") or {}
    facts = [str(model.get("name") or "model"), f"{short_count_text(first.result.get('parameters'))} parameters"]
    facts += [_size_words(verdict), _device(arms), _date(first)]
    eyebrow = "".join(f"<span>{typeset(fact)}</span>" for fact in facts if fact and not fact.startswith("- "))
    judged = judged_arms(verdict)
    status = f'<span class="status">{html.escape(verdict["status"].capitalize())}</span>' if len(judged) == 1 else ""
    heading = f"<h1>{typeset(verdict['sentence'])}</h1>"
    numbers = "\n".join(page.paragraph(line, "lead") for line in verdict["numbers"])
    caveats = "".join(f"<li>{typeset(line)}</li>" for line in verdict["caveats"])
    return (
        f'<div class="eyebrow">{status}{eyebrow}</div>\n{heading}\n{numbers}\n{_tiles(verdict, arms)}\n'
        f'<ul class="caveats">{caveats}</ul>\n'
    )


def _tiles(verdict: Mapping[str, Any], arms: Arms) -> str:
    """The four answers, each with a line for every arm that is judged."""
    return page.tiles(
        [
            (question, section, [(arm_name(verdict, arm) * (len(of) > 1), *answer) for arm, answer in of.items()])
            for question, section, of in answers(verdict, arms)
        ]
    )


def _size_words(verdict: Mapping[str, Any]) -> str:
    """`3 seeds of 60 steps, 46,080 tokens each`."""
    seeds, learned = len(verdict["seeds"]), verdict["learning"]
    count = f"{seeds} seeds" if seeds > 1 else "1 seed"
    steps = f"{count_text(learned['steps'])} step{'s' * (learned['steps'] != 1)}"
    return f"{count} of {steps}, {count_text(verdict['shared'][0]['tokens_seen'])} tokens{' each' * (seeds > 1)}"


def _device(arms: Arms) -> str:
    run = first_run(arms)
    return str((run.environment.get("device") or {}).get("name") or run.result.get("device") or "unknown device")


def _date(run: RunRecord) -> str:
    return str(run.environment.get("date") or run.environment.get("started") or "")[:10]
