"""The tensors of a checkpoint, by name and each once, and which of them a rank writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fp8train.distributed import unwrap
from fp8train.shards import is_sharded, whole

PART_BYTES = 1 << 29  # a rank that writes has at least as much to write


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

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return tensor_bytes(self.weights) + tensor_bytes(self.moments)

    def of(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> Content:
        """With some of the tensors only."""
        return Content(weights=dict(weights), tied=self.tied, moments=dict(moments), parameters=self.parameters)


def content_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Content:
    """What a checkpoint of this model and optimizer holds: their own tensors, sharded ones of the shape of the whole.

    Args:
        model: on whatever device; wrap_ddp's wrapper is taken off.
    """
    model = unwrap(model)
    weights, tied = _untie(model.state_dict(keep_vars=True))
    names = optimizer_names(model, optimizer)
    # sorted: load_state_dict reorders the keys, and a resumed run should write the same bytes
    moments = {f"{key}/{name}": value for name, p in names.items() for key, value in sorted(optimizer.state[p].items())}
    assert all(isinstance(value, Tensor) for value in moments.values()), "optimizer state that is not a tensor"
    kept = {name: tensor.detach() for name, tensor in weights.items()}
    return Content(weights=kept, tied=tied, moments=moments, parameters=shapes(names))


def parts_of(content: Content, ranks: int) -> int:
    """Into how many parts, each for a rank of its own, a checkpoint is divided."""
    return max(1, min(ranks, content.bytes // PART_BYTES, len(content.weights)))


def part_of(rank: int, ranks: int, parts: int) -> int | None:
    """The part that a rank writes, if it writes one: those that do lie as far apart as they can, on every machine."""
    return next((part for part in range(parts) if part * ranks // parts == rank), None)


def own_part(content: Content, part: int | None, parts: int, *, copy: bool) -> Content:
    """The tensors of a part, whole; every rank of a sharded model must call it.

    Sharded tensors come whole, one after another, to the CPU of the rank that writes them.

    Args:
        part: None: of a rank that writes nothing.
        copy: tensors that are not sharded are copied to the CPU too, so that training may go on; otherwise they are
            the model's and the optimizer's own.
    """
    own = [_own(tensors, part, parts, copy) for tensors in (content.weights, content.moments)]
    return content.of(*own)


def optimizer_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """Name -> parameter of an optimizer, in its order."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Shape by name."""
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def tensor_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Of all of them, whole."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _shared_out(tensors: Mapping[str, Tensor], parts: int) -> dict[str, int]:
    """Name -> part, so that parts are about as large: the largest first, each to the smallest; alike on every rank."""
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    filled, chosen = [0] * parts, {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        chosen[name] = filled.index(min(filled))
        filled[chosen[name]] += sizes[name]
    return chosen


def _own(tensors: Mapping[str, Tensor], part: int | None, parts: int, copy: bool) -> dict[str, Tensor]:
    made, chosen = {}, _shared_out(tensors, parts)
    for name, tensor in tensors.items():
        sharded = is_sharded([tensor])
        if sharded:
            tensor = whole(tensor)
        if chosen[name] == part:
            made[name] = tensor.to("cpu", copy=copy and not sharded) if copy or sharded else tensor
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
