"""What a rank holds of a model that it trains, beside activations, and whether its device has that much."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fp8train.config import RunConfig
from fp8train.distributed import World
from fp8train.distributed.sharding import shard_bytes
from fp8train.errors import ConfigError
from fp8train.models import build_model
from fp8train.recipe import Recipe, load_recipe
from fp8train.trainer.assembly import shard_ranks
from fp8train.trainer.host_memory import free_host_bytes
from fp8train.units import bytes_text, short_count_text

MOMENT_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """Bytes that the fullest rank holds from step to step.

    weights: FP32 masters, and as much of gradients
    moments: AdamW's two
    copies: what the GEMMs read in place of the weights
    """

    weights: int
    moments: int
    copies: int = 0

    @property
    def total(self) -> int:
        """All of them, gradients included."""
        return 2 * self.weights + self.moments + self.copies

    def text(self) -> str:
        """`29.9 GiB FP32 weights, as much of gradients, 59.8 GiB moments`"""
        return f"{bytes_text(self.weights)} FP32 weights, as much of gradients, {bytes_text(self.moments)} moments"


def footprint(model: nn.Module, moments: str, ranks: int = 1, copies: int = 0) -> Footprint:
    """What training a model takes.

    Args:
        model: on any device, meta too.
        moments: of AdamW, "fp32" or "bf16".
        ranks: that the parameters are sharded over; 1 for replicated ones.
        copies: bytes of what the GEMMs read.
    """
    shapes = [parameter.shape for parameter in model.parameters()]
    return Footprint(
        weights=shard_bytes(shapes, ranks, 4),
        moments=shard_bytes(shapes, ranks, 2 * MOMENT_BYTES[moments]),
        copies=copies,
    )


def moments_of(config: RunConfig, recipe: Recipe) -> str:
    """Of AdamW in a run, "fp32" or "bf16"."""
    return recipe.moments if config.optim.moments == "auto" else config.optim.moments


def check_memory(config: RunConfig, world: World) -> None:
    """Refuse a model whose weights, gradients and moments alone do not fit; every rank must call it.

    Copies and activations are left out, so that nothing is refused that would fit.

    Raises:
        ConfigError: on every rank, where one has less memory than that.
    """
    ranks = shard_ranks(config, world.world_size)
    moments = moments_of(config, load_recipe(config.recipe))
    model = build_model(config.model, "meta")
    held = footprint(model, moments, ranks)
    free = min(
        (rank_free for rank_free in world.all_gather_object(free_bytes(world.device)) if rank_free is not None),
        default=None,
    )
    if free is None or held.total <= free:
        return
    count = sum(parameter.numel() for parameter in model.parameters())
    remedies = ["take a smaller model"]
    remedies += [] if ranks > 1 else ["spread it over several ranks with parallel=fsdp"]
    remedies += ["shard it over more ranks (parallel.shard_ranks)"] if 1 < ranks < world.world_size else []
    remedies += [] if moments == "bf16" else ["keep moments in BF16 (optim=adamw_bf16_moments)"]
    raise ConfigError(
        f"model: {config.model.name} of {short_count_text(count)} parameters does not fit: the "
        f"{world.device.type} of a rank has {bytes_text(free)} of memory free; "
        f"needs {bytes_text(held.total)} besides activations: {held.text()}. To go on, {', or '.join(remedies)}; "
        "fp8train explain adds it up."
    )


def free_bytes(device: torch.device) -> int | None:
    """Memory that this process can still have there; None where that is not known.

    CUDA: what is free, and what the allocator holds idle. CPU: free_host_bytes.
    """
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    return free_host_bytes()
