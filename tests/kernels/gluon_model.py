"""Runs the Gluon GEMM on a CPU, where Gluon has no interpreter: its very source, over a model of the machine.

Warpgroups are threads of which one runs at a time. TMA copies and multiplications are put off and done at a random
moment that the barriers allow, so that whatever relies on luck goes wrong: a slot that is filled while it is still
read, a result that is used before its multiplication has ended, a wait that nothing will end. Barriers count arrivals
and bytes and complete phases as mbarriers do; memory that nobody wrote holds NaN; a pointer outside its storage raises.
"""

from __future__ import annotations

import inspect
import math
import random
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.kernels.gluon_machine import Barrier, Box, Pointer, Program, Shared, raw


def allocate(dtype: torch.dtype, shape: Sequence[int], layout: object) -> Shared:
    """Shared memory full of NaN, or barriers."""
    home = types.SimpleNamespace(parts=shape[0])
    if dtype is torch.int64:
        return Shared([Barrier(part, shape[0]) for part in range(shape[0])], home)
    data = torch.empty(tuple(shape), dtype=dtype)
    raw(data).fill_(0x7F if data.element_size() == 1 else math.nan)
    made = Shared(data, home)
    made.keep = home  # type: ignore[attr-defined]
    return made


def load(pointer: Pointer, mask: Tensor | None = None, other: float = 0.0) -> Any:
    """Numbers at addresses."""
    at = torch.as_tensor(pointer.at)
    if mask is None:
        return pointer.memory[at]
    at, mask = torch.broadcast_tensors(at, mask)
    found = pointer.memory.new_full(at.shape, other)
    found[mask] = pointer.memory[at[mask]]
    return found


def store(pointer: Pointer, value: Tensor, mask: Tensor) -> None:
    """Numbers to addresses."""
    at, mask, value = torch.broadcast_tensors(pointer.at, mask, value)
    pointer.memory[at[mask]] = value[mask]


def atomic_add(pointer: Pointer, value: Tensor, mask: Tensor, sem: str) -> None:
    """Sums in memory; an address that occurs twice would be added to once."""
    at, mask, value = torch.broadcast_tensors(pointer.at, mask, value)
    pointer.memory[at[mask]] += value[mask]


def where(condition: bool, x: int, y: int) -> int:
    """Of numbers."""
    return x if condition else y


def expand_dims(x: Any, axis: int) -> Any:
    """As in Gluon, of addresses too."""
    return Pointer(x.memory, x.at.unsqueeze(axis)) if isinstance(x, Pointer) else x.unsqueeze(axis)


def minimum(x: Any, y: int) -> Any:
    """Of numbers or of a tensor and a number."""
    return x.clamp(max=y) if isinstance(x, Tensor) else min(x, y)


def fma(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """The product is exact in FP64."""
    return (x.double() * y.double() + z.double()).float()


class Kernel:
    """Stands in for the compiled kernel of these modules, the last with the kernel itself: kernel[(programs,)](...)."""

    def __init__(self, *modules: types.ModuleType, name: str = "_gemm_gluon_kernel", seed: int = 0) -> None:
        self.source, self.name, self.draw = {}, name, random.Random(seed)
        for module in modules:
            self.source |= vars(module)
        self.kernel = self.source[name].fn
        self.arg_names = list(inspect.signature(self.kernel).parameters)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def run(*arguments: Any, num_warps: int, enable_fp_fusion: bool, **options: Any) -> None:
            given = inspect.signature(self.kernel).bind(*arguments, **options).arguments
            given = {name: self._argument(value) for name, value in given.items()}
            for number in range(grid[0]):
                program = Program(number, grid[0], self.draw)
                self._functions(program)[self.name](**given)

        return run

    @staticmethod
    def _argument(value: Any) -> Any:
        if isinstance(value, Tensor):
            return Pointer.to(value)
        return Box(value) if hasattr(value, "block_shape") else value

    def _functions(self, program: Program) -> dict[str, Any]:
        """The module's functions as plain Python, over the model in place of Gluon."""
        space: dict[str, Any] = {"gl": self._language(program), "min": min, "range": range}
        space |= {
            "mbarrier": types.SimpleNamespace(
                init=self._init, expect=program.expect, arrive=program.arrive, wait=program.wait,
                MBarrierLayout=lambda: None,
            ),
            "tma": types.SimpleNamespace(store_wait=program.store_wait),
            "fence_async_shared": program.fence,
            "warpgroup_mma": program.multiply,
            "warpgroup_mma_wait": program.multiply_wait,
        }  # fmt: skip
        for name, value in self.source.items():
            if isinstance(getattr(value, "fn", None), types.FunctionType):
                space[name] = types.FunctionType(value.fn.__code__, space, name)
            elif type(value).__name__ == "constexpr":
                space[name] = value.value
        space |= {"_load_box": program.load_box, "_store_box": program.store_box, "sum_layout": lambda n: None}
        space["quad_layout"] = space["sum_layout"]
        Shared.store = lambda target, value: program.write(target, value)  # type: ignore[attr-defined]
        Shared.load = lambda source, layout: program.read(source)  # type: ignore[attr-defined]
        return space

    @staticmethod
    def _init(barrier: Barrier, count: int) -> None:
        barrier.count = barrier.missing = count

    @staticmethod
    def _language(program: Program) -> types.SimpleNamespace:
        return types.SimpleNamespace(
            float32=torch.float32, int64=torch.int64, static_range=range, load=load, store=store, minimum=minimum,
            program_id=lambda axis: program.number, num_programs=lambda axis: program.programs, fma=fma,
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype), cast=lambda x, dtype: x,
            arange=lambda first, last, layout: torch.arange(first, last), SliceLayout=lambda axis, layout: None,
            expand_dims=expand_dims, broadcast=torch.broadcast_tensors, allocate_shared_memory=allocate,
            warp_specialize=program.warp_specialize, atomic_add=atomic_add, where=where,
            convert_layout=lambda x, layout: x,
        )  # fmt: skip
