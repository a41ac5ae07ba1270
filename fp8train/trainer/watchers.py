"""The watchers of a run: which there are, and how they see a step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fp8train.config import RunConfig
from fp8train.distributed import World
from fp8train.trainer.alarm_watcher import AlarmWatcher
from fp8train.trainer.assembly import Assembly
from fp8train.trainer.blackbox import BlackBox
from fp8train.trainer.console import Console
from fp8train.trainer.precision_control import PrecisionControl
from fp8train.trainer.schedule_watcher import ScheduleWatcher
from fp8train.trainer.step import StepResult
from fp8train.trainer.strict_coverage import StrictCoverage
from fp8train.trainer.telemetry_watcher import TelemetryWatcher
from fp8train.trainer.watcher import RollBack, Watcher

NOTED = ("alarm", "blackbox")  # what a watcher adds to a row that must not be lost between two that are due


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
    config: RunConfig, assembly: Assembly, world: World, run_dir: Path, console: Console
) -> list[Watcher]:
    """The watchers that the configuration asks for, in the order in which they are called."""
    watchers: list[Watcher] = []
    alarm = assembly.recipe.alarm
    if assembly.recipe.schedule or alarm is not None:  # first, so that the others see the precisions of the step
        control = PrecisionControl(assembly.model, assembly.recipe, config.steps)
        watchers.append(ScheduleWatcher(control, console.info))
        if alarm is not None:
            watchers.append(AlarmWatcher(alarm, control, assembly, world, run_dir, console.warn))
            if config.checkpoint.every is None:
                console.warn("an alarm goes back to step 0, since checkpoint.every is null; set checkpoint.every=N")
    if config.strict:
        watchers.append(StrictCoverage(assembly, world, config.compile))
    if config.blackbox.keep:
        watchers.append(BlackBox(config, assembly, world, run_dir, console.warn))
    if config.telemetry.every is not None:
        watchers.append(TelemetryWatcher(config, assembly, world, console.info))
    return watchers
