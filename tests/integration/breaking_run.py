"""A run under torchrun in which one rank finds a NaN in a weight; what the ranks made of it is saved. Not a test."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from fp8train.config import load_config
from fp8train.distributed import init
from fp8train.nn.weights import named_linears
from fp8train.shards import local
from fp8train.trainer import Trainer
from fp8train.trainer.assembly import parameter_hash
from fp8train.trainer.step import StepResult

BAD_STEP = 4
BAD_LINEAR = "layers.0.mlp.up_proj"


class Breaking(Trainer):
    """Before step 4, and once, the last rank finds a NaN in a weight."""

    broken = False

    def _step(self, stop: bool) -> StepResult:
        last = self.world.rank == self.world.world_size - 1
        if self.progress.step + 1 == BAD_STEP and last and not self.broken:
            self.broken = True
            with torch.no_grad():
                local(named_linears(self.model)[BAD_LINEAR].weight)[0, 0] = float("nan")
        return super()._step(stop)


def main(argv: Sequence[str]) -> None:
    """Train, and write each rank's precisions and hash of the weights to argv[0]; the rest is the configuration."""
    with init(60) as world:
        trainer = Breaking(load_config(argv[1:]), world)
        trainer.run()
        precisions = {fqn: linear.precision.name for fqn, linear in named_linears(trainer.model).items()}
        ranks = world.all_gather_object({"precisions": precisions, "weights": parameter_hash(trainer.model)})
        if world.main:
            Path(argv[0]).write_text(json.dumps(ranks), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
