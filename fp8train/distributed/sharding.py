"""Sharded training by torch's FSDP2: each rank holds its rows of every parameter, gradient and moment.

A layer's parameters are gathered in FP32 before it computes, forward and backward, and freed after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import nn

from fp8train.distributed.world import World
from fp8train.shards import is_sharded


def shard(model: nn.Module, layers: Iterable[nn.Module], world: World) -> nn.Module:
    """Spread the parameters of a model over the ranks, in place; backward leaves each rank its rows of the sum.

    The sum over ranks, as wrap_ddp gives it, in FP32. Each of `layers` is whole only while it computes; what is in none
    of them (embedding, last norm, lm_head) stays whole from forward to the end of backward. With several micro-batches
    each one's gradient is summed and sharded at once. Rank 0's parameters are copied to the others first.

    Args:
        model: on world.device, with fp32 parameters of the same shapes on every rank.
        layers: modules that are called as such, one after another.

    Returns:
        nn.Module: the same object; its parameters are DTensors, with the names that they had.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard  # takes seconds

    for parameter in model.parameters():
        dist.broadcast(parameter.detach(), 0)
    mesh = init_device_mesh(world.device.type, (world.world_size,))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo can sum only
    return model


def free_gathered(model: nn.Module) -> None:
    """Free what a forward without backward has left whole, so that `model.parameters()` are the sharded ones."""
    if is_sharded(model.parameters()):
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def shard_bytes(shapes: Iterable[torch.Size], ranks: int, element_size: int) -> int:
    """Bytes that the fullest of `ranks` ranks would hold of tensors of these shapes, cut by their first dimension."""
    return sum(-(-shape[0] // ranks) * shape[1:].numel() * element_size for shape in shapes if len(shape))


def gathered_layers(model: nn.Module, element_bytes: Mapping[int, int] | None = None) -> tuple[str, int, int]:
    """The module path of a model's layers, and bytes that a sharded rank has whole at a time: (weights, gradients).

    Those of the weights in no layer, and of two layers: FSDP gathers a layer while the one before it computes.

    Args:
        model: its layers are the children of its longest ModuleList.
        element_bytes: by id of a parameter, what its elements are gathered in; of those that are not in it 4.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    name, layers = max(lists, key=lambda found: len(found[1]), default=("", nn.ModuleList()))

    def at_a_time(sizes: Mapping[int, int]) -> int:
        every, *of_layers = (
            sum(parameter.numel() * sizes.get(id(parameter), 4) for parameter in module.parameters())
            for module in (model, *layers)
        )
        return every - sum(of_layers) + sum(sorted(of_layers)[-2:])

    return name, at_a_time(element_bytes or {}), at_a_time({})
