"""A device without enough memory ends a run in words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fp8train.distributed import World
from fp8train.errors import TrainingError
from fp8train.trainer import Trainer
from fp8train.trainer.console import Console
from fp8train.trainer.out_of_memory import told_when_out_of_memory
from tests.tiny_run import tiny_config

TORCHS = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.80 GiB of which 1 GiB is free."
)


class Full(Trainer):
    def _step(self, stop: bool):
        if self.progress.step == 3:
            raise torch.OutOfMemoryError(TORCHS)
        return super()._step(stop)


def test_step_and_remedies_are_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as told:
        Full(tiny_config(tmp_path), World(), Console(enabled=False)).run()
    assert str(told.value) == (
        "after step 3: the cpu memory does not suffice: no room for 2.00 GiB more; needs less to be held at a time. "
        "Take fewer sequences at once (micro_batch_samples, now 8), or activation_checkpointing=selective or full, or "
        "weight_copies=one, or optim=adamw_bf16_moments, or more ranks that share the weights (parallel=fsdp). "
        "fp8train explain says what each takes."
    )


@pytest.mark.parametrize("moments", ["optim=adamw_bf16_moments", "recipe=deepseek_v3"])
def test_what_is_in_use_is_no_remedy(tmp_path: Path, moments: str) -> None:
    used = ("micro_batch_samples=1", "activation_checkpointing=full", "parallel=fsdp", moments)
    config = tiny_config(tmp_path, *used)
    with pytest.raises(TrainingError) as told, told_when_out_of_memory(config, World(rank=1, world_size=2), lambda: 0):
        raise torch.OutOfMemoryError("no memory. None at all")
    words = str(told.value)
    assert "after step 0: the cpu memory of rank 1 does not suffice: no memory; needs" in words
    assert "Take more ranks that share the weights (parallel=fsdp). fp8train explain" in words
