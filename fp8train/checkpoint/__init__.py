"""Checkpoints: written whole or not at all, checked when read, resumed bit for bit."""

from fp8train.checkpoint.content import gathered_content
from fp8train.checkpoint.store import (
    Checkpoint,
    TrainingState,
    find_resume,
    open_checkpoint,
    save_checkpoint,
    write_checkpoint,
)

__all__ = [
    "Checkpoint",
    "TrainingState",
    "find_resume",
    "gathered_content",
    "open_checkpoint",
    "save_checkpoint",
    "write_checkpoint",
]
