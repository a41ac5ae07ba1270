"""Checkpoints: written whole or not at all, checked when read, resumed bit for bit."""

from fp8train.checkpoint.store import Checkpoint, TrainingState, find_resume, open_checkpoint, save_checkpoint

__all__ = ["Checkpoint", "TrainingState", "find_resume", "open_checkpoint", "save_checkpoint"]
