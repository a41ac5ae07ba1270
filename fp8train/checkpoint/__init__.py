"""Checkpoints: written whole or not at all, checked when read, resumed bit for bit."""

from fp8train.checkpoint.content import Content, gathered_content
from fp8train.checkpoint.store import (
    Checkpoint,
    TrainingState,
    checkpoint_path,
    find_resume,
    open_checkpoint,
    saved_steps,
    superfluous,
    write_checkpoint,
)

__all__ = [
    "Checkpoint",
    "Content",
    "TrainingState",
    "checkpoint_path",
    "find_resume",
    "gathered_content",
    "open_checkpoint",
    "saved_steps",
    "superfluous",
    "write_checkpoint",
]
