"""What a spike of the loss is; the black box and the report find the same ones."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fp8train.distributed import World
from fp8train.spikes import FEWEST, SIGMAS, WINDOW, count_spikes, spike_limit
from fp8train.trainer.assembly import assemble
from fp8train.trainer.blackbox import BlackBox
from fp8train.trainer.step import StepResult
from tests.tiny_run import tiny_config

FALL = 2.0 + 3.0 / np.sqrt(np.arange(1, 401))


def test_loss_that_leaps_is_a_spike_and_ripples_are_none() -> None:
    calm = [2.0 + 0.001 * (number % 5) for number in range(30)]
    noisy = [2.0 + 0.2 * math.sin(number) for number in range(30)]
    falling = [5.0 - 0.1 * number for number in range(30)]
    assert spike_limit(calm[: FEWEST - 1]) is None
    limit = spike_limit(calm)
    assert limit is not None and 2.19 < limit < 2.21  # 10 %, though the deviation is a thousandth
    wide = spike_limit(noisy)
    assert wide is not None and wide > max(noisy) + 0.1
    low = spike_limit(falling)
    assert low is not None and low < 2.6  # the losses at the beginning do not matter


def test_spikes_are_counted_once_each_and_noise_is_none() -> None:
    noise = FALL + 0.02 * np.random.default_rng(0).standard_normal(len(FALL))
    assert count_spikes(noise.tolist()) == 0
    spiked = noise.copy()
    spiked[[150, 151, 300]] += 1.0  # two steps in a row are one
    spiked[200] -= 1.0  # downwards is none
    assert count_spikes(spiked.tolist()) == 2
    assert count_spikes([2.0] * (FEWEST - 1) + [9.0]) == 0, "too short to know what is usual"


def test_spikes_of_a_long_run_are_found_in_every_part() -> None:
    loss = 2.0 + 0.02 * np.random.default_rng(1).standard_normal(20_000)
    loss[[5_000, 12_000, 19_000]] += 2.0
    assert count_spikes(loss.tolist()) == 3


def test_black_box_and_report_find_the_same_spikes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path, "data.holdout_fraction=0", "blackbox.keep=9")
    assert (config.blackbox.window, config.blackbox.spike_sigmas) == (WINDOW, SIGMAS)
    assembly = assemble(config, torch.device("cpu"))
    box = BlackBox(config, assembly, World(), tmp_path, lambda text: None)
    monkeypatch.setattr(box, "_write", lambda *arguments: None)
    losses = FALL + 0.1 * np.random.default_rng(2).standard_normal(len(FALL))
    losses[[80, 200, 320]] += [0.3, 2.0, 0.9]  # the first is within the noise
    dumped = []
    for step, loss in enumerate(losses.tolist()):
        result = StepResult(loss=loss, grad_norm=1.0, valid_tokens=1, updated=True, stop=False)
        dumped += [step] if box.after_step(step, result) else []
    assert dumped == [200, 320]
    assert count_spikes(losses.tolist()) == 2
