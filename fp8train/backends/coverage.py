"""Which GEMMs ran in which precision, counted by the ops themselves as they run.

The ops are opaque to torch.compile, so this count is what was executed, compiled or not; what activation checkpointing
repeats in backward is left out, so that a share of FLOPs is the same with it and without. What a run reports is of its
own steps, over interruptions, each once: CoverageLog (trainer/assembly.py) takes steps out that an alarm undid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

GEMMS = ("fprop", "dgrad", "wgrad")
NOT_COUNTED = 0  # site of a GEMM that belongs to no converted linear


@dataclass(slots=True)
class GemmCount:
    """Executions of one GEMM of one linear; rows are tokens, so that FLOPs = 2 * rows * N * K."""

    fp8_calls: int = 0
    other_calls: int = 0
    fp8_rows: int = 0
    other_rows: int = 0

    def plus(self, other: GemmCount, times: int = 1) -> GemmCount:
        """The sum of this count and so many times the other."""
        return GemmCount(*(getattr(self, key) + times * getattr(other, key) for key in COUNTED))


COUNTED = tuple(GemmCount.__dataclass_fields__)
Counts = Mapping[int, Mapping[str, GemmCount]]  # {site: {"fprop": GemmCount, ...}}


class CoverageCounter:
    """Counts of every (site, GEMM) since the last reset. A site is the number that a converted linear carries."""

    def __init__(self) -> None:
        self._counts: dict[tuple[int, str], GemmCount] = {}
        self._reasons: dict[tuple[int, str], str] = {}
        self._changes: dict[int, str] = {}

    def add(self, site: int, gemm: str, rows: int, fp8: bool) -> None:
        """Record one execution over `rows` tokens."""
        if site == NOT_COUNTED:
            return
        count = self._counts.get((site, gemm))
        if count is None:
            count = self._counts[site, gemm] = GemmCount()
        if fp8:
            count.fp8_calls += 1
            count.fp8_rows += rows
        else:
            count.other_calls += 1
            count.other_rows += rows

    def reset(self) -> None:
        """Forget all counts; reasons and changes stay."""
        self._counts.clear()

    def explain(self, site: int, gemm: str, reason: str) -> None:
        """Say why a GEMM has nothing to do, such as "its weight is frozen"."""
        self._reasons[site, gemm] = reason

    def reason(self, site: int, gemm: str) -> str | None:
        """What `explain` said of a GEMM."""
        return self._reasons.get((site, gemm))

    def change(self, site: int, what: str | None) -> None:
        """Say what a run has made of a linear's precision and why, or None while it is that of its rule."""
        if what is None:
            self._changes.pop(site, None)
        else:
            self._changes[site] = what

    def changed(self, site: int) -> str | None:
        """What `change` said last."""
        return self._changes.get(site)

    def snapshot(self) -> Counts:
        """A copy of the counts."""
        sites: dict[int, dict[str, GemmCount]] = {}
        for (site, gemm), count in self._counts.items():
            sites.setdefault(site, {})[gemm] = GemmCount().plus(count)
        return sites


COUNTS = CoverageCounter()
