"""Watchers: what looks at every step of a run beside the loop, each with a name and a state in the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from fp8train.config import RunConfig
from fp8train.data import Batch
from fp8train.distributed import World
from fp8train.trainer.assembly import Assembly
from fp8train.trainer.step import StepResult
from fp8train.trainer.strict_coverage import StrictCoverage
from fp8train.trainer.telemetry_watcher import TelemetryWatcher


class Watcher(Protocol):
    """Called on every rank, in the same order everywhere, so that it may communicate."""

    name: str

    def before_step(self, step: int, batches: Sequence[Batch]) -> None:
        """Before the forward pass of `step` (counted from 1), with this rank's micro-batches."""

    def after_step(self, step: int, result: StepResult) -> dict[str, Any]:
        """After the update; what it returns is added to the step's row of metrics."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as plain values that JSON can carry."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave; empty where the checkpoint knew no such watcher."""


class RollBack(Exception):
    """What after_step raises, on every rank alike, to go back to the last checkpoint of the run.

    Args:
        watcher: name of the one that raises it: it keeps its state, all others take back the checkpoint's.
        reason: for the console.
    """

    def __init__(self, watcher: str, reason: str) -> None:
        super().__init__(reason)
        self.watcher = watcher
        self.reason = reason


def after_step(watchers: Sequence[Watcher], step: int, result: StepResult, row: dict[str, Any]) -> RollBack | None:
    """Let every watcher see a step and add to its row; gives the request to undo the step, if there is one."""
    asked: RollBack | None = None
    for watcher in watchers:
        try:
            row |= watcher.after_step(step, result)
        except RollBack as request:
            asked = request
    return asked


def build_watchers(
    config: RunConfig,
    assembly: Assembly,
    world: World,
    run_dir: Path,
    warn: Callable[[str], None],
    info: Callable[[str], None],
) -> list[Watcher]:
    """The watchers that the configuration asks for, in the order in which they are called."""
    watchers: list[Watcher] = []
    if config.strict:
        watchers.append(StrictCoverage(assembly, world, config.compile))
    if config.telemetry.every is not None:
        watchers.append(TelemetryWatcher(config, assembly, world, info))
    return watchers
