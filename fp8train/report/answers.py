"""The four questions that a report is opened with, each answered in a few words by what the data of an arm bear out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fp8train.backends.coverage import GEMMS
from fp8train.report.comparable import NOT_COMPARABLE
from fp8train.report.conclusion import mean
from fp8train.report.coverage_summary import LinearGroup, exceptions, group_linears, merged_coverage
from fp8train.report.divergence import diverged_seeds, finished, lost_steps
from fp8train.report.run_record import Arms
from fp8train.report.sentence import gap_words, judged_arms
from fp8train.units import count_text, percent_text, ratio_text

LOSS_ANSWERS = {
    "equivalent": "Yes, within {margin:g} %",
    "inferior": "No, worse",
    "superior": "Better",
    "inconclusive": "Open",
    "indicative": "Unproven",
    "undecided": "Cannot be told",
    "diverged": "No, it diverged",
}


Answer = tuple[str, str]  # in a few words, and what it rests on


def answers(verdict: Mapping[str, Any], arms: Arms) -> list[tuple[str, str, dict[str, Answer]]]:
    """(question, section of the report that shows the answer, judged arm -> answer) of every question."""
    asked: list[tuple[str, str, Callable[[str], Answer]]] = [
        ("Is it faster?", "speed", lambda arm: _speed(verdict, arm)),
        ("Is the loss as good?", "gap" if len(verdict["seeds"]) > 1 else "loss", lambda arm: _loss(verdict, arm)),
        ("Which layers ran in FP8?", "coverage", lambda arm: _coverage(verdict, arms, arm)),
        ("Did it survive?", "stability", lambda arm: _survival(verdict, arm)),
    ]
    return [(question, section, {arm: of(arm) for arm in judged_arms(verdict)}) for question, section, of in asked]


def _speed(verdict: Mapping[str, Any], arm: str) -> Answer:
    comparison, runs = verdict["comparisons"][arm], verdict["arms"][arm]["runs"]
    speed, found = comparison["speed"], comparison["mean"]
    if speed["not_quoted"] is not None:
        return NOT_COMPARABLE.capitalize(), speed["not_quoted"].partition(",")[0]  # the rest stands among the caveats
    if speed["raw"] is None:
        return "Unknown", "no seed was finished by both arms"
    detail = f"tokens per second, {ratio_text(found['time_to_loss_ratio'])} to the same loss"
    if found["time_to_loss_ratio"] is None:
        detail = "tokens per second; time to the same loss unknown"
    if speed["raw"]["low"] is not None:
        detail += f"; 95 % interval {speed['raw']['low']:.2f} to {speed['raw']['high']:.2f}"
    detail += "; on a machine without FP8 units" * any(run["emulates"] for run in runs)
    return ratio_text(speed["raw"]["mean"]), detail


def _loss(verdict: Mapping[str, Any], arm: str) -> Answer:
    test = verdict["comparisons"][arm]["test"]
    answer = LOSS_ANSWERS[test["status"]].format(margin=test["margin"])
    detail = "a loss is not finite" if test["mean"] is None else gap_words(test)
    return answer, detail + ", one seed" * (len(verdict["seeds"]) == 1)


def _coverage(verdict: Mapping[str, Any], arms: Arms, arm: str) -> Answer:
    share = mean(finished(verdict["arms"][arm]["runs"]))["fp8_flops_share"]
    if not share:
        return ("Unknown", "the runs counted no GEMMs") if share is None else ("None", "no GEMM ran in FP8")
    coverage = merged_coverage({seed: run.coverage for seed, run in arms[arm].items()})
    found = _outside(exceptions(group_linears(coverage)))
    return percent_text(100 * share, digits=1), "of the FLOPs of all linears" + f"; not {', '.join(found)}" * bool(
        found
    )


def _outside(groups: Sequence[LinearGroup]) -> list[str]:
    """Which linears had a GEMM outside FP8, of one outcome and reason together: `lm_head`, `wgrad of 14 linears`."""
    members: dict[tuple[tuple[str, ...], str, bool], list[str]] = {}
    for group in groups:
        gemms = tuple(gemm for gemm, fp8 in group.fp8.items() if not fp8)
        members.setdefault((gemms, group.reason or group.rule, group.changed), []).extend(group.fqns)
    return [
        (f"{' and '.join(gemms)} of " if len(gemms) < len(GEMMS) else "")
        + (fqns[0] if len(fqns) == 1 else f"{len(fqns)} linears")
        + f" throughout ({reason})" * changed
        for (gemms, reason, changed), fqns in members.items()
    ]


def _survival(verdict: Mapping[str, Any], arm: str) -> Answer:
    own, base = verdict["arms"][arm], verdict["arms"][verdict["baseline"]]
    runs, lost = own["runs"], len(diverged_seeds(own))
    if lost:
        count = len(diverged_seeds(base)) or "none"
        return "No", f"{lost} of {len(runs)} runs diverged; of {base['label']} {count}"
    skipped, spikes = sum(map(lost_steps, runs)), sum(run["spikes"] for run in runs)
    steps = count_text(min(run["steps"] for run in finished(runs)))
    whole = f"{len(runs)} of {len(runs)} runs" if len(runs) > 1 else "its run"
    words = f"{whole} finished {steps} steps; {count_text(skipped)} skipped, {count_text(spikes)} spikes of the loss"
    return "Yes", f"{words} ({count_text(sum(run['spikes'] for run in base['runs']))} of {base['label']})"
