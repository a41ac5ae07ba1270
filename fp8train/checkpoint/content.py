"""The tensors of a checkpoint: weights and moments by name, each once, those of a sharded model made whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fp8train.distributed import unwrap
from fp8train.shards import is_sharded, whole


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """What the files of a checkpoint hold.

    weights: FP32 masters by state-dict name. tied: further names of a weight -> the name under which it is saved.
    moments: optimizer state as KEY/PARAMETER. parameters: shapes of what is optimised, in the optimizer's order.
    """

    weights: dict[str, Tensor]
    tied: dict[str, str]
    moments: dict[str, Tensor]
    parameters: dict[str, list[int]]


def gathered_content(model: nn.Module, optimizer: torch.optim.Optimizer, *, keep: bool = True) -> Content:
    """What a checkpoint of this model and optimizer holds; every rank of a sharded model must call it.

    Args:
        model: on whatever device; wrap_ddp's wrapper is taken off.
        keep: whether this rank will write it. Sharded tensors come whole, one after another, to the CPU of the ranks
            that keep them; tensors that are not sharded are the model's and the optimizer's own.
    """
    model = unwrap(model)
    weights, tied = _untie(model.state_dict(keep_vars=True))
    names = optimizer_names(model, optimizer)
    # sorted: load_state_dict reorders the keys, and a resumed run should write the same bytes
    moments = {f"{key}/{name}": value for name, p in names.items() for key, value in sorted(optimizer.state[p].items())}
    assert all(isinstance(value, Tensor) for value in moments.values()), "optimizer state that is not a tensor"
    kept = _gathered(weights, keep)
    return Content(weights=kept, tied=tied, moments=_gathered(moments, keep), parameters=shapes(names))


def optimizer_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """Name -> parameter of an optimizer, in its order."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Shape by name."""
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def _gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        if is_sharded([tensor]):
            tensor = whole(tensor)
            tensor = tensor.cpu() if keep else tensor.new_empty(0)
        made[name] = tensor
    return made


def _untie(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, and the further names of tied ones -> the name that is saved."""
    first: dict[tuple[Any, ...], str] = {}
    tied = {}
    for name, tensor in state.items():
        if tensor.numel():
            # of a sharded tensor every rank must find the same, whatever rows it has
            place = id(tensor) if is_sharded([tensor]) else tensor.data_ptr()
            identity = (place, tensor.shape, tensor.stride(), tensor.dtype)
            if first.setdefault(identity, name) != name:
                tied[name] = first[identity]
    return {name: tensor for name, tensor in state.items() if name not in tied}, tied
