"""How a checkpoint is written: ranks write parts of it, rank 0 the rest; then it has its name, and older ones go."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fp8train.checkpoint.content import Content
from fp8train.checkpoint.files import (
    begin_folder,
    clear_temporary,
    discard_folder,
    part_of_folder,
    remove_folder,
    whole_folder,
)
from fp8train.checkpoint.store import (
    FOLDER,
    MODEL,
    OPTIMIZER,
    STATE_FILE,
    TrainingState,
    checkpoint_path,
    next_sequence,
    saved_steps,
    tensor_file,
)
from fp8train.errors import CheckpointError


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """Which checkpoints stay when another is whole.

    last: number of the newest, that one included; None: all. every: those at multiples of this step besides.
    step: that of this step besides.
    """

    last: int | None = None
    every: int | None = None
    step: int | None = None

    def superfluous(self, saved: Sequence[int]) -> list[int]:
        """Those of the saved steps, in the order in which they were written, that do not stay."""
        old = [] if self.last is None else saved[: -self.last]
        return [step for step in old if step != self.step and (not self.every or step % self.every)]


def write_tensors(folder: Path, content: Content, part: int, parts: int) -> None:
    """Write a part of the tensors into a folder that begin_folder has made.

    Args:
        content: of the part, as own_part gave it.

    Raises:
        CheckpointError: disk full or folder not writable.
    """
    tied, parameters = json.dumps(content.tied), json.dumps(content.parameters)
    with part_of_folder(folder, part) as writer:
        writer.write_tensors(tensor_file(MODEL, part, parts), content.weights, {"format": "pt", "tied": tied})
        moments = {"format": "pt", "parameters": parameters}
        writer.write_tensors(tensor_file(OPTIMIZER, part, parts), content.moments, moments)


def finish(
    folder: Path,
    run_dir: Path,
    step: int,
    state: TrainingState,
    parts: int,
    retention: Retention,
    wait: Callable[[], None],
) -> Path:
    """Make a checkpoint whole, then remove those that need not stay. On one rank only.

    Args:
        folder: that begin_folder has made for it.
        parts: number of them, which are written, or are being written meanwhile.
        wait: called while they are not all there; raises to give up.

    Returns:
        Path: the folder.

    Raises:
        CheckpointError: disk full or folder not writable; earlier checkpoints stay.
    """
    target = checkpoint_path(run_dir, step)
    with whole_folder(folder, step, next_sequence(run_dir), parts, wait) as writer:
        writer.write_json(STATE_FILE, asdict(state))
    try:
        clear_temporary(run_dir / FOLDER)
        for old in retention.superfluous(saved_steps(run_dir)):
            remove_folder(checkpoint_path(run_dir, old))
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {error.filename}: cannot be removed: {error.strerror}; needs a writable run_dir. "
            f"{target} is whole."
        ) from error
    return target


def write_checkpoint(
    run_dir: str | Path, step: int, content: Content, state: TrainingState, retention: Retention = Retention()
) -> Path:
    """Write checkpoints/step_%08d of a run folder from one process, for a model that is not sharded.

    Returns:
        Path: the folder.

    Raises:
        CheckpointError: disk full or folder not writable; nothing half-written is left and earlier checkpoints stay.
    """
    run_dir = Path(run_dir)
    folder = begin_folder(checkpoint_path(run_dir, step))
    try:
        write_tensors(folder, content, 0, 1)
        return finish(folder, run_dir, step, state, 1, retention, wait=lambda: None)
    except BaseException:
        discard_folder(folder)
        raise
