"""Shared memory of one program whose warps run on their own, with what each of them knows to have happened.

A warp counts its steps: one ends where it releases its work, at a barrier or a fence. A byte remembers who wrote and
who read it last, and in which step; whoever comes next must know that step, by a barrier that he has waited for. What
the asynchronous proxy reads (TMA stores, tensor cores) must have been fenced besides. Source: PTX ISA 8.8, memory
consistency model and async proxy.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tests.kernels.ptx_machine import Array, Fault


@dataclass(slots=True)
class Clock:
    """A vector clock: what is known to have happened.

    seen: [warps] steps of each warp
    fenced: [warps] those before a fence of proxies
    copies: TMA loads that have come, a bit each
    """

    seen: Array
    fenced: Array
    copies: int = 0

    @classmethod
    def zero(cls, warps: int) -> Clock:
        """Nothing."""
        return cls(np.zeros(warps, np.int32), np.zeros(warps, np.int32))

    def join(self, other: Clock) -> None:
        """Know what the other knows, too."""
        np.maximum(self.seen, other.seen, out=self.seen)
        np.maximum(self.fenced, other.fenced, out=self.fenced)
        self.copies |= other.copies

    def copy(self) -> Clock:
        """As it is now."""
        return Clock(self.seen.copy(), self.fenced.copy(), self.copies)


@dataclass(slots=True)
class Barrier:
    """An mbarrier: a phase ends when `count` have arrived and all announced bytes are there."""

    count: int
    maker: tuple[int, int]  # warp and step of its init
    arriving: Clock
    done: Clock
    missing: int = field(init=False)
    bytes: int = 0
    parity: int = 0

    def __post_init__(self) -> None:
        self.missing = self.count

    def change(self, clock: Clock, arrivals: int, announced: int) -> None:
        """Arrive, or announce bytes (negative: they have come)."""
        self.missing -= arrivals
        self.bytes += announced
        self.arriving.join(clock)
        if self.missing < 0:
            raise Fault("more arrivals at an mbarrier than it counts")
        if self.missing == self.bytes == 0:
            self.parity ^= 1
            self.missing = self.count
            self.done.join(self.arriving)
            self.arriving = Clock.zero(len(clock.seen))


class Shared:
    """Bytes, and for each who may come next; `now` is the warp that acts, `clock` what it knows.

    The interface of ptx_machine.Shared, for a program of its own.
    """

    def __init__(self, size: int, warps: int) -> None:
        self.barriers = 0  # steps of global memory: nobody reads there what this launch wrote
        self.now, self.clock = 0, Clock.zero(warps)
        self.loaded = np.zeros((0, 0), np.int64)  # bytes of the last load
        self.data, self.known = np.zeros(size, np.uint8), np.zeros(size, bool)
        self.writer, self.written = np.full(size, -1, np.int32), np.zeros(size, np.int32)  # warp; -2 - n: TMA load n
        self.read = np.zeros((size, warps), np.int32)  # step in which a warp read it
        self.used = np.zeros((size, warps), np.int32)  # step in which what it read was there for certain
        self.pending = np.zeros(size, np.int16)  # reads of tensor cores and TMA that nobody has waited for
        self.asked = np.zeros(size, np.int16)  # loads of warps that may be on their way to a register
        self.coming = np.zeros(size, bool)  # copies on their way here
        self.live = np.zeros(size, bool)  # mbarriers

    def place(self, address: Array, size: int) -> Array:
        """Which bytes these are, [lanes, size]."""
        first = address.astype(np.int64)
        if (first % size).any() or (first + size > self.data.size).any():
            raise Fault(f"shared memory: {size} bytes outside or not aligned")
        at = first[:, None] + np.arange(size)
        if self.live[at].any():
            raise Fault("shared memory: an mbarrier is there")
        return at

    def writers_are_known(self, at: Array, clock: Clock, fenced: bool = False, data: Array | None = None) -> None:
        """Raise Fault unless whoever wrote these bytes did so before; the same byte again (`data`) may be written."""
        if self.coming[at].any():
            raise Fault("shared memory: a copy is on its way to what is read or written")
        writer, step = self.writer[at], self.written[at]
        warp, by_warp = np.maximum(writer, 0), writer >= 0
        late = by_warp & (writer != self.now) & (clock.seen[warp] < step)
        if data is not None:
            late &= self.data[at] != data
        if late.any():
            raise Fault("shared memory: meets what another warp wrote, without a barrier")
        if fenced and (by_warp & (clock.fenced[warp] < step)).any():
            raise Fault("shared memory: TMA or a tensor core meets what a warp wrote, without a fence of proxies")
        for number in np.unique(writer[writer < -1]):
            if not clock.copies >> int(-2 - number) & 1:
                raise Fault("shared memory: meets what TMA wrote, without waiting for it")

    def may_be_read(self, at: Array, fenced: bool = False) -> None:
        """Raise Fault unless all has been written, before."""
        if not self.known[at].all():
            raise Fault("shared memory: reads what nobody wrote")
        self.writers_are_known(at, self.clock, fenced)

    def load(self, local: Array, warp: Array, address: Array, size: int) -> Array:
        """Bytes [lanes, size] from these addresses."""
        at = self.place(address, size)
        self.may_be_read(at)
        self.read[at, self.now] = self.clock.seen[self.now]
        self.loaded = at
        return self.data[at]

    def store(self, local: Array, warp: Array, address: Array, data: Array) -> None:
        """Bytes [lanes, size] to these addresses."""
        at = self.place(address, data.shape[1])
        self.writers_are_known(at, self.clock, data=data)
        if self.pending[at].any():
            raise Fault("shared memory: a warp writes what TMA or a tensor core is reading")
        if (self.read[at] > self.clock.seen).any():
            raise Fault("shared memory: a warp writes what another read, without a barrier")
        self.writer[at], self.written[at] = self.now, self.clock.seen[self.now]
        self.data[at], self.known[at] = data, True
        if (self.data[at] != data).any():
            raise Fault("shared memory: two threads write a byte differently")

    def lend(self, at: Array) -> None:
        """A tensor core or a TMA store of this warp reads these bytes from now on."""
        self.may_be_read(at, fenced=True)
        self.pending[at] += 1

    def returned(self, at: Array) -> None:
        """This warp has waited for what it lent."""
        self.pending[at] -= 1
        self.read[at, self.now] = self.used[at, self.now] = self.clock.seen[self.now]

    def send_for(self, at: Array) -> None:
        """TMA will write these bytes. What a warp has asked for and not used may still be on its way to it."""
        self.writers_are_known(at, self.clock)
        if self.pending[at].any() or self.asked[at].any():
            raise Fault("shared memory: TMA writes what is being read, or may be on its way to a register")
        if (np.maximum(self.read[at], self.used[at]) > self.clock.seen).any():
            raise Fault("shared memory: TMA writes what a warp read, without waiting for it")
        self.coming[at] = True

    def land(self, at: Array, data: Array, number: int) -> None:
        """The bytes of TMA load `number` have come."""
        self.coming[at], self.known[at] = False, True
        self.writer[at], self.data[at] = -2 - number, data
