"""What tables and figures of a report go through: runs arm by arm, and the cells that name them."""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fp8train.report.page import Column, typeset
from fp8train.report.run_record import Arms, RunRecord
from fp8train.units import count_text

LONG_RUN_ROWS = 2000  # from here the first steps would flatten the rest of the loss curve


def slots(verdict: Mapping[str, Any]) -> dict[str, int]:
    """Arm -> number of its colour: 0 the baseline, 2 the placebo, 1 the arm that is judged, wherever each stands; from
    3 on further arms.
    """
    fixed = {verdict["primary"]: 1, verdict["placebo"]: 2, verdict["baseline"]: 0}
    further = itertools.cycle((3, 4, 5))
    return {arm: fixed[arm] if arm in fixed else next(further) for arm in verdict["arms"]}


def runs_of(arms: Arms) -> Iterable[tuple[str, int, RunRecord]]:
    """(arm, index of the seed, run) of every run."""
    return ((arm, index, run) for arm, runs in arms.items() for index, run in enumerate(runs.values()))


def whole(runs: Mapping[int, RunRecord]) -> Mapping[int, RunRecord]:
    """The runs of an arm that its curves are of: those that did not diverge; all up to there, where none is left."""
    return {seed: run for seed, run in runs.items() if run.diverged is None} or runs


def measured_runs(verdict: Mapping[str, Any]) -> Iterable[tuple[str, int, Mapping[str, Any]]]:
    """(arm, index of the seed, measures) of every run."""
    return ((arm, index, run) for arm, entry in verdict["arms"].items() for index, run in enumerate(entry["runs"]))


def pair_of(verdict: Mapping[str, Any], arm: str, index: int) -> Mapping[str, Any]:
    """The comparison of a run with the baseline; empty for the baseline itself."""
    return verdict["comparisons"][arm]["seeds"][index] if arm in verdict["comparisons"] else {}


def run_columns(verdict: Mapping[str, Any], *names: str) -> list[Column]:
    """Columns of a table with one row a run: arm, seed where there are several, then numbers."""
    seeds = ["Seed"] if len(verdict["seeds"]) > 1 else []
    return [Column(heading="Arm"), *(Column(heading=name, number=True) for name in (*seeds, *names))]


def arm_name(verdict: Mapping[str, Any], arm: str) -> str:
    """The arm's label behind a swatch of its colour, as HTML."""
    color = f"background:var(--series-{slots(verdict)[arm]})"
    name = f'<span class="swatch" style="{color}"></span>{html.escape(verdict["arms"][arm]["label"])}'
    return f'<span class="key">{name}</span>'


def run_row(verdict: Mapping[str, Any], arm: str, run: Mapping[str, Any], cells: Sequence[str]) -> list[str]:
    """Cells of a table made by run_columns: arm, seed where there are several, then `cells` (plain text)."""
    return [
        arm_name(verdict, arm),
        *[str(run["seed"])] * (len(verdict["seeds"]) > 1),
        *(typeset(cell) for cell in cells),
    ]


def or_baseline(pair: Mapping[str, Any], text: str) -> str:
    """The text of a difference; what stands in its place in the baseline's row."""
    return text if pair else "baseline"


def thinned(arms: Arms) -> str:
    """Words for a caption where the curves have more points than are drawn."""
    longest = max(len(run.train) for *_, run in runs_of(arms))
    return f", as the range from lowest to highest ({count_text(longest)} steps)" if longest > LONG_RUN_ROWS else ""
