"""One comparison in words, the same for verdict.json, the console and the top of the report: a headline of about ten
words, the numbers in one line for each arm, and what to mind when reading them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fp8train.report.comparable import NOT_COMPARABLE
from fp8train.report.conclusion import TRAINING, interval_text
from fp8train.report.divergence import diverged_seeds, lost_steps
from fp8train.report.looks import looks_words
from fp8train.units import count_text, loss_text, percent_text, ratio_text


def judged_arms(verdict: Mapping[str, Any]) -> list[str]:
    """The arms that the verdict is about: neither baseline nor placebo; the placebo where there is no other."""
    others = [arm for arm in verdict["arms"] if arm != verdict["baseline"]]
    return [arm for arm in others if arm != verdict["placebo"]] or others


def common_status(verdict: Mapping[str, Any]) -> dict[str, str]:
    """`status` and `reason` of the verdict: those of its judged arms, "mixed" and each one's where they differ."""
    tests = {verdict["arms"][arm]["label"]: verdict["comparisons"][arm]["test"] for arm in judged_arms(verdict)}
    statuses, reasons = ({test[key] for test in tests.values()} for key in ("status", "reason"))
    each = "; ".join(f"{label}: {test['reason']}" for label, test in tests.items())
    return {
        "status": statuses.pop() if len(statuses) == 1 else "mixed",
        "reason": reasons.pop() if len(reasons) == 1 else each,
    }


def headline(verdict: Mapping[str, Any]) -> str:
    """What came out, in one short sentence; of several arms how many fared how."""
    arms, base = judged_arms(verdict), verdict["arms"][verdict["baseline"]]
    if len(arms) == 1:
        return _headline(verdict["comparisons"][arms[0]]["test"], verdict["arms"][arms[0]], base)
    found = Counter(verdict["comparisons"][arm]["test"]["status"] for arm in arms)
    return (
        f"{len(arms)} arms against {base['label']}: " + ", ".join(f"{n} {status}" for status, n in found.items()) + "."
    )


def numbers(verdict: Mapping[str, Any]) -> list[str]:
    """The gap of each judged arm, with speed and memory where they can be quoted."""
    arms = judged_arms(verdict)
    if len(arms) == 1:
        text = _numbers(verdict, arms[0])
        return [text[:1].upper() + text[1:]]
    named = {arm: f"{verdict['arms'][arm]['label']}, {verdict['comparisons'][arm]['test']['status']}" for arm in arms}
    return [f"{name}: {_numbers(verdict, arm)}" for arm, name in named.items()]


def caveats(verdict: Mapping[str, Any]) -> list[str]:
    """What to mind: why the verdict is what it is, what chance does, what was learned, what could not be compared, and
    what went wrong on the way.
    """
    arms, placebo = judged_arms(verdict), verdict["comparisons"].get(verdict["placebo"] or "", {}).get("test")
    comparisons = [verdict["comparisons"][arm] for arm in arms]
    lines = _by_arm(verdict, arms, [str(comparison["test"]["reason"]) for comparison in comparisons])
    tested = placebo is not None and placebo["low"] is not None and verdict["learning"]["doubt"] is None
    if tested and verdict["placebo"] not in arms:
        lines.append(f"Of the placebo, which shows chance alone, the interval is {interval_text(placebo)}.")
    lines += _by_arm(verdict, arms, [_not_comparable(comparison) for comparison in comparisons])
    lines += [line for entry in verdict["arms"].values() if (line := _losses(entry))]
    return [*lines, str(verdict["learning"]["scope"]), *looks_words(verdict["looks"])]


