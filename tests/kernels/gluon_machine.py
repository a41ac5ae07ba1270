"""A model of the machine that the Gluon GEMMs need: barriers, shared memory, TMA and multiplication, in random order.

Used by gluon_model.py, which says what it is for.
"""

from __future__ import annotations

import random
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Hazard(AssertionError):
    """What would be a race, a deadlock or a fault on a GPU."""


class Stopped(BaseException):
    """Unwinds the other threads when one has failed."""


class Barrier:
    """An mbarrier: a phase completes when `count` arrivals and all announced bytes are there."""

    def __init__(self, part: int, parts: int) -> None:
        self.count = self.missing = self.bytes = self.parity = 0
        self.part, self.parts = part, parts

    def change(self, arrivals: int, announced: int) -> None:
        """Arrive, or announce bytes (negative: they have come)."""
        self.missing -= arrivals
        self.bytes += announced
        if self.missing < 0:
            raise Hazard("more arrivals at a barrier than it counts")
        if self.missing == self.bytes == 0:
            self.parity ^= 1
            self.missing = self.count


class Shared:
    """Shared memory; what is taken out of it is a view. `part` says which of the boxes of its allocation, its home."""

    def __init__(self, data: Any, home: Any, part: int | None = None) -> None:
        self.data, self.home, self.part = data, home, part

    def index(self, at: int) -> Any:
        """The box at that place."""
        if isinstance(self.data, list):
            return self.data[at]
        return Shared(self.data[at], self.home, at)

    def permute(self, order: tuple[int, int]) -> Shared:
        """The transpose."""
        return Shared(self.data.T, self.home, self.part)

    def reshape(self, shape: Sequence[int]) -> Shared:
        """As for a tensor."""
        return Shared(self.data.view(shape), self.home, self.part)

    def reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: object) -> Shared:
        """The same bytes in another shape; its parts are parts of this box."""
        return Parts(self.data.view(tuple(shape)), self.home, self.part)

    _reinterpret = reinterpret

    @property
    def key(self) -> tuple[int, int | None]:
        """Which box this is."""
        return id(self.home), self.part


class Parts(Shared):
    """A box that was given another shape."""

    def index(self, at: int) -> Shared:
        """A part of the box, under the name of the whole."""
        return Shared(self.data[at], self.home, self.part)


class Pointer:
    """Addresses in the storage of a tensor."""

    def __init__(self, memory: Tensor, at: Any = 0) -> None:
        self.memory, self.at = memory, at
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    @classmethod
    def to(cls, x: Tensor) -> Pointer:
        """The first element of x."""
        left = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
        return cls(x.as_strided((left,), (1,), x.storage_offset()))

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.at + offset)


class Box:
    """A tensor descriptor."""

    def __init__(self, described: Any) -> None:
        self.base, self.layout, self.dtype = described.base, described.layout, described.base.dtype
        self.block_shape, self.strides = list(described.block_shape), tuple(described.strides)
        self.whole = described.base.as_strided(tuple(described.shape), self.strides)

    def inside(self, at: Sequence[int]) -> tuple[Tensor, tuple[slice, ...]]:
        """The part of the box at these coordinates that lies in the matrix, and where in the box it lies."""
        sizes = zip(at, self.block_shape, self.whole.shape, strict=True)
        part = self.whole[tuple(slice(first, min(first + size, limit)) for first, size, limit in sizes)]
        return part, tuple(slice(0, size) for size in part.shape)


def raw(x: Tensor) -> Tensor:
    """FP8 as bytes, which can be copied and filled."""
    return x.view(torch.uint8) if x.element_size() == 1 else x


