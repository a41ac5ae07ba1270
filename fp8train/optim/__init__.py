"""Optimizer, learning-rate schedule and gradient clipping."""

from __future__ import annotations

from fp8train.optim.adamw import (
    AdamWBF16Moments,
    build_optimizer,
    checkpoint_bytes,
    parameter_groups,
    set_learning_rate,
)
from fp8train.optim.clipping import clip_grad_norm, global_norm
from fp8train.optim.config import OptimConfig
from fp8train.optim.schedule import learning_rate, warmup_steps

__all__ = [
    "AdamWBF16Moments",
    "OptimConfig",
    "build_optimizer",
    "checkpoint_bytes",
    "clip_grad_norm",
    "global_norm",
    "learning_rate",
    "parameter_groups",
    "set_learning_rate",
    "warmup_steps",
]
