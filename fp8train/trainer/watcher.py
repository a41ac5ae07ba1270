"""Watcher: what looks at every step of a run beside the loop, with a name and a state in the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fp8train.data import Batch
from fp8train.trainer.step import StepResult


class RollBack(Exception):
    """What after_step raises, on every rank alike, to go back to the last checkpoint of the run.

    reason: for the console.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Watcher:
    """Called on every rank, in the same order everywhere, so that it may communicate."""

    name: str

    def before_step(self, step: int, batches: Sequence[Batch]) -> None:
        """Before the forward pass of `step` (counted from 1), with this rank's micro-batches."""

    def after_step(self, step: int, result: StepResult) -> dict[str, Any]:
        """After the update; what it returns is added to the step's row of metrics."""
        return {}

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as plain values that JSON can carry."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave; empty where the checkpoint knew no such watcher."""

    def roll_back(self, step: int, state: dict[str, Any]) -> None:
        """Take back what `state` gave at that step, but for what says why the steps since are undone."""
        self.load_state(state)
