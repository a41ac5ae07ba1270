"""What all seeds of one arm say together: the equivalence test, the placebo beside it, speed with its interval."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from fp8train.report.statistics import ALPHA, MAX_SEEDS, equivalence, interval, ratio_interval, seeds_needed
from fp8train.units import percent_text, signed_text

Pairs = Sequence[Mapping[str, Any]]  # one for each seed, as verdict.pair_measures gives them

ONE_SEED = "with one seed the spread between seeds is unknown, so the gap cannot be told from chance"
HELD_OUT, TRAINING = "held-out loss", "smoothed training loss"
SPEED_KEYS = {"raw": "tokens_per_second_ratio", "time_to_loss": "time_to_loss_ratio"}  # of a pair


def gap_test(pairs: Pairs, margin: float, doubt: str | None, alpha: float = ALPHA) -> dict[str, Any]:
    """The two one-sided tests on the relative gaps of all seeds.

    Args:
        pairs: the arm against the baseline.
        margin: in percent of the baseline's loss.
        doubt: why no gap means anything against that margin (learning.py); None where one does.
        alpha: of each test.

    Returns:
        status and reason: those of the test, or "undecided" and the doubt; quantity: which loss; count, mean, sd, low,
        high, confidence: of the gaps in percent; margin; p_equivalent, p_worse; seeds_needed: in all, if the measured
        gap is the true one, and seeds_needed_if_equal: if there is none (None: one seed, more than MAX_SEEDS, or
        undecided, where more seeds would not help).
    """
    evaluated = all(pair["heldout_gap"]["step"] is not None for pair in pairs if not pair["diverged"])
    quantity = HELD_OUT if evaluated else TRAINING
    gaps = [
        pair["heldout_gap"]["percent"] if evaluated else pair["relative_loss_error"]["ema_final_percent"]
        for pair in pairs
    ]
    known = [gap for gap in gaps if gap is not None]
    result: dict[str, Any] = {"quantity": quantity, "margin": margin, "gaps": gaps}
    planned: dict[str, int | None] = {"seeds_needed": None, "seeds_needed_if_equal": None}
    if not known:
        missing: dict[str, str | None] = dict.fromkeys(("mean", "sd", "low", "high", "p_equivalent", "p_worse"))
        several = len(gaps) > 1
        missing |= {"status": "inconclusive" if several else "indicative"}
        reason = "a loss is not finite at the end of every seed"
        return {**result, "reason": reason, "count": 0, "confidence": 1 - 2 * alpha, **missing, **planned}
    found = equivalence(known, margin, alpha)
    status: str = found.status
    if len(known) < len(gaps):  # a seed that diverged is no gap of zero: nothing definite is said
        status = "inconclusive" if len(gaps) > 1 else "indicative"
    undecided = doubt is not None and len(known) == len(gaps)  # that a seed diverged says more
    if found.interval.sd is not None and not undecided:  # more seeds decide nothing there
        planned["seeds_needed"] = seeds_needed(found.interval.mean, found.interval.sd, margin, alpha)
        planned["seeds_needed_if_equal"] = seeds_needed(0.0, found.interval.sd, margin, alpha)
    result |= {"status": status, **dataclasses.asdict(found.interval), **planned}
    result |= {"p_equivalent": found.p_equivalent, "p_worse": found.p_worse}
    if undecided:
        return result | {"status": "undecided", "reason": doubt}
    return result | {"reason": _reason(result, len(gaps) - len(known))}


def against_placebo(pairs: Pairs, placebo: Pairs, quantity: str) -> dict[str, Any] | None:
    """The arm's gap less the placebo's, in percent, over the seeds that have both; None where a seed that did not
    diverge lacks one, or none is left.
    """
    key = ("heldout_gap", "percent") if quantity == HELD_OUT else ("relative_loss_error", "ema_final_percent")
    left = [rows for rows in zip(pairs, placebo, strict=True) if not any(row["diverged"] for row in rows)]
    both = [(new[key[0]][key[1]], base[key[0]][key[1]]) for new, base in left]
    if not both or any(new is None or base is None for new, base in both):
        return None
    return dataclasses.asdict(interval([new - base for new, base in both]))


def speed_ratios(pairs: Pairs) -> dict[str, Any]:
    """Speed against the baseline over all seeds: `raw` tokens per second, and `time_to_loss`, which divides it by the
    tokens that the arm needs more for the same loss, as mean_ratio has it.
    """
    return {name: mean_ratio([pair[key] for pair in pairs]) for name, key in SPEED_KEYS.items()}


def mean_ratio(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Geometric mean over the seeds with its 95 % interval (statistics.Interval); None where a seed has no ratio."""
    known = [value for value in values if value is not None and value > 0]
    return dataclasses.asdict(ratio_interval(known)) if known and len(known) == len(values) else None


def mean(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean over seeds of every number, in nested mappings too; None where a seed has none; what is not a number is
    left out.
    """
    result: dict[str, Any] = {}
    for key, first in rows[0].items():
        values: list[Any] = [row.get(key) for row in rows]
        if isinstance(first, Mapping):
            result[key] = mean([value or {} for value in values])
        elif key not in ("seed", "step", "ema_max_step", "from_step") and all(
            value is None or type(value) in (int, float) for value in values
        ):
            result[key] = None if any(value is None for value in values) else sum(values) / len(values)
    return result


def interval_text(test: Mapping[str, Any]) -> str:
    """`-0.12 to +0.30 %`; `unknown` for one seed."""
    if test["low"] is None:
        return "unknown"
    return f"{signed_text(test['low'], 2)} to {percent_text(test['high'], signed=True)}"


def more_seeds(test: Mapping[str, Any]) -> str:
    """How many more seeds would decide; '' where that is not the question."""
    if test["status"] != "inconclusive" or test["sd"] is None:
        return ""
    if_equal, at_measured = (_more(test[key], test["count"]) for key in ("seeds_needed_if_equal", "seeds_needed"))
    text = f"{if_equal} would decide it if the true gap is zero, {at_measured} if it is the measured one"
    return text if text.startswith("over") else f"about {text}"


def _more(needed: int | None, count: int) -> str:
    if needed is None:
        return f"over {MAX_SEEDS:,} more seeds"
    more = max(1, needed - count)
    return f"{more} more seed{'s' * (more > 1)}"


def _reason(test: Mapping[str, Any], diverged: int) -> str:
    """Why the status is what it is, in words that end a sentence."""
    margin = f"+-{test['margin']:g} %"
    if test["status"] == "indicative":
        return ONE_SEED
    if diverged:
        return f"the loss of {diverged} of {diverged + test['count']} seeds is not finite at the end"
    where = {
        "equivalent": f"lies within {margin}",
        "inferior": f"lies above {margin}",
        "superior": f"lies below {margin}",
        "inconclusive": f"reaches over an edge of {margin}",
    }[test["status"]]
    text = f"the {100 * test['confidence']:.0f} % interval of the gap {where}"
    if test["status"] == "inconclusive":
        text += f"; {more_seeds(test)}"
    return text