def _headline(test: Mapping[str, Any], own: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    label, base_label = own["label"], base["label"]
    if diverged_seeds(own) or diverged_seeds(base):
        of = len(own["runs"])
        counts = [len(diverged_seeds(entry)) or "none" for entry in (own, base)]
        return f"{label} diverged in {counts[0]} of {of} seed{'s' * (of > 1)}, {base_label} in {counts[1]}."
    if test["mean"] is None:
        return f"{label} cannot be held against {base_label}."
    which = " in training loss" * (test["quantity"] == TRAINING)
    margin = f"{test['margin']:g} %{which}"
    return {
        "undecided": f"This comparison cannot tell {label} from {base_label}.",
        "indicative": f"{label} ended {_above(test['mean'])} {base_label}{which}, in one seed.",
        "equivalent": f"{label} is equivalent to {base_label} within {margin}.",
        "inferior": f"{label} is worse than {base_label} by more than {margin}.",
        "superior": f"{label} is better than {base_label} by more than {margin}.",
        "inconclusive": f"Whether {label} matches {base_label} within {margin} is open.",
    }[str(test["status"])]


def _numbers(verdict: Mapping[str, Any], arm: str) -> str:
    comparison = verdict["comparisons"][arm]
    own, base = (verdict["arms"][name] for name in (arm, verdict["baseline"]))
    test = comparison["test"]
    if test["mean"] is None:
        return "no loss to compare, since one is not finite at the end."
    over = gap_words(test)
    if len(own["runs"]) == 1:
        key = "train_loss_ema" if test["quantity"] == TRAINING else "eval_loss"
        over += f" ({loss_text(own['runs'][0][key])} against {loss_text(base['runs'][0][key])} nats per token)"
    steps = min(run["steps"] for run in own["runs"] if len(own["runs"]) == 1 or not run["diverged"])
    return f"{over} after {count_text(steps)} step{'s' * (steps != 1)}{_cost_words(comparison, base['label'])}."


def gap_words(test: Mapping[str, Any]) -> str:
    """`+0.07 % held-out loss (90 % interval -0.42 to +0.57 % over 3 seeds)`."""
    text = f"{percent_text(test['mean'], signed=True)} {test['quantity']}"
    if test["low"] is None:
        return text + f" over the 1 of {len(test['gaps'])} seeds that both finished" * (len(test["gaps"]) > 1)
    over = f"over {'the ' * (test['count'] < len(test['gaps']))}{test['count']} seeds"
    over += " that both finished" * (test["count"] < len(test["gaps"]))
    return f"{text} ({100 * test['confidence']:.0f} % interval {interval_text(test)} {over})"


def _cost_words(comparison: Mapping[str, Any], base_label: str) -> str:
    """Speed and memory against the baseline, where they can be quoted."""
    names = {"speed": ("tokens_per_second_ratio", "tokens per second"), "memory": ("peak_memory_ratio", "peak memory")}
    average = comparison["mean"]
    cost = [
        f"{ratio_text(average[key])} its {what}"
        for name, (key, what) in names.items()
        if average[key] is not None and comparison[name]["not_quoted"] is None
    ]
    return f", at {' and '.join(cost)}".replace("its", f"{base_label}'s", 1) if cost else ""


def _not_comparable(comparison: Mapping[str, Any]) -> str:
    """Why speed or memory are not quoted; '' where both are."""
    of_reason: dict[str, list[str]] = {}
    for name in ("speed", "memory"):
        if (doubt := comparison[name]["not_quoted"]) is not None:
            of_reason.setdefault(doubt, []).append(name)
    return "; ".join(f"{' and '.join(of)} {NOT_COMPARABLE}: {doubt}" for doubt, of in of_reason.items())


def _losses(entry: Mapping[str, Any]) -> str:
    """Runs, steps and lines of an arm that are missing from its numbers, in a sentence; '' where none is."""
    runs = entry["runs"]
    found = [
        f"seed {run['seed']} diverged at step {count_text(end['step'])} ({end['reason']})"
        for run in runs
        if (end := run["diverged"])
    ]
    skipped = sum(lost_steps(run) for run in runs if not run["diverged"])  # of others they are why it diverged
    counts = {
        "skipped steps, whose loss or gradient was not finite": skipped,
        "damaged lines of metrics left out": sum(run["damaged_lines"] for run in runs),
    }
    found += [f"{words}: {count_text(count)}" for words, count in counts.items() if count]
    return f"{entry['label']}: {'; '.join(found)}." if found else ""


def _by_arm(verdict: Mapping[str, Any], arms: Sequence[str], texts: Sequence[str]) -> list[str]:
    """A sentence for each text that is there, with the arms that it is of where there are several."""
    lines = []
    for text in dict.fromkeys(text for text in texts if text):
        of = [verdict["arms"][arm]["label"] for arm, own in zip(arms, texts, strict=True) if own == text]
        lines.append(f"{', '.join(of)}: {text}." if len(of) < len(arms) else f"{text[:1].upper()}{text[1:]}.")
    return lines


def _above(gap: float) -> str:
    if abs(gap) < 0.005:
        return "level with"
    return f"{percent_text(abs(gap))} {'above' if gap > 0 else 'below'}"
