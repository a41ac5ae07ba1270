"""Runs of a comparison that diverged: which ones, in words, and what they make of an arm's verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]  # measures or pairs of verdict.json, one a seed, each with `seed` and `diverged`


def finished(rows: Rows) -> Rows:
    """Those that statistics are made over: what did not diverge; all of them, without a loss, where nothing is left."""
    return [row for row in rows if not row["diverged"]] or rows


def lost_steps(run: Mapping[str, Any]) -> int:
    """Skipped steps of a run; where it does not say, its logged steps without a finite loss."""
    return int(run["nonfinite_losses"] if run["skipped_steps"] is None else run["skipped_steps"])


def diverged_seeds(entry: Mapping[str, Any]) -> set[int]:
    """Seeds in which an arm diverged."""
    return {run["seed"] for run in entry["runs"] if run["diverged"]}


def any_diverged(verdict: Mapping[str, Any]) -> bool:
    """Whether a run of any arm did."""
    return any(map(diverged_seeds, verdict["arms"].values()))


def judged(test: Mapping[str, Any], base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The test of an arm, with the status and reason that its and the baseline's divergence give it; else as it is.

    "diverged" where the arm did in a seed in which the baseline did not, and never the other way round; "inconclusive"
    where only the baseline did, or both in the same or in different seeds. What is left of the seeds is no fair sample.

    Args:
        test: of the seeds that both finished.
        base, own: entries of verdict.json's arms.
    """
    base_seeds, own_seeds = diverged_seeds(base), diverged_seeds(own)
    if not base_seeds | own_seeds:
        return dict(test)
    if base_seeds < own_seeds:
        status, worse = "diverged", sorted(own_seeds - base_seeds)
        where = f"seed{'s' * (len(worse) > 1)} {', '.join(map(str, worse))}"
        reason = f"{base['label']}, with the same weights and tokens, did not diverge in {where}"
    else:
        status, too = "inconclusive", " too" * bool(own_seeds)
        reason = (
            f"since {base['label']} diverged{too}, the settings may be the cause, and not the precision: lower optim.lr"
        )
    return {**test, "status": status, "reason": reason, "seeds_needed": None, "seeds_needed_if_equal": None}
