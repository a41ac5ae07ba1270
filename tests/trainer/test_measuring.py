"""The row of a step: rates by hand, and the model FLOPs utilisation where the device's peak is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fp8train.distributed import World
from fp8train.metrics import peak_flops
from fp8train.models import flops_per_token
from fp8train.trainer.measuring import step_row
from fp8train.trainer.step import StepResult
from tests.tiny_run import tiny_config

RESULT = StepResult(loss=3.0, grad_norm=1.5, valid_tokens=1, updated=True, stop=False)


@pytest.mark.parametrize("ranks", [1, 2])
def test_utilisation_is_that_of_all_ranks_peaks(ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, world = tiny_config(tmp_path), World(world_size=ranks)
    monkeypatch.setattr("fp8train.trainer.measuring.device_name", lambda device: "NVIDIA H200")
    row = step_row(config, world, 4, RESULT, 1e-3, 0.25)
    peak = peak_flops("NVIDIA H200")
    assert peak is not None
    assert row.pop("mfu") == pytest.approx(flops_per_token(config.model, 64) * 2048 / (ranks * peak), rel=1e-12)
    assert row == {
        "step": 4, "loss": 3.0, "lr": 1e-3, "grad_norm": 1.5, "tokens_seen": 2048, "tokens_per_second": 2048.0,
        "step_seconds": 0.25,
    }  # fmt: skip


def test_a_device_without_a_known_peak_has_no_utilisation(tmp_path: Path) -> None:
    assert torch.device("cpu") == World().device
    assert "mfu" not in step_row(tiny_config(tmp_path), World(), 1, RESULT, 1e-3, 0.25)
