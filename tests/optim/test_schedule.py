"""Schedules against values worked out by hand at their corners."""

from __future__ import annotations

import math

import pytest

from fp8train.errors import ConfigError
from fp8train.optim.config import OptimConfig
from fp8train.optim.schedule import learning_rate, warmup_steps

WSD = {"schedule": "wsd", "warmup_steps": 10, "decay_steps": 20, "min_lr_ratio": 0.0}
# lr 1.0 throughout, so that a value is the factor. 1e-12: a handful of FP64 roundings of numbers near 1.
CASES = {
    "warmup_first": ({"warmup_steps": 10}, 0, 100, 0.1),
    "warmup_last": ({"warmup_steps": 10}, 9, 100, 1.0),
    "no_warmup": ({"warmup_steps": 0}, 0, 100, 1.0),
    "warmup_fraction": ({"warmup_fraction": 0.1}, 4, 100, 0.5),
    "run_shorter_than_warmup": ({"warmup_steps": 1000}, 49, 50, 0.05),
    "one_step": ({"warmup_steps": 0}, 0, 1, 1.0),
    "cosine_start": ({"warmup_steps": 10, "min_lr_ratio": 0.1}, 10, 110, 1.0),
    "cosine_quarter": ({"warmup_steps": 10, "min_lr_ratio": 0.0}, 35, 110, 0.5 + math.sqrt(2) / 4),
    "cosine_half": ({"warmup_steps": 10, "min_lr_ratio": 0.1}, 60, 110, 0.55),
    "cosine_end": ({"warmup_steps": 10, "min_lr_ratio": 0.1}, 110, 110, 0.1),
    "beyond_a_run_shorter_than_warmup": ({"warmup_steps": 1000}, 700, 50, 0.05),
    "cosine_beyond": ({"warmup_steps": 10, "min_lr_ratio": 0.1}, 500, 110, 0.1),
    "linear_quarter": ({"schedule": "linear", "warmup_steps": 0, "min_lr_ratio": 0.2}, 25, 100, 0.8),
    "linear_last": ({"schedule": "linear", "warmup_steps": 0, "min_lr_ratio": 0.0}, 99, 100, 0.01),
    "linear_end": ({"schedule": "linear", "warmup_steps": 0, "min_lr_ratio": 0.0}, 100, 100, 0.0),
    "constant_late": ({"schedule": "constant", "warmup_steps": 5}, 99, 100, 1.0),
    "constant_beyond": ({"schedule": "constant", "warmup_steps": 5}, 1000, 100, 1.0),
    "wsd_stable_last": (WSD, 79, 100, 1.0),
    "wsd_decay_first": (WSD, 80, 100, 1.0),
    "wsd_linear_half": (WSD, 90, 100, 0.5),
    "wsd_cosine_quarter": ({**WSD, "decay_shape": "cosine"}, 85, 100, 0.5 + math.sqrt(2) / 4),
    "wsd_1-sqrt_quarter": ({**WSD, "decay_shape": "1-sqrt", "min_lr_ratio": 0.1}, 85, 100, 0.55),
    "wsd_1-sqrt_end": ({**WSD, "decay_shape": "1-sqrt", "min_lr_ratio": 0.1}, 100, 100, 0.1),
    "wsd_fraction": ({"schedule": "wsd", "decay_fraction": 0.5, "min_lr_ratio": 0.0}, 75, 100, 0.5),
    "wsd_no_decay": ({**WSD, "decay_steps": 0, "min_lr_ratio": 0.1}, 99, 100, 1.0),
    "wsd_all_decay": ({**WSD, "warmup_steps": 50, "decay_steps": 50}, 75, 100, 0.5),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "step", "total", "want"), CASES.values(), ids=CASES.keys())
def test_learning_rate_at_corners(changes, step, total, want):
    assert learning_rate(OptimConfig(lr=1.0, **changes), step, total) == pytest.approx(want, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_rate_never_rises_after_warmup_nor_leaves_its_range(schedule):
    config = OptimConfig(lr=2e-3, schedule=schedule, warmup_steps=7, min_lr_ratio=0.1)
    rates = [learning_rate(config, step, 60) for step in range(70)]
    assert max(rates) == 2e-3
    assert all(later <= earlier for earlier, later in zip(rates[6:], rates[7:], strict=False))
    assert min(rates[7:]) >= 2e-4 * (1 - 1e-12)


def test_stable_part_of_wsd_does_not_depend_on_the_length_of_the_run():
    config = OptimConfig(schedule="wsd", warmup_steps=10, decay_steps=20)
    assert [learning_rate(config, step, 100) for step in range(80)] == [
        learning_rate(config, step, 400) for step in range(80)
    ]


def test_wsd_that_does_not_fit_is_refused_with_the_number_that_fits():
    with pytest.raises(ConfigError, match="60 warmup and 50 decay steps in a run of 100.*raise steps to 110"):
        learning_rate(OptimConfig(schedule="wsd", warmup_steps=60, decay_steps=50), 0, 100)


@pytest.mark.parametrize(("step", "total"), [(-1, 10), (0, 0)], ids=["negative_step", "empty_run"])
def test_step_outside_a_run_is_refused(step, total):
    with pytest.raises(ValueError, match="needs step >= 0"):
        learning_rate(OptimConfig(), step, total)


def test_warmup_steps_prefers_the_number_over_the_fraction():
    assert warmup_steps(OptimConfig(warmup_steps=3, warmup_fraction=0.5), 100) == 3
    assert warmup_steps(OptimConfig(warmup_fraction=0.5), 100) == 50
