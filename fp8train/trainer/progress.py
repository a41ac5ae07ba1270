"""How far a run is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fp8train.checkpoint import TrainingState


@dataclass(kw_only=True, slots=True)
class Progress:
    """How far a run is; part of every checkpoint.

    step: optimizer steps done, skipped ones included
    skipped_steps: steps whose loss or gradient was not finite
    nonfinite_in_a_row: of them, those at the end
    recent_skips: of them, those among the last 100 steps, by their numbers
    told_skips: how many of those the console has told of
    train_seconds: time in steps, also in those that an alarm undid
    loss: of the last step; null where it was not finite
    stream_sum: StreamHash of all steps, over all ranks
    init_hash: of the weights before the first step
    return_step: of the checkpoint that an alarm goes back to, the newest that neither clock nor stop wrote; null: not
        known
    watchers: state of each watcher, by its name
    coverage: what CoverageLog.counts() gave
    coverage_of_all_ranks: always; a checkpoint of an earlier version does not say so and has the counts of one rank
    """

    step: int = 0
    skipped_steps: int = 0
    nonfinite_in_a_row: int = 0
    recent_skips: list[int] = field(default_factory=list)
    told_skips: int = 0
    train_seconds: float = 0.0
    loss: float | None = None
    stream_sum: int = 0
    init_hash: str = ""
    return_step: int | None = None
    watchers: dict[str, dict[str, Any]] = field(default_factory=dict)
    coverage: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    coverage_of_all_ranks: bool = True


def saved_progress(state: TrainingState) -> Progress:
    """How far the run of a checkpoint was; an earlier version's counts of one rank become those of all its ranks."""
    values = dict(state.progress)
    if "coverage_of_all_ranks" not in values:
        ranks = max(1, len(state.random_states))
        values["coverage"] = {
            fqn: {gemm: [ranks * number for number in numbers] for gemm, numbers in gemms.items()}
            for fqn, gemms in values.get("coverage", {}).items()
        }
    return Progress(**values)
