"""Replicated training: gradients are summed over ranks, in FP32."""

# no postponed annotations here: DDP compares those of a communication hook with its own classes
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fp8train.distributed.sharding import groups_apart
from fp8train.distributed.world import World


def wrap_ddp(model: nn.Module, world: World) -> nn.Module:
    """Replicate a model over the ranks; after backward every rank holds the sum of all ranks' gradients.

    The sum, where DDP's default is the mean: each rank divides its loss by the global number of tokens, so that dy, and
    with it every FP8 code, is the same for any number of ranks. Rank 0's parameters are copied to the others here.
    Buffers are left alone: FP8 codes are derived from the parameters, and gloo cannot move float8. A world of one rank
    gets the model itself.

    Args:
        model: on world.device; gradients have the dtype of the parameters, fp32.
    """
    if world.world_size == 1:
        return model
    with warnings.catch_warnings():
        # torch 2.13 deprecates broadcast_buffers, but its successor forward_sync_buffers=False copies buffers once: can
        # go when init_sync_buffers is available, which the warning announces
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.* is deprecated", category=FutureWarning)
        replicated = DistributedDataParallel(
            model,
            device_ids=[world.device.index] if world.device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
    replicated.register_comm_hook(None, _sum_over_ranks)
    return replicated


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside wrap_ddp's wrapper; a model without one is returned as it is."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextmanager
def gradient_sync(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Whether backward in this block sums gradients over ranks; disable it for all but the last micro-batch of a step.

    With enabled=False, forward must be inside the block too. A sharded model always sums over the ranks that share out
    its rows, and keeps the sums of several such groups apart. One on one rank is unaffected.
    """
    if enabled:
        yield
        return
    with model.no_sync() if isinstance(model, DistributedDataParallel) else groups_apart(model):
        yield


def _sum_over_ranks(group: dist.ProcessGroup | None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Communication hook: add up a bucket of gradients."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])
