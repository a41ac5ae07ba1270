"""Samples of telemetry as rows of metrics, back again, and as a table of the worst."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fp8train.conversion_report import align
from fp8train.telemetry.statistics import STATS

PREFIX = "fp8/"
COLUMNS_KEY = "fp8/columns"
WHAT_IF_KEY = "fp8/what_if"
SECONDS_KEY = "fp8/seconds"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Statistics of one operand at one step.

    Args:
        step: of the run.
        fqn: module path of the linear.
        operand: "x", "w" or "dy"; "x.T", "w.T" or "dy.T" where wgrad or dgrad reads other blocks.
        stats: by the names of STATS; None where one is not defined.
        what_if: the linear does not quantise it; the numbers say what would happen if it did.
    """

    step: int
    fqn: str
    operand: str
    stats: Mapping[str, float | None]
    what_if: bool

    @property
    def badness(self) -> tuple[bool, float]:
        """Larger is worse: non-finite values first, then the error of the worst rows."""
        error = self.stats.get("row_error_p99")
        return bool(self.stats.get("nonfinite")) or error is None, error or 0.0


def to_row(values: Mapping[str, Sequence[float | None]], what_if: Collection[str], seconds: float) -> dict[str, Any]:
    """What a sampled step adds to its row of metrics: a list of numbers for each operand, their names once.

    {"fp8/columns": ["amax", ...], "fp8/layers.0.mlp.up_proj/x": [3.1, ...], "fp8/what_if": ["lm_head"], "fp8/seconds":
    0.01}
    """
    row: dict[str, Any] = {COLUMNS_KEY: list(STATS)}
    row |= {PREFIX + key: list(numbers) for key, numbers in values.items()}
    return row | {WHAT_IF_KEY: list(what_if), SECONDS_KEY: float(f"{seconds:.4g}")}


def samples(row: Mapping[str, Any]) -> Iterator[Sample]:
    """The samples in a row of metrics; none where the step was not sampled."""
    columns = row.get(COLUMNS_KEY, STATS)
    what_if = set(row.get(WHAT_IF_KEY, ()))
    for key, numbers in row.items():
        fqn, _, operand = key.removeprefix(PREFIX).rpartition("/")
        if key.startswith(PREFIX) and fqn:
            stats = dict(zip(columns, numbers, strict=True))
            yield Sample(step=row["step"], fqn=fqn, operand=operand, stats=stats, what_if=fqn in what_if)


def first_nonfinite(found: Sequence[Sample]) -> Sample | None:
    """The sample at which non-finite numbers turn up first; None if there are none.

    Args:
        found: of one pass, in the order of the model.
    """
    broken = [sample for sample in found if sample.stats["nonfinite"]]
    backward = [sample for sample in broken if sample.operand.startswith("dy")]
    forward = [sample for sample in broken if sample not in backward]
    return forward[0] if forward else backward[-1] if backward else None


def worst(found: Iterable[Sample], count: int) -> list[Sample]:
    """The samples that lose most, worst first; ties in the order of their names."""
    return sorted(found, key=lambda s: (-s.badness[0], -s.badness[1], s.fqn, s.operand))[:count]


def worst_table(row: Mapping[str, Any]) -> str:
    """The operands that lose most precision in a sampled row, and those in BF16 that would lose most."""
    every = list(samples(row))
    lines = [["operand", "precision", "amax", "flushed %", "saturated %", "non-finite", "SQNR dB", "row error p99 %",
              "max %", "kurtosis"]]  # fmt: skip
    chosen = worst([s for s in every if not s.what_if], 10) + worst([s for s in every if s.what_if], 3)
    for sample in chosen:
        stats = sample.stats
        numbers = [
            _text(stats["amax"]),
            _text(stats["underflow_frac"], 100),
            _text(stats["saturated_frac"], 100),
            _text(stats["nonfinite"]),
            _text(stats["sqnr_db"]),
            _text(stats["row_error_p99"], 100),
            _text(stats["row_error_max"], 100),
            _text(stats["kurtosis"]),
        ]
        lines.append([f"{sample.fqn} {sample.operand}", "what if" if sample.what_if else "quantised", *numbers])
    return align(lines, right=lines[0][2:])


def _text(value: float | None, factor: float = 1.0) -> str:
    return "-" if value is None else f"{factor * value:.3g}"
