"""Sharded training by torch's FSDP2: each rank holds its rows of every parameter, gradient and moment.

A layer's parameters are gathered before it computes, forward and backward, and freed after it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fp8train.distributed.agreement import on_main
from fp8train.distributed.world import World
from fp8train.shards import sharded_like

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule


def shard(
    model: nn.Module,
    layers: Iterable[nn.Module],
    world: World,
    shard_ranks: int | None = None,
    reshard_after_forward: bool = True,
) -> nn.Module:
    """Spread the parameters of a model over the ranks, in place; backward leaves each rank its rows of the sum.

    The sum over ranks, as wrap_ddp gives it, in FP32. Each of `layers` is whole only while it computes; what is in none
    of them (embedding, last norm, lm_head) stays whole from forward to the end of backward. With several micro-batches
    each one's gradient is summed and sharded at once. Rank 0's parameters are copied to the others first; those on the
    meta device are for `lay_out`.

    Groups that hold the same (HSDP) gather and sum up within themselves, and then sum those sums over the groups, of
    several micro-batches once (gradient_sync).

    Args:
        model: on world.device or meta, with fp32 parameters of the same shapes on every rank.
        layers: modules that are called as such, one after another.
        shard_ranks: consecutive ranks that share out the rows, a divisor of their number; None: all.
        reshard_after_forward: False keeps `layers` too whole until backward.

    Returns:
        nn.Module: the same object; its parameters are DTensors, with the names that they had.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard  # takes seconds

    for parameter in model.parameters():
        if not parameter.is_meta:
            dist.broadcast(parameter.detach(), 0)
    over = shard_ranks or world.world_size
    if over not in world.meshes:
        world.meshes[over] = _mesh(world, over)
    mesh = world.meshes[over]
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo can sum only
    return model


@torch.no_grad()
def lay_out(model: nn.Module, values: Iterator[tuple[str, Tensor]], world: World) -> None:
    """Give a model that was sharded on the meta device memory, and rank 0's values, a parameter at a time.

    Args:
        values: path and values of each parameter, in the order of named_parameters; read on rank 0 only.

    Raises:
        UserError: that which rank 0 met at the first of them.
    """
    model.to_empty(device=world.device)
    begun: list[Iterator[tuple[str, Tensor]]] = []
    on_main(world, lambda: begun.append(chain([next(values)], values)), patient=True)
    for name, parameter in model.named_parameters():
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=world.device)
        if world.main:
            path, value = next(begun[0])
            assert path == name, f"values come in another order: {path} for {name}"
            whole.copy_(value)
        dist.broadcast(whole, 0)
        parameter.copy_(sharded_like(whole, parameter))


def _mesh(world: World, shard_ranks: int) -> DeviceMesh:
    """[ranks] where all of them share out the rows; else [groups that hold the same, ranks of a group]."""
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    if shard_ranks == world.world_size:
        return init_device_mesh(world.device.type, (shard_ranks,))
    ranks = torch.arange(world.world_size).view(-1, shard_ranks)
    # not init_device_mesh, whose groups would wait for torch's timeout
    groups = [
        dist.new_subgroups_by_enumeration(one.tolist(), timeout=timedelta(seconds=world.timeout_seconds))[0]
        for one in (ranks.t(), ranks)
    ]
    return DeviceMesh.from_group(groups, world.device.type, ranks, mesh_dim_names=("replicate", "shard"))


def free_gathered(model: nn.Module) -> None:
    """Free what a forward without backward has left whole, so that `model.parameters()` are the sharded ones."""
    for module in _sharded_modules(model):
        module.reshard()


@contextmanager
def groups_apart(model: nn.Module) -> Iterator[None]:
    """Inside, backward adds up gradients within groups that hold the same; the next one outside, those of all."""
    modules = _sharded_modules(model)
    for module in modules:
        module.set_requires_all_reduce(False, recurse=False)
    try:
        yield
    finally:
        for module in modules:
            module.set_requires_all_reduce(True, recurse=False)


def _sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """Those that FSDP2 shards, whole or not at the moment."""
    if "torch.distributed.fsdp" not in sys.modules:
        return []  # to import it takes seconds
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def shard_bytes(shapes: Iterable[torch.Size], ranks: int, element_size: int) -> int:
    """Bytes that the fullest of `ranks` ranks would hold of tensors of these shapes, cut by their first dimension."""
    return sum(-(-shape[0] // ranks) * shape[1:].numel() * element_size for shape in shapes if len(shape))


def gathered_layers(
    model: nn.Module, element_bytes: Mapping[int, int] | None = None, reshard_after_forward: bool = True
) -> tuple[str, int, int]:
    """The module path of a model's layers, and bytes that a sharded rank has whole at a time: (weights, gradients).

    Those of the weights in no layer, and of two layers: FSDP gathers a layer while the one before it computes.

    Args:
        model: its layers are the children of its longest ModuleList.
        element_bytes: by id of a parameter, what its elements are gathered in; of those that are not in it 4.
        reshard_after_forward: False: the weights of all layers.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    name, layers = max(lists, key=lambda found: len(found[1]), default=("", nn.ModuleList()))

    def at_a_time(sizes: Mapping[int, int], most: int) -> int:
        every, *of_layers = (
            sum(parameter.numel() * sizes.get(id(parameter), 4) for parameter in module.parameters())
            for module in (model, *layers)
        )
        return every - sum(of_layers) + sum(sorted(of_layers)[-most:])

    weights = at_a_time(element_bytes or {}, 2 if reshard_after_forward else len(layers))
    return name, weights, at_a_time({}, 2)
