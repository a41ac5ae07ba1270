"""When a run writes a checkpoint by the clock, what it puts into one, and which one an alarm goes back to."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fp8train.checkpoint import (
    Checkpoint,
    Retention,
    TrainingState,
    checkpoint_path,
    find_resume,
    open_checkpoint,
    saved_steps,
)
from fp8train.config import RunConfig, config_to_dict
from fp8train.errors import CheckpointError
from fp8train.recipe import Recipe
from fp8train.trainer.progress import Progress
from fp8train.units import bytes_text


class SaveClock:
    """Whether so many minutes have passed since the last checkpoint, or since this was made.

    Each rank has its own; they agree in the step's collective, as on a request to stop.

    Args:
        minutes: None is never.
    """

    def __init__(self, minutes: float | None) -> None:
        self._seconds = None if minutes is None else 60 * minutes
        self._since = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether a checkpoint is to be written after the current step."""
        return self._seconds is not None and time.monotonic() - self._since >= self._seconds

    def restart(self) -> None:
        """Count from here: a checkpoint has been written."""
        self._since = time.monotonic()


def training_state(
    config: RunConfig,
    recipe: Recipe,
    progress: Progress,
    data: Mapping[str, Any],
    random_states: Sequence[Mapping[str, str]],
) -> TrainingState:
    """What the checkpoint of a run's current step holds beside tensors; nothing that changes as the run goes on.

    Args:
        data: what is to be found again in the data set by a resume.
        random_states: of every rank, in rank order.
    """
    return TrainingState(
        config=config_to_dict(config),
        recipe_document=recipe.document,
        recipe_text=recipe.text,
        recipe_hash=recipe.hash,
        progress=dataclasses.asdict(progress),
        data_position={**data, "sample": progress.step * config.global_batch_samples},
        random_states=[dict(state) for state in random_states],
    )


def retention(config: RunConfig, recipe: Recipe, progress: Progress) -> Retention:
    """Which checkpoints stay when that of a run's current step is whole."""
    return Retention(
        last=None if progress.nonfinite_in_a_row else config.checkpoint.keep_last,
        every=config.checkpoint.keep_every,
        step=None if recipe.alarm is None else progress.return_step,
    )


def checkpoints_to_come(config: RunConfig, progress: Progress, there: Sequence[int], *, alarm: bool) -> int:
    """By how many the checkpoints on the disk will outnumber those that are there, at the most.

    That is when the last one is being written, beside those that are kept; the clock is taken to ask for those before.

    Args:
        progress: where the run begins.
        there: steps of the checkpoints in the folder, in the order in which they were written.
        alarm: the recipe has one.
    """
    settings, step = config.checkpoint, progress.step
    first = [step] if alarm and step not in there else []
    every = settings.every or config.steps
    by_steps = range(step - step % every + every, config.steps, every)
    by_clock = range(max(step + 1, config.steps - settings.keep_last), config.steps if settings.minutes else 0)
    coming = [*first, *sorted({*by_steps, *by_clock})]
    written = set(coming)
    saved = [step for step in there if step not in written] + coming
    removed = Retention(last=settings.keep_last, every=settings.keep_every).superfluous(saved)
    beside = 1 if alarm and by_clock else 0  # what the alarm goes back to, when the clock's are the newest
    return max(1, len(saved) - len(removed) + beside + 1 - len(there))


def check_room(run_dir: Path, config: RunConfig, progress: Progress, each_bytes: int, alarm: bool) -> None:
    """Refuse to train where the checkpoints have no room; a run overnight must not find out in the morning.

    Args:
        each_bytes: of one checkpoint. progress, alarm: see checkpoints_to_come.

    Raises:
        CheckpointError: the disk has less than that left.
    """
    number = checkpoints_to_come(config, progress, saved_steps(run_dir), alarm=alarm)
    folder = next(folder for folder in (run_dir.absolute(), *run_dir.absolute().parents) if folder.exists())
    free, needed = shutil.disk_usage(folder).free, number * each_bytes
    if free >= needed:
        return
    what, fewer = "one checkpoint", ""
    if number > 1:
        what = f"{number} more checkpoints of {bytes_text(each_bytes)}, those that are kept and the one being written"
        fewer = "keep fewer (checkpoint.keep_last, checkpoint.keep_every), "
    raise CheckpointError(
        f"run_dir: the disk of {folder} has {bytes_text(free)} free; needs {bytes_text(needed)} for {what}. Make room, "
        f"{fewer}or give a run_dir on another disk."
    )


def return_point(run_dir: Path, step: int | None) -> tuple[Checkpoint, bool]:
    """(the checkpoint that an alarm goes back to, whether it is the run's newest).

    That is the newest which neither clock nor stop wrote, or the undone steps would depend on how fast they ran; the
    newest of all where there is no such one.

    Args:
        step: Progress.return_step.
    """
    newest = find_resume(run_dir, "auto")
    assert newest is not None, "training under an alarm begins with a checkpoint"
    if step is None or step == newest.step or not checkpoint_path(run_dir, step).is_dir():
        return newest, True
    try:
        return open_checkpoint(checkpoint_path(run_dir, step)), False
    except CheckpointError:  # damaged since
        return newest, True
