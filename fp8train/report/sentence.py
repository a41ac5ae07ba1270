"""One comparison in one sentence, for the console and the top of the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fp8train.report.conclusion import NOT_COMPARABLE, interval_text, mean
from fp8train.report.divergence import diverged_seeds, diverged_sentence
from fp8train.units import count_text, loss_text, percent_text, ratio_text


def sentence(verdict: Mapping[str, Any], arm: str) -> str:
    """That of an arm of verdict.json."""
    comparison = verdict["comparisons"][arm]
    label, base_label = verdict["arms"][arm]["label"], verdict["arms"][comparison["against"]]["label"]
    test, average = comparison["test"], comparison["mean"]
    entries = [verdict["arms"][name] for name in (comparison["against"], arm)]
    if any(map(diverged_seeds, entries)):
        return diverged_sentence(test, *entries)
    new, base = (mean(verdict["arms"][name]["runs"]) for name in (arm, comparison["against"]))
    keys = ("eval_loss", "train_loss") if test["quantity"] == "held-out loss" else ("train_loss_ema", "train_loss")
    loss, base_loss = new[keys[0]], base[keys[0]]
    ended = loss is not None and base_loss is not None and (keys[0] == "eval_loss" or new[keys[1]] is not None)
    if test["mean"] is None or not ended:
        return f"{label} cannot be held against {base_label}: a loss is not finite at the end."
    after, gap = _after(new["steps"]), f"{percent_text(test['mean'], signed=True)} {test['quantity']}"
    if test["status"] == "undecided":
        short = verdict["learning"]["in_short"]
        text = f"{label} against {base_label} is undecided {after}: {short}; the gap is {gap}"
    elif test["status"] == "indicative":
        losses = f"({loss_text(loss)} against {loss_text(base_loss)} nats per token)"
        text = f"{label} ended {_above(test['mean'])} {base_label} in {test['quantity']} {losses} {after}"
    else:
        margin = f"{test['margin']:g} %"
        claim = {
            "equivalent": f"is equivalent to {base_label} within {margin}",
            "inferior": f"is worse than {base_label} by more than {margin}",
            "superior": f"is better than {base_label} by more than {margin}",
            "inconclusive": f"is not yet told from {base_label} at a margin of {margin}",
        }[test["status"]]
        text = f"{label} {claim}: {gap} ({_interval_words(test)} over {test['count']} seeds) {after}"
    return f"{text}{_cost_words(average, comparison)}."


def _cost_words(average: Mapping[str, Any], comparison: Mapping[str, Any]) -> str:
    """Speed and memory against the baseline; in place of what cannot be quoted, why not."""
    names = {"speed": ("tokens_per_second_ratio", "tokens per second"), "memory": ("peak_memory_ratio", "peak memory")}
    doubts = {name: comparison[name]["not_quoted"] for name in names}
    cost = [
        f"{ratio_text(average[key])} its {what}"
        for name, (key, what) in names.items()
        if average[key] is not None and doubts[name] is None
    ]
    words = f", at {' and '.join(cost)}" if cost else ""
    of_reason: dict[str, list[str]] = {}
    for name, doubt in doubts.items():
        if doubt is not None:
            of_reason.setdefault(doubt, []).append(name)
    return words + "".join(f"; {' and '.join(of)} {NOT_COMPARABLE}: {doubt}" for doubt, of in of_reason.items())


def _interval_words(test: Mapping[str, Any]) -> str:
    return f"{100 * test['confidence']:.0f} % interval {interval_text(test)}"


def _after(steps: float) -> str:
    return f"after {count_text(steps)} step{'s' * (steps != 1)}"


def _above(gap: float) -> str:
    if abs(gap) < 0.005:
        return "level with"
    return f"{percent_text(abs(gap))} {'above' if gap > 0 else 'below'}"
