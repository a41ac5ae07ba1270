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


def build_watchers(
    config: RunConfig, assembly: Assembly, world: World, run_dir: Path, warn: Callable[[str], None]
) -> list[Watcher]:
    """The watchers that the configuration asks for, in the order in which they are called."""
    return []
