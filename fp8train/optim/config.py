"""What the optimizer, the learning-rate schedule and gradient clipping are told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fp8train.errors import ConfigError

MOMENTS = ("auto", "fp32", "bf16")
SCHEDULES = ("cosine", "linear", "wsd", "constant")
DECAY_SHAPES = ("linear", "cosine", "1-sqrt")


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW with warmup, a schedule and global-norm clipping.

    lr: peak learning rate.
    betas: decay of the first and of the second moment.
    eps: added to the root of the second moment.
    weight_decay: decoupled decay of matrices; norms, biases and embeddings have none.
    moments: fp32, bf16, or auto for what the recipe says (fp32 where it says nothing).
    schedule: cosine, linear, wsd (warmup, stable, decay) or constant; each begins with the warmup.
    warmup_steps: steps of linear warmup; null takes warmup_fraction of all steps.
    warmup_fraction: warmup as a part of all steps, in [0, 1).
    min_lr_ratio: learning rate after the last step, as a part of lr.
    decay_steps: length of the final decay of wsd; null takes decay_fraction of all steps.
    decay_fraction: final decay of wsd as a part of all steps, in [0, 1].
    decay_shape: linear, cosine or 1-sqrt: how wsd decays.
    clip_grad_norm: largest global gradient norm; null leaves gradients as they are.
    max_nonfinite_steps: this many steps in a row with a non-finite loss or gradient end the run.
    max_nonfinite_share: as do more than this share of the last 100 steps.
    """

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    moments: str = "auto"
    schedule: str = "cosine"
    warmup_steps: int | None = None
    warmup_fraction: float = 0.02
    min_lr_ratio: float = 0.1
    decay_steps: int | None = None
    decay_fraction: float = 0.2
    decay_shape: str = "linear"
    clip_grad_norm: float | None = 1.0
    max_nonfinite_steps: int = 10
    max_nonfinite_share: float = 0.5

    def __post_init__(self) -> None:
        self.betas = tuple(self.betas)  # type: ignore[assignment]  # OmegaConf hands over a list
        two = len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas)
        _need(two, "betas", self.betas, "two numbers in [0, 1)", "[0.9,0.95]")
        _need(0 < self.lr < math.inf, "lr", self.lr, "a finite number above 0", "3e-4")
        _need(0 < self.eps < math.inf, "eps", self.eps, "a finite number above 0", "1e-8")
        _need(0 <= self.weight_decay < math.inf, "weight_decay", self.weight_decay, "at least 0", "0.1")
        _need_one_of("moments", self.moments, MOMENTS)
        _need_one_of("schedule", self.schedule, SCHEDULES)
        _need_one_of("decay_shape", self.decay_shape, DECAY_SHAPES)
        warmup, decay, clip, share = self.warmup_steps, self.decay_steps, self.clip_grad_norm, self.max_nonfinite_share
        _need(warmup is None or warmup >= 0, "warmup_steps", warmup, "at least 0, or null", "100")
        _need(0 <= self.warmup_fraction < 1, "warmup_fraction", self.warmup_fraction, "a number in [0, 1)", "0.02")
        _need(0 <= self.min_lr_ratio <= 1, "min_lr_ratio", self.min_lr_ratio, "a number in [0, 1]", "0.1")
        _need(decay is None or decay >= 0, "decay_steps", decay, "at least 0, or null", "1000")
        _need(0 <= self.decay_fraction <= 1, "decay_fraction", self.decay_fraction, "a number in [0, 1]", "0.2")
        _need(clip is None or 0 < clip < math.inf, "clip_grad_norm", clip, "a finite number above 0, or null", "1.0")
        _need(0 < share <= 1, "max_nonfinite_share", share, "more than 0 and at most 1", "0.5")
        _need(self.max_nonfinite_steps >= 1, "max_nonfinite_steps", self.max_nonfinite_steps, "at least 1", "10")


def _need(good: bool, name: str, got: Any, want: str, remedy: str) -> None:
    if not good:
        raise ConfigError(f"optim.{name}: is {got}; needs {want}. Set optim.{name}={remedy}.")


def _need_one_of(name: str, got: str, choices: tuple[str, ...]) -> None:
    _need(got in choices, name, repr(got), f"one of {', '.join(choices)}", choices[0])
