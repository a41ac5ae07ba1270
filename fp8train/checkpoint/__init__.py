"""Checkpoints: written whole or not at all, checked when read, resumed bit for bit."""

from fp8train.checkpoint.content import Content, content_of
from fp8train.checkpoint.store import (
    Checkpoint,
    TrainingState,
    checkpoint_path,
    find_resume,
    open_checkpoint,
    saved_steps,
)
from fp8train.checkpoint.writing import Retention, write_checkpoint

__all__ = [
    "Checkpoint",
    "Content",
    "Retention",
    "TrainingState",
    "checkpoint_path",
    "content_of",
    "find_resume",
    "open_checkpoint",
    "saved_steps",
    "write_checkpoint",
]
