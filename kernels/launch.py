"""Launches a kernel again without asking again what depends only on the properties of its arguments.

A launcher checks its operands, picks a variant and a grid; Triton binds and classifies every argument and looks its
kernel up: 60 to 130 us of the host's time (H100 machine, 2026-11-26), whatever the GPU does. All of it follows from
shapes, strides, dtypes, devices and the alignment of the operands. So the first call with such properties goes the
long way, and what came of it - the compiled kernel, its grid and its other arguments - is kept under them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

MOST = 4096  # launches that are kept; a model has tens
# Kernels count rows and columns in 32 bits, some of them up to a tile or the number of programs beyond the last.
SIZE_LIMIT = 2**31 - 4096
READY: dict[Hashable, Ready] = {}
# grid, arguments behind the tensors, constants, options
Rest = tuple[tuple[int, ...], Sequence[object], Mapping[str, object], Mapping[str, object]]


def properties(*tensors: Tensor | None) -> tuple[Hashable, ...]:
    """All of the tensors that a launch may depend on, which is all but where they lie beyond 16 bytes."""
    return tuple([None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16) for x in tensors])


class Ready:
    """A compiled kernel with its grid and every argument but the tensors.

    Args:
        compiled: what the first launch by Triton gave.
        grid: of that launch.
        arguments: all of that launch by name, in the kernel's order; those that are or describe tensors are left out.
        tensors: arguments that are or describe a tensor, and which of the tensors of a later launch each takes.
        device: index of the GPU.
    """

    __slots__ = ("arguments", "descriptors", "device", "launcher", "places", "scratch")

    def __init__(
        self,
        compiled: Any,
        grid: tuple[int, ...],
        arguments: Mapping[str, Any],
        tensors: Mapping[str, int],
        device: int,
    ) -> None:
        names = list(arguments)
        self.launcher = compiled[(*grid, 1, 1)[:3]]
        self.device = device
        self.scratch = compiled.metadata.global_scratch_size > 0
        self.places = [(names.index(name), number) for name, number in tensors.items()]
        self.arguments = [None if name in tensors else value for name, value in arguments.items()]
        # a descriptor is made anew around each tensor; whatever Triton has checked of it stays as it is
        kinds = {name: arguments[name] for name in tensors if hasattr(arguments[name], "block_shape")}
        self.descriptors = [(names.index(name), type(x), vars(x) | {"base": None}) for name, x in kinds.items()]

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch with these tensors, on the current stream of their device."""
        arguments = self.arguments.copy()
        for place, number in self.places:
            arguments[place] = tensors[number]
        for place, kind, fields in self.descriptors:
            described = kind.__new__(kind)
            described.__dict__.update(fields)
            described.base = arguments[place]
            arguments[place] = described
        if self.scratch:
            triton.set_allocator(scratch)  # per thread: backward runs in another one
        if torch.cuda.current_device() == self.device:
            self.launcher(*arguments)
        else:
            with torch.cuda.device(self.device):
                self.launcher(*arguments)


def first_launch(
    key: Hashable,
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Mapping[str, Any],
    tensors: Mapping[str, int],
    device: torch.device,
    **options: Any,
) -> None:
    """Launch by Triton, which compiles where it must, and keep what came of it under the key.

    Args:
        key: holds the properties of all tensors, and whatever else the arguments follow from.
        kernel: a jitted function.
        grid: programs.
        arguments: every argument of the kernel by name, constants too.
        tensors: as for Ready.
        device: of the tensors; on a CPU, where the kernel is interpreted, nothing is kept.
        options: of the compiler.
    """
    ordered = {name: arguments[name] for name in kernel.arg_names}
    triton.set_allocator(scratch)
    with torch.cuda.device(device.index if device.type == "cuda" else -1):
        compiled = kernel[grid](**ordered, **options)
    if device.type == "cuda":
        if len(READY) >= MOST:
            READY.clear()
        READY[key] = Ready(compiled, grid, ordered, tensors, device.index)


def launch(
    kernel: Any, settings: tuple[Hashable, ...], tensors: Sequence[Tensor | None], rest: Callable[[], Rest]
) -> None:
    """Launch a kernel whose first arguments are the tensors; what follows them is asked for once for their properties.

    Args:
        kernel: a jitted function.
        settings: all that `rest` depends on beside the properties of the tensors.
        tensors: its first arguments, in order; None for those that this launch does without. At least the first is one.
        rest: gives the grid, the arguments that follow, constants by name, and options of the compiler.
    """
    key = (kernel.fn, settings, *properties(*tensors))  # not the kernel: Triton hashes it by its source, with a lock
    ready = READY.get(key)
    if ready is not None:
        ready(*tensors)
        return
    grid, scalars, constants, options = rest()
    arguments = dict(zip(kernel.arg_names, (*tensors, *scalars), strict=False)) | constants
    places = {name: number for number, name in enumerate(kernel.arg_names[: len(tensors)])}
    assert tensors[0] is not None
    first_launch(key, kernel, grid, arguments, places, tensors[0].device, **options)


def scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for tensor descriptors that a kernel makes."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def overlaps(out: Tensor, tensors: Sequence[Tensor | None]) -> int | None:
    """Which of the tensors shares memory, from its first element to its last, with out; None if none does."""
    first, last = span(out)
    for number, x in enumerate(tensors):
        if x is not None:
            x_first, x_last = span(x)
            if first < x_last and x_first < last:
                return number
    return None


def span(x: Tensor) -> tuple[int, int]:
    """Addresses of the first element and behind the last."""
    if x.numel() == 0:
        return x.data_ptr(), x.data_ptr()
    last = sum([(size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)])
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()
