"""The trainer: one loop, and its parts by what they do."""

from fp8train.trainer.loop import Trainer

__all__ = ["Trainer"]
