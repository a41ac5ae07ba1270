"""A run that nothing tells from another but numbers in the last bits: how far such runs part is the spread of a run."""

from __future__ import annotations

from pathlib import Path

import torch

from fp8train.config import RunConfig
from fp8train.distributed import World
from fp8train.metrics import read_metrics
from fp8train.trainer import Trainer
from fp8train.trainer.console import Console

RELATIVE = 1e-6


class PerturbedTrainer(Trainer):
    """Starts from weights that differ by a relative 1e-6 (normal, drawn from `seed`)."""

    def __init__(self, config: RunConfig, seed: int = 0) -> None:
        super().__init__(config, World(), Console(enabled=False))
        self._seed = seed

    def _build(self) -> None:
        super()._build()
        generator = torch.Generator().manual_seed(self._seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(1 + RELATIVE * torch.randn(parameter.shape, generator=generator))


def losses(run_dir: Path) -> torch.Tensor:
    """Training loss of every logged step, fp64."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    return torch.tensor([row["loss"] for row in rows if "loss" in row], dtype=torch.float64)
