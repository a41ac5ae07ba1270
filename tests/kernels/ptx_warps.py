"""A machine that executes the PTX of a GEMM on a CPU, where each warp runs on its own, in a random order.

As ptx_machine.py, whose registers, global memory and instructions these are; the programs come one after another. What
TMA brings comes at a random moment that the barriers allow; what a tensor core writes may not be touched before it has
been waited for. Fault is also raised where nobody can go on; NotImplementedError at what the PTX ISA allows and no
kernel has. Instructions: ptx_tensor.py.
"""

from __future__ import annotations

import functools
import operator
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tests.kernels.ptx_instructions import calculate, move, names_in
from tests.kernels.ptx_machine import WARP, Array, Fault, Group, Launch
from tests.kernels.ptx_shared import Barrier, Clock, Shared

PARAMETERS = 0x4000  # addresses of the parameters in their memory, 128 bytes each
MOST = 200  # instructions of a warp before another may go on


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A matrix for TMA; the inner dimension first.

    address: of its first element
    sizes, box: elements
    strides: bytes, of all but the first dimension
    size: bytes of an element
    swizzle: 0, 1, 2, 3: none, 32, 64, 128 bytes
    maker: warp and step that wrote it; None: the host did
    """

    address: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    size: int
    swizzle: int
    maker: tuple[int, int] | None = None


@dataclass(slots=True, eq=False)
class Copy:
    """A TMA load under way: where to, what, for which barrier, and what whoever waits for it will know."""

    at: Array
    data: Array
    barrier: Barrier
    clock: Clock
    number: int


class Program:
    """One program: its warps, what they share, and the copies that are under way."""

    def __init__(self, launch: Launch, number: int, facts: Facts, draw: random.Random) -> None:
        self.launch, self.number, self.facts, self.draw = launch, number, facts, draw
        warps = launch.threads // WARP
        self.shared = Shared(launch.shared_bytes, warps)
        self.barriers: dict[int, Barrier] = {}  # by address
        self.waiting: dict[int, list[Warp]] = {}  # at the barriers of bar.sync, by number
        self.maps: dict[int, dict[tuple[str, int], int]] = {}  # tensor maps that are being made, by address
        self.descriptors = dict(facts.descriptors)
        self.copies: list[Copy] = []  # under way
        self.loads = 0  # of TMA, so far
        self.products: dict[tuple[int, int], object] = {}  # what each warpgroup multiplied
        self.warps = [Warp(self, warp) for warp in range(warps)]

    def run(self) -> None:
        """Until all warps have ended."""
        while any(not warp.ended for warp in self.warps):
            able = [warp.go_on for warp in self.warps if warp.can()]
            steps: list[Callable[[], None]] = able + [lambda copy=copy: self.land(copy) for copy in self.copies]
            if not steps:
                where = ", ".join(f"{warp.number} at {warp.pc}" for warp in self.warps if not warp.ended)
                raise Fault(f"no warp can go on: {where}")
            self.draw.choice(steps)()
        if self.copies or self.shared.pending.any():
            raise Fault("the program ends before what it has started")

    def land(self, copy: Copy) -> None:
        """A copy has come."""
        self.copies.remove(copy)
        self.shared.land(copy.at, copy.data, copy.number)
        copy.barrier.change(copy.clock, 0, -copy.at.size)

    def meet(self, warp: Warp, number: int, threads: int) -> None:
        """bar.sync: go on when so many threads have come."""
        here = self.waiting.setdefault(number, [])
        here.append(warp)
        warp.waits = lambda: warp not in self.waiting[number]
        if len(here) * WARP > threads:
            raise Fault(f"more than {threads} threads at barrier {number}")
        if len(here) * WARP == threads:
            together = Clock.zero(len(self.warps))
            for one in here:
                together.join(one.clock)
            for one in here:
                one.clock.join(together)
                one.release()
            self.waiting[number] = []


@dataclass(frozen=True, slots=True)
class Facts:
    """What a launch has beside its code.

    tables: branch targets by label
    names: addresses that have a name
    descriptors: those that the host made, by the address of the parameter
    """

    tables: Mapping[str, list[str]]
    names: Mapping[str, int]
    descriptors: Mapping[int, Descriptor]


def facts_of(ptx: str, descriptors: Mapping[int, Descriptor]) -> Facts:
    """Of this kernel; descriptors by the number of the parameter."""
    tables = {name: names_in(row) for name, row in re.findall(r"([$\w]+):\s*\.branchtargets([^;]*);", ptx)}
    names = {name: PARAMETERS + 128 * int(name.rpartition("_")[2]) for name in re.findall(r"\w+_param_\d+", ptx)}
    return Facts(tables, names, {PARAMETERS + 128 * number: one for number, one in descriptors.items()})


def run(launch: Launch, ptx: str, descriptors: Mapping[int, Descriptor], seed: int = 0) -> None:
    """Execute all programs of a launch, in turn. Raises Fault."""
    draw, facts = random.Random(seed), facts_of(ptx, descriptors)
    with np.errstate(all="ignore"):
        for number in range(launch.grid):
            Program(launch, number, facts, draw).run()


@dataclass(slots=True)
class Products:
    """Multiplications that a warp has started together: registers that they write, bytes that they read."""

    registers: set[str] = field(default_factory=set)
    bytes: list[Array] = field(default_factory=list)


class Warp(Group):
    """32 threads, with what they know (`clock`) and what they have started."""

    def __init__(self, program: Program, number: int) -> None:
        launch = program.launch
        super().__init__(launch, np.asarray([program.number]), program.shared, {}, 0)  # type: ignore[arg-type]
        self.program, self.number, self.shape = program, number, (1, WARP)
        self.warp = np.full(self.shape, number)
        self.local = np.zeros(self.shape, np.int64)
        thread = np.arange(WARP, dtype=np.uint32) + np.uint32(WARP * number)
        self.special |= {"%tid.x": thread, "%laneid": thread % WARP}
        self.special |= {name: np.asarray(0, np.uint32) for name in ("%ctaid.y", "%ctaid.z")}
        self.special |= {name: np.asarray(1, np.uint32) for name in ("%nctaid.y", "%nctaid.z")}
        self.special |= {name: np.asarray(place, np.uint32) for name, place in program.facts.names.items()}
        self.clock = Clock.zero(launch.threads // WARP)
        self.clock.seen[number] = 1
        self.ended, self.waits = False, None  # type: bool, Callable[[], bool] | None
        self.apart: tuple[int, Array] | None = None  # threads that are not at `pc` but at that instruction
        self.touched: set[str] = set()  # registers, since the last wgmma.fence
        self.started, self.groups = Products(), []  # type: Products, list[Products]
        self.loads: dict[int, Array] = {}  # of shared memory, which may still be on their way: bytes, by a bit each
        self.from_loads: dict[str, int] = {}  # registers that are computed from loads: their bits
        self.computed = 0  # loads of which something has been computed
        self.reads: set[str] = set()  # of the instruction that is executed
        self.sets: set[str] = set()
        self.writes: list[Array] = []  # bytes that cp.async brings, and the groups of them
        self.write_groups: list[list[Array]] = []
        self.stores: list[Array] = []  # bytes that TMA stores read, and the groups of them
        self.store_groups: list[list[Array]] = []
        self.count = 0  # of multiplications

    def release(self) -> None:
        """What it does from now on is another step."""
        self.clock.seen[self.number] += 1

    def can(self) -> bool:
        """Whether it can go on."""
        if self.ended or (self.waits is not None and not self.waits()):
            return False
        self.waits = None
        return True

    def get(self, name: str, kind: str) -> Array:
        """As Group's, but Fault where a multiplication writes it."""
        if name[0] == "%":
            self._touch(name)
            self.reads.add(name)
        return super().get(name, kind)

    def set(self, name: str, value: Array, mask: Array | None = None) -> None:
        """As Group's, of the threads that are here."""
        self._touch(name)
        self.sets.add(name)
        super().set(name, value, self.here(mask))

    def here(self, mask: Array | None) -> Array | None:
        """Those of the mask that are here."""
        if self.apart is None:
            return mask
        return ~self.apart[1] if mask is None else mask & ~self.apart[1]

    def _touch(self, name: str) -> None:
        if name in self.started.registers or any(name in group.registers for group in self.groups):
            raise Fault(f"{name} is used before the multiplication that writes it has been waited for")
        self.touched.add(name)

    def ask(self, at: Array, names: Sequence[str]) -> None:
        """A load of these bytes is on its way to registers."""
        bit = max(self.loads, default=1) * 2
        self.loads[bit] = at
        self.from_loads |= dict.fromkeys(names, bit)
        self.program.shared.asked[at] += 1

    def come(self, bits: int) -> None:
        """These loads have come for certain."""
        shared = self.program.shared
        for bit in [bit for bit in self.loads if bit & bits]:
            at = self.loads.pop(bit)
            shared.asked[at] -= 1
            shared.used[at, self.number] = self.clock.seen[self.number]
        if not self.loads:
            self.from_loads.clear()
            self.computed = 0

    def _follow(self, computes: bool) -> None:
        """What the instruction says of loads: to compute from one may be put off, anything else waits for it."""
        bits = functools.reduce(operator.or_, (self.from_loads.get(name, 0) for name in self.reads), 0)
        if computes:
            self.computed |= bits
            self.from_loads |= dict.fromkeys(self.sets, bits)
        else:
            self.come(bits)

    def go_on(self) -> None:
        """Some instructions, until it has to wait."""
        shared, code = self.program.shared, self.launch.code
        shared.now, shared.clock = self.number, self.clock
        for _ in range(self.program.draw.randint(1, MOST)):
            if self.pc >= len(code):
                self.ended = True
            if self.ended or self.waits is not None:
                return
            if self.apart is not None and self.pc == self.apart[0]:
                self.apart = None
            step = code[self.pc]
            self.pc += 1
            self.reads.clear()
            self.sets.clear()
            name = step.predicate
            mask = self.get(name.lstrip("!"), "pred") ^ (name[0] == "!") if name else None
            try:
                if step.act is None:
                    self._branch(step.operands, mask)
                else:
                    step.act(self, self.here(mask), step.operands)
                if self.loads and not step.opcode.startswith("ld.shared"):
                    self._follow(getattr(step.act, "func", None) in (calculate, move))
            except Fault as fault:
                line = f"{step.opcode} {', '.join(step.operands)}"[:200]
                raise Fault(f"{fault} ({line}, instruction {self.pc - 1}, warp {self.number})") from None

    def _branch(self, operands: list[str], mask: Array | None) -> None:
        if len(operands) == 2:  # brx.idx
            which = np.unique(self.get(operands[0], "u32"))
            if which.size != 1 or mask is not None or self.apart is not None:
                raise NotImplementedError("threads of a warp take different branches of a table")
            self.pc = self.launch.labels[self.program.facts.tables[operands[1]][int(which[0])]]
            return
        target = self.launch.labels[operands[0]] if operands else len(self.launch.code)
        here = np.ones(self.shape, bool) if self.apart is None else ~self.apart[1]
        taken = here if mask is None else here & mask
        if (taken == here).all():
            self.pc = target
        elif taken.any():
            if self.apart is not None or target <= self.pc:
                raise NotImplementedError("threads of a warp part twice, or in a loop")
            self.apart = target, taken
