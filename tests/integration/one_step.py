"""Gradients of the first step of a run, as training computes them; started alone or by torchrun. Not a test itself."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from fp8train.checkup.subject import KeepGradients
from fp8train.config import load_config
from fp8train.data import Batcher, build_dataset
from fp8train.distributed import init, unwrap
from fp8train.trainer.assembly import assemble, spread
from fp8train.trainer.step import train_step


def main(argv: Sequence[str]) -> None:
    """Save the gradients and the loss of step 0 to argv[0]; the rest is the configuration."""
    config = load_config(argv[1:])
    with init(60) as world:
        dataset = build_dataset(config.data, config.seq_len, config.seed)
        size = config.micro_batch(world.world_size)
        batcher = Batcher(dataset, config.global_batch_samples, size, world.rank, world.world_size)
        model = spread(assemble(config, world.device).model, config, world)
        optimizer = KeepGradients(unwrap(model))
        result = train_step(model, optimizer, batcher.micro_batches(0), world, clip=None)
        if world.main:
            torch.save({"gradients": optimizer.gradients, "loss": result.loss}, argv[0])


if __name__ == "__main__":
    main(sys.argv[1:])
