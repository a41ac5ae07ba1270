"""Watcher: follows the recipe's schedule of precisions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fp8train.data import Batch
from fp8train.trainer.precision_control import PrecisionControl
from fp8train.trainer.step import StepResult
from fp8train.trainer.watcher import Watcher


class ScheduleWatcher(Watcher):
    """Before each step gives every linear the precision that it has there: a function of the step and of demotions.

    Args:
        control: shared with the alarm.
        info: takes a line when the schedule changes something.
    """

    name = "schedule"

    def __init__(self, control: PrecisionControl, info: Callable[[str], None]) -> None:
        self._control = control
        self._info = info
        self._now: str | None = None

    def before_step(self, step: int, batches: Sequence[Batch]) -> None:
        """Set the precisions of this step."""
        changed = self._control.apply(step)
        name = self._control.scheduled(step)
        if name != self._now:
            what = f"the schedule puts {changed} linears in {name}" if name else "back to the precisions of the rules"
            self._info(f"step {step}: {what}")
            self._now = name

    def after_step(self, step: int, result: StepResult) -> dict[str, Any]:
        """The scheduled precision, in the row of every step that has one."""
        return {} if self._now is None else {"scheduled_precision": self._now}
