"""Tensors of which each rank may hold its rows only (DTensor): what a rank has of them, and the whole of them.

Every function but sum_over_shards takes ordinary tensors too, and then does nothing to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether each rank has its rows only of one of these tensors."""
    return any(_has_rows(tensor) for tensor in tensors)


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 of DeepSpeed has it: a plain tensor, of shape [0] except while a module that owns it computes."""
    return hasattr(parameter, "ds_status")


def is_fsdp_module(module: nn.Module) -> bool:
    """Whether FSDP2 shards what is below it and in no other such module, which is whole before the module's hooks."""
    return hasattr(type(module), "set_reshard_after_forward")  # not isinstance: see _has_rows


def sent_as(parameter: Tensor) -> torch.dtype:
    """The dtype in which ranks exchange it and its gradient where DeepSpeed casts for that, and rounds it (ZeRO-3)."""
    dtype: torch.dtype = getattr(parameter, "comm_dtype", parameter.dtype)
    return dtype


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor; they share its memory."""
    return tensor.to_local() if _has_rows(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor with the rows of all ranks, on each of them: every rank must call it."""
    return tensor.full_tensor() if _has_rows(tensor) else tensor


def sharded_like(tensor: Tensor, own: Tensor) -> Tensor:
    """A whole tensor that every rank has, sharded as `own` is, which has its shape; nothing is sent.

    A rank takes its rows to the device of `own`, and looks at no others; on the same device they share memory.
    """
    if not _has_rows(own):
        return tensor
    from torch.distributed.tensor import DTensor, Shard  # takes seconds, and is loaded where something is sharded

    rows, mesh = tensor, own.device_mesh
    for axis, placed in enumerate(own.placements):
        if isinstance(placed, Shard):
            size = rows.shape[placed.dim]
            each = -(-size // mesh.size(axis))  # as torch.chunk cuts it
            begin = min(mesh.get_local_rank(axis) * each, size)
            rows = rows.narrow(placed.dim, begin, min(each, size - begin))
    return DTensor.from_local(
        rows.to(own.device), mesh, own.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def sum_over_shards(value: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """The sum, the same bits on each rank, of a value that each took from its rows of these sharded tensors.

    Over the ranks that together have each row once: a group of them, where several hold all rows.
    """
    sharded = next(tensor for tensor in tensors if _has_rows(tensor))
    (group,) = [
        sharded.device_mesh.get_group(dim) for dim, placed in enumerate(sharded.placements) if placed.is_shard()
    ]
    every = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
    # gathered and not reduced: what adds up in another order in each group would let the groups' weights drift apart
    dist.all_gather(every, value.detach(), group=group)
    return torch.stack(every).sum(0)


def local_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of these tensors on this rank."""
    own = [local(tensor) for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in own)


def _has_rows(tensor: Tensor) -> TypeGuard[DTensor]:
    return hasattr(tensor, "device_mesh")  # not isinstance: to import DTensor takes as long as to import torch
