"""A machine that executes the PTX of a Triton kernel on a CPU, all threads of all programs at once.

A register is an array [programs, threads]. Fault is raised where a thread reads or writes outside of the tensors or
unaligned; where it reads bytes of shared memory that nobody wrote; where two warps meet in a byte of shared memory
without a barrier between them, or two programs in one of global memory; where the threads of a program take different
branches. What the instructions compute: ptx_instructions.py. Source: PTX ISA 8.8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BASE = 1 << 40  # address of the first byte of global memory
WARP = 32  # threads
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
WIDTHS = {"%p": 0, "%rs": 2, "%r": 4, "%rd": 8, "t": 4}  # bytes of the registers with that name; t: of inline assembly


class Fault(Exception):
    """What would be wrong, or undefined, on a GPU."""


class Memory:
    """Global memory: the storages of tensors, each with a gap before and behind it.

    Args:
        storages: bytes of each, by any key.
    """

    def __init__(self, storages: dict[int, Array], gap: int = 512) -> None:
        self.place, size = {}, gap
        for key, data in storages.items():
            self.place[key] = size
            size += -(-(data.size + gap) // gap) * gap
        self.data, self.valid = np.zeros(size, np.uint8), np.zeros(size, bool)
        self.writer, self.written = np.full(size, -1), np.zeros(size, int)  # program, and how many barriers before
        for key, data in storages.items():
            self.data[self.place[key] :][: data.size], self.valid[self.place[key] :][: data.size] = data, True

    def result(self, key: int, size: int) -> tuple[Array, Array]:
        """Bytes of a storage, and which of them were written."""
        part = slice(self.place[key], self.place[key] + size)
        return self.data[part], self.writer[part] >= 0

    def _at(self, address: Array, size: int) -> Array:
        first = address.astype(np.int64) - BASE
        at = first[:, None] + np.arange(size)
        if ((first < 0) | (first + size > self.valid.size)).any() or not self.valid[at].all():
            raise Fault(f"global memory: {size} bytes outside of every tensor")
        if (first % size).any():
            raise Fault(f"global memory: {size} bytes that are not aligned")
        return at

    def load(self, address: Array, size: int, program: Array, barriers: int) -> Array:
        """Bytes [lanes, size] from these addresses, for lanes of these programs behind so many barriers."""
        at = self._at(address, size)
        unsafe = (self.writer[at] != program[:, None]) | (self.written[at] == barriers)
        if ((self.writer[at] >= 0) & unsafe).any():
            raise Fault("global memory: reads what another program wrote, or its own without a barrier")
        return self.data[at]

    def store(self, address: Array, data: Array, program: Array, barriers: int) -> None:
        """Bytes [lanes, size] to these addresses."""
        at = self._at(address, data.shape[1])
        if ((self.writer[at] >= 0) & (self.writer[at] != program[:, None])).any():
            raise Fault("global memory: two programs write a byte")
        self.writer[at], self.written[at], self.data[at] = program[:, None], barriers, data
        if (self.data[at] != data).any():
            raise Fault("global memory: two threads write a byte differently")


class Shared:
    """Shared memory of each program, and which warps have read or written each byte since the last barrier."""

    def __init__(self, programs: int, size: int) -> None:
        self.barriers, self.data = 0, np.zeros((programs, size), np.uint8)
        self.known = np.zeros((programs, size), bool)
        self.readers, self.writers = np.zeros((programs, size), np.uint32), np.zeros((programs, size), np.uint32)

    def part(self, which: Array) -> Shared:
        """That of some of the programs."""
        made = Shared(0, 0)
        vars(made).update({key: x[which] if isinstance(x, np.ndarray) else x for key, x in vars(self).items()})
        return made

    def barrier(self) -> None:
        """All warps of each program have come here."""
        self.readers[:], self.writers[:] = 0, 0
        self.barriers += 1

    def _at(self, local: Array, warp: Array, address: Array, size: int) -> tuple[tuple[Array, Array], Array]:
        if (address % size).any() or (address.astype(np.int64) + size > self.data.shape[1]).any():
            raise Fault(f"shared memory: {size} bytes outside or not aligned")
        at = local[:, None], address.astype(np.int64)[:, None] + np.arange(size)
        return at, np.broadcast_to((np.uint32(1) << warp.astype(np.uint32))[:, None], at[1].shape)

    def load(self, local: Array, warp: Array, address: Array, size: int) -> Array:
        """Bytes [lanes, size] from these addresses, for lanes of these programs, counted in the group, and warps."""
        at, bit = self._at(local, warp, address, size)
        if not self.known[at].all():
            raise Fault("shared memory: reads what nobody wrote")
        if (self.writers[at] & ~bit).any():
            raise Fault("shared memory: a warp reads what another wrote, without a barrier")
        np.bitwise_or.at(self.readers, at, bit)
        return self.data[at]

    def store(self, local: Array, warp: Array, address: Array, data: Array) -> None:
        """Bytes [lanes, size] to these addresses."""
        at, bit = self._at(local, warp, address, data.shape[1])
        if (self.readers[at] & ~bit).any():
            raise Fault("shared memory: a warp writes what another read, without a barrier")
        if ((self.writers[at] & ~bit != 0) & (self.data[at] != data)).any():
            raise Fault("shared memory: two warps write a byte without a barrier")
        np.bitwise_or.at(self.writers, at, bit)
        self.data[at], self.known[at] = data, True
        if (self.data[at] != data).any():
            raise Fault("shared memory: two threads write a byte differently")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of PTX; `act` does it to a group of programs, for the threads of a mask or, if that is None, for all."""

    predicate: str  # "%p1", "!%p1" or ""
    opcode: str
    operands: list[str]
    act: Callable[[Group, Array | None, list[str]], None] | None  # None: a branch, or ret


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel with what it is launched with.

    code: its instructions
    labels: the instruction that each stands before
    threads: of a program
    shared_bytes: of a program
    grid: programs
    arguments: numbers and addresses, in order; an FP32 number as its bits
    memory: what the addresses point into
    """

    code: list[Instruction]
    labels: dict[str, int]
    threads: int
    shared_bytes: int
    grid: int
    arguments: Sequence[int]
    memory: Memory

    def run(self, at_once: int = 64) -> None:
        """Execute all programs, so many of them at a time. Raises Fault."""
        with np.errstate(all="ignore"):
            for first in range(0, self.grid, at_once):
                programs = np.arange(first, min(first + at_once, self.grid))
                waiting = [Group(self, programs, Shared(len(programs), self.shared_bytes), {}, 0)]
                while waiting:
                    waiting += waiting.pop().run()


class Group:
    """Programs of a launch that have taken the same branches.

    Args:
        programs: their numbers.
        registers: [programs, threads] by name.
        pc: number of the next instruction.
    """

    def __init__(self, launch: Launch, programs: Array, shared: Shared, registers: dict[str, Array], pc: int) -> None:
        self.launch, self.programs, self.shared, self.registers, self.pc = launch, programs, shared, registers, pc
        self.shape = len(programs), launch.threads
        thread = np.arange(launch.threads, dtype=np.uint32)
        self.warp = np.broadcast_to(thread // WARP, self.shape)
        self.local = np.broadcast_to(np.arange(len(programs))[:, None], self.shape)
        self.special = {
            "%tid.x": thread, "%laneid": thread % WARP, "WARP_SZ": np.asarray(WARP, np.uint32),
            "%ctaid.x": programs.astype(np.uint32)[:, None], "%nctaid.x": np.asarray(launch.grid, np.uint32),
            "global_smem": np.asarray(0, np.uint32),
        }  # fmt: skip

    def _part(self, which: Array, pc: int) -> Group:
        registers = {name: value[which] for name, value in self.registers.items()}
        return Group(self.launch, self.programs[which], self.shared.part(which), registers, pc)

    def whole(self, value: Array) -> Array:
        """[programs, threads]."""
        return value if value.shape == self.shape else np.broadcast_to(value, self.shape)

    def get(self, name: str, kind: str) -> Array:
        """An operand as a type such as u32, [programs, threads] or a number for all.

        What nobody wrote is bytes of 0xA5: LLVM leaves out what nobody needs, and whoever needs it gets what shows.
        """
        if kind == "pred":
            return self.registers[name] if name[0] == "%" else np.asarray(int(name, 0) != 0)
        width = int(kind.lstrip("bsuf")) // 8
        if name in self.special:
            value = self.special[name]
        elif name in self.registers:
            value = self.registers[name]
        elif name[0] == "%" or name == "t":
            value = _undefined(width)
        else:
            number = int(name[2:], 16) if name[:2] == "0f" else int(name.rstrip("U"), 0)
            value = np.asarray(number & (1 << 8 * width) - 1, np.uint64)
        return value.astype(UNSIGNED[width], copy=False).view({"s": "i", "f": "f"}.get(kind[0], "u") + str(width))

    def set(self, name: str, value: Array, mask: Array | None = None) -> None:
        """Write a register, of the threads of the mask only."""
        width = WIDTHS[name.rstrip("0123456789")]
        if width and value.dtype != UNSIGNED[width]:
            value = value.view(f"u{value.dtype.itemsize}").astype(UNSIGNED[width])
        if mask is not None:
            before = self.registers.get(name)
            value = np.where(mask, value, before if before is not None else _undefined(width) if width else False)
        self.registers[name] = np.ascontiguousarray(self.whole(value))

    def run(self) -> list[Group]:
        """Until all have returned; programs that take another branch are handed back, to be run later."""
        code, labels = self.launch.code, self.launch.labels
        while self.pc < len(code):
            step = code[self.pc]
            self.pc += 1
            name = step.predicate
            mask = self.registers[name.lstrip("!")] ^ (name[0] == "!") if name else None
            if step.act is None:
                target = labels[step.operands[0]] if step.operands else len(code)
                taken = np.ones(len(self.programs), bool) if mask is None else mask[:, 0]
                if mask is not None and (mask != taken[:, None]).any():
                    raise Fault("threads of a program take different branches")
                if taken.all():
                    self.pc = target
                elif taken.any():
                    return [self._part(~taken, self.pc), self._part(taken, target)]
                continue
            try:
                step.act(self, mask, step.operands)
            except Fault as fault:
                raise Fault(f"{fault} ({step.opcode} {', '.join(step.operands)}, instruction {self.pc - 1})") from None
        return []


def _undefined(width: int) -> Array:
    return np.asarray(0xA5A5A5A5A5A5A5A5 & (1 << 8 * width) - 1, UNSIGNED[width])
