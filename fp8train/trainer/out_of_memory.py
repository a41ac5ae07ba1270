"""A device whose memory does not suffice: which step met that, and what takes less."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from fp8train.config import RunConfig
from fp8train.distributed import World
from fp8train.errors import TrainingError
from fp8train.recipe import load_recipe
from fp8train.trainer.assembly import shards
from fp8train.trainer.footprint import moments_of


@contextmanager
def told_when_out_of_memory(config: RunConfig, world: World, step: Callable[[], int]) -> Iterator[None]:
    """Say in words what torch says where the device has no more memory for what is inside.

    Args:
        step: the last that is done.

    Raises:
        TrainingError: on the rank that met it; torchrun ends the others.
    """
    remedies = _remedies(config, world)  # before: the recipe's file may be another by then
    try:
        yield
    except torch.OutOfMemoryError as error:
        asked = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
        what = f"no room for {asked[1]} more" if asked else str(error).partition(".")[0]
        whose = f" of rank {world.rank}" if world.world_size > 1 else ""
        raise TrainingError(
            f"after step {step()}: the {world.device.type} memory{whose} does not suffice: {what}; needs less to be "
            f"held at a time. Take {', or '.join(remedies)}. fp8train explain says what each takes."
        ) from error


def _remedies(config: RunConfig, world: World) -> list[str]:
    """What takes less memory, the cheapest first."""
    together, sharded = config.micro_batch(world.world_size), shards(config, world.world_size)
    remedies = [f"fewer sequences at once (micro_batch_samples, now {together})"] if together > 1 else []
    if config.activation_checkpointing != "full":
        choice = "full" if config.activation_checkpointing == "selective" else "selective or full"
        remedies.append(f"activation_checkpointing={choice}")
    if config.weight_copies != "one" and not sharded:
        remedies.append("weight_copies=one")
    if moments_of(config, load_recipe(config.recipe)) != "bf16":
        remedies.append("optim=adamw_bf16_moments")
    return [*remedies, "more ranks that share the weights (parallel=fsdp)"]
