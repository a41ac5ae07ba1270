"""Runs arm by arm, as figures and tables of a report go through them, and the tables with a row for each."""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fp8train.report import page
from fp8train.report.charts import key
from fp8train.report.drawing import SERIES
from fp8train.report.page import typeset
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


def compared_runs(verdict: Mapping[str, Any]) -> Iterable[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """(arm, measures, comparison with the baseline of its seed) of every run; no comparison of the baseline's own."""
    for arm, entry in verdict["arms"].items():
        pairs = verdict["comparisons"].get(arm, {}).get("seeds") or [{}] * len(entry["runs"])
        yield from ((arm, run, pair) for run, pair in zip(entry["runs"], pairs, strict=True))


def arm_name(verdict: Mapping[str, Any], arm: str) -> str:
    """The arm's label behind a swatch of its colour, as HTML."""
    return key([(SERIES[slots(verdict)[arm]], html.escape(verdict["arms"][arm]["label"]))])


def arm_table(
    verdict: Mapping[str, Any],
    caption: str,
    names: Sequence[str],
    rows: Iterable[tuple[str, Sequence[str]]],
    *,
    words: Sequence[str] = (),
) -> str:
    """A table with one row an arm: its name, then cells (plain text) under `names`; in `words` those of no numbers."""
    named = [[arm_name(verdict, arm), *map(typeset, cells)] for arm, cells in rows]
    return page.table(caption, ["Arm", *names], named, words=("Arm", *words))


def run_table(
    verdict: Mapping[str, Any],
    caption: str,
    names: Sequence[str],
    rows: Iterable[tuple[str, Mapping[str, Any], Sequence[str]]],
) -> str:
    """A table with one row a run: arm, seed where there are several, then cells under `names`.

    Args:
        rows: (arm, measures, cells).
    """
    several = len(verdict["seeds"]) > 1
    with_seed = [(arm, [*[str(run["seed"])] * several, *cells]) for arm, run, cells in rows]
    return arm_table(verdict, caption, [*["Seed"] * several, *names], with_seed)


def or_baseline(pair: Mapping[str, Any], text: str) -> str:
    """The text of a difference; what stands in its place in the baseline's row."""
    return text if pair else "baseline"


def thinned(arms: Arms) -> str:
    """Words for a caption where the curves have more points than are drawn."""
    longest = max(len(run.train) for *_, run in runs_of(arms))
    return f", as the range from lowest to highest ({count_text(longest)} steps)" if longest > LONG_RUN_ROWS else ""
