"""Learning rate of a step: linear warmup, then cosine, linear, warmup-stable-decay or constant."""

from __future__ import annotations

import math

from fp8train.errors import ConfigError
from fp8train.optim.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of the update that follows `step` earlier ones; depends on nothing else.

    With W warmup steps: step < W gives lr * (step + 1) / W. After it, with p the part of the decay that lies behind the
    step, lr * (r + (1 - r) * f(p)), r = min_lr_ratio, where f falls from f(0) = 1 to f(1) = 0:
    cosine (1 + cos(pi p)) / 2, linear 1 - p, 1-sqrt 1 - sqrt(p). The decay takes the steps W .. total_steps; in wsd it
    takes the last D steps, and the rate stays at lr before; constant never decays. p reaches 1 at step = total_steps:
    the last update of a run (step = total_steps - 1) still moves the weights when r = 0. A run shorter than its warmup
    ends inside the warmup.

    Args:
        step: updates done before, from 0. Beyond total_steps the rate stays where it ended.
        total_steps: updates of the whole run, at least 1.

    Raises:
        ConfigError: the decay of wsd would begin inside the warmup.
        ValueError: step is negative or total_steps is not positive.
    """
    if step < 0 or total_steps < 1:
        raise ValueError(f"learning_rate: step is {step} of {total_steps}; needs step >= 0 and total_steps >= 1.")
    warmup = warmup_steps(config, total_steps)
    decay_start = _decay_start(config, warmup, total_steps)
    if min(step, total_steps - 1) < warmup:
        return config.lr * min(step + 1, total_steps) / warmup
    if config.schedule == "constant" or step < decay_start:
        return config.lr
    progress = 1.0 if step >= total_steps else (step - decay_start) / (total_steps - decay_start)
    shape = config.decay_shape if config.schedule == "wsd" else config.schedule
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * _remaining(shape, progress))


def warmup_steps(config: OptimConfig, total_steps: int) -> int:
    """Steps of linear warmup in a run of total_steps."""
    return round(config.warmup_fraction * total_steps) if config.warmup_steps is None else config.warmup_steps


def _decay_start(config: OptimConfig, warmup: int, total_steps: int) -> int:
    """First step of the decay."""
    if config.schedule != "wsd":
        return warmup
    decay = round(config.decay_fraction * total_steps) if config.decay_steps is None else config.decay_steps
    if warmup + decay > total_steps:
        raise ConfigError(
            f"optim.schedule: wsd has {warmup} warmup and {decay} decay steps in a run of {total_steps}; "
            f"needs both to fit. Lower optim.warmup_steps or optim.decay_steps, or raise steps to {warmup + decay}."
        )
    return total_steps - decay


def _remaining(shape: str, progress: float) -> float:
    """Height of the decay curve: 1 at progress 0, 0 at progress 1."""
    if shape == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if shape == "linear":
        return 1.0 - progress
    assert shape == "1-sqrt", shape
    return 1.0 - math.sqrt(progress)