class Program:
    """One program of the grid: its barriers and memory, its threads, and what they have put off."""

    def __init__(self, number: int, programs: int, draw: random.Random) -> None:
        self.number, self.programs, self.draw = number, programs, draw
        self.copies: list[Callable[[], None]] = []  # TMA loads, done in any order
        self.queues: dict[str, list[tuple[tuple[Any, ...], Callable[[], None]]]] = {}  # done in order; what they touch
        self.unfenced: set[Any] = set()
        self.asked: dict[str, list[Any]] = {}  # by warpgroup: boxes, of how many, asked for products not yet promoted
        self.here = "main"

    def warp_specialize(self, partitions: Sequence[tuple[Any, tuple[Any, ...]]], warps: object, limits: object) -> None:
        """Run the partitions, one step of one of them or of what they put off at a time."""
        self.turn, self.failure, self.stop = threading.Semaphore(0), None, False
        self.wakes = {str(n): threading.Semaphore(0) for n in range(len(partitions))}
        self.ready: dict[str, Callable[[], bool]] = {name: lambda: True for name in self.wakes}
        threads = [
            threading.Thread(target=self._partition, args=(name, *partitions[int(name)]), daemon=True)
            for name in self.wakes
        ]
        for thread in threads:
            thread.start()
        while self.ready and self.failure is None:
            moves: list[Any] = [name for name, ready in self.ready.items() if ready()]
            moves += [lambda c=copy: (self.copies.remove(c), c()) for copy in self.copies]
            moves += self._due("multiply")
            # a store is slow, so that the tile after may be done before it has read its memory
            moves += self._due("store") if not moves or self.draw.random() < 0.002 else []
            if not moves:
                self.failure = Hazard("deadlock: every warp waits and nothing is under way")
                break
            move = self.draw.choice(moves)
            try:
                if isinstance(move, str):
                    self._resume(move)
                else:
                    move()
            except Hazard as error:
                self.failure = error
        self.stop = True
        for name in list(self.ready):
            self._resume(name)
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure
        if self.copies or any(self.queues.values()):
            raise Hazard("the program ends while a copy or a multiplication is under way")

    def _due(self, kind: str) -> list[Callable[[], None]]:
        """The first that each warpgroup has put off, of that kind."""
        queues = [queue for name, queue in self.queues.items() if name.startswith(kind) and queue]
        return [lambda queue=queue: queue.pop(0)[1]() for queue in queues]  # type: ignore[misc]

    def _resume(self, name: str) -> None:
        self.here = name
        self.wakes[name].release()
        self.turn.acquire()

    def _partition(self, name: str, run: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        self.wakes[name].acquire()
        try:
            if not self.stop:
                run(*arguments)
        except Stopped:
            pass
        except BaseException as error:
            self.failure = error
        del self.ready[name]
        self.turn.release()

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Let others run, at least until `ready`."""
        name = self.here
        self.ready[name] = ready
        self.turn.release()
        self.wakes[name].acquire()
        if self.stop:
            raise Stopped

    def queue(self, kind: str) -> list[tuple[tuple[Any, ...], Callable[[], None]]]:
        """What this warpgroup has put off, of one kind."""
        return self.queues.setdefault(f"{kind} {self.here}", [])

    def touched(self, key: object, kind: str) -> bool:
        """Whether something put off, of that kind, still reads this box."""
        return any(key in keys for name, queue in self.queues.items() if name.startswith(kind) for keys, _ in queue)

    # what the kernel's source calls

    def expect(self, barrier: Barrier, size: int) -> None:
        """Arrive, and announce bytes."""
        barrier.change(1, size)

    def arrive(self, barrier: Barrier, count: int) -> None:
        """Arrive; others may run before."""
        slots = barrier.parts - 1  # one more, for nobody's, among those that say a slot is empty
        if any(part * slots // parts == barrier.part for part, parts in self.asked.get(self.here, [])):
            raise Hazard("a slot is given back while what was asked of it may be on its way")
        self.pause()
        barrier.change(count, 0)

    def wait(self, barrier: Barrier, phase: int) -> None:
        """Until the phase of that parity is complete."""
        self.pause(lambda: barrier.parity != phase)

    def load_box(self, box: Box, at: Sequence[int], barrier: Barrier, target: Shared) -> None:
        """TMA load: zeros where the box leaves the matrix."""
        if list(target.data.shape) != box.block_shape:
            raise Hazard(f"a box of {box.block_shape} into memory of {tuple(target.data.shape)}")

        def copy() -> None:
            if self.touched(target.key, "multiply"):
                raise Hazard("a slot is filled while a multiplication reads it")
            part, where = box.inside(at)
            raw(target.data).zero_()
            raw(target.data)[where] = raw(part)
            barrier.change(0, -target.data.numel() * target.data.element_size())

        self.copies.append(copy)

    def store_box(self, box: Box, at: Sequence[int], source: Shared) -> None:
        """TMA store: only what lies in the matrix."""
        if source.key in self.unfenced:
            raise Hazard("a TMA store of memory that was written without a fence behind")

        def copy() -> None:
            part, where = box.inside(at)
            part.copy_(source.data[where])

        self.queue("store").append(((source.key,), copy))

    def store_wait(self, pending: int) -> None:
        """Until so many TMA stores of this warpgroup have not yet read their memory."""
        queue = self.queue("store")
        self.pause(lambda: len(queue) <= pending)

    def write(self, target: Shared, value: Tensor) -> None:
        """Registers into shared memory."""
        if self.touched(target.key, "store"):
            raise Hazard("memory is written while a TMA store reads it")
        target.data.copy_(value)
        self.unfenced.add(target.key)

    def read(self, source: Shared) -> Tensor:
        """Shared memory into registers, where it need not be before the product that wants it is promoted."""
        self.asked.setdefault(self.here, []).append((source.part, source.home.parts))
        return source.data.clone()

    def fence(self) -> None:
        """What was written is seen by TMA."""
        self.unfenced.clear()

    def multiply(self, a: Shared, b: Shared, acc: Tensor, use_acc: bool, is_async: bool) -> list[Tensor]:
        """Start a multiplication; its operands are read when it is done."""
        assert is_async and not use_acc
        if self.asked.get(self.here):
            self.asked[self.here].pop(0)  # the registers of the oldest product are overwritten: it has been promoted
        result: list[Tensor] = []
        work = ((a.key, b.key), lambda: result.append(a.data.float() @ b.data.float()))
        self.queue("multiply").append(work)
        self.pause()
        return result

    def multiply_wait(self, pending: int, deps: tuple[list[Tensor], ...]) -> Any:
        """Until only so many multiplications may be under way; results of the others."""
        queue = self.queue("multiply")
        self.pause(lambda: len(queue) <= pending)
        found = tuple(dep[0] if place < len(deps) - pending else dep for place, dep in enumerate(deps))
        return found[0] if len(found) == 1 else found
