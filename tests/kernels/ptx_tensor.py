"""What the instructions of a GEMM's PTX do that no other kernel has: mbarriers, TMA, tensor cores, copies of threads.

A product of codes is exact, their sum of 32 rounded once to FP32: more than a GPU's tensor core does, which keeps 14
bits of an addend. Source: PTX ISA 8.8, wgmma, cp.async.bulk.tensor, mbarrier and tensormap.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tests.kernels import ptx_instructions
from tests.kernels.ptx_instructions import address_of, flushed, names_in
from tests.kernels.ptx_machine import WARP, Array, Fault
from tests.kernels.ptx_shared import Barrier, Clock
from tests.kernels.ptx_warps import Copy, Descriptor, Products, Warp

Act = Callable[[Any, Array | None, list[str]], None]
DECODED = {
    name: np.asarray(torch.arange(256, dtype=torch.uint8).view(dtype).double())
    for name, dtype in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2))
}
GROUP = 4  # warps of a warpgroup


def action(opcode: str) -> Act | None:
    """As ptx_instructions.action, of a warp on its own; nothing is done where no thread is asked to."""
    name, *rest = parts = opcode.replace("::", "_").split(".")
    if name == "brx":
        return None
    for begin, act in ACTS.items():
        if opcode.startswith(begin):
            return functools.partial(_by_some, functools.partial(act, parts))
    if name == "ld" and rest[0].startswith("shared"):
        return functools.partial(_ask, ptx_instructions.action(opcode))
    return ptx_instructions.action(opcode)


def _by_some(act: Act, warp: Warp, mask: Array | None, operands: list[str]) -> None:
    if mask is None or mask.any():
        act(warp, mask, operands)


def one(warp: Warp, operand: str, kind: str, mask: Array | None = None) -> int:
    """The number that all threads, or all of the mask, have in this operand."""
    value = warp.whole(warp.get(operand, kind))
    found = np.unique(value if mask is None else value[mask])
    if found.size != 1:
        raise Fault(f"threads of a warp differ in {operand}")
    return int(found[0])


def place_of(warp: Warp, operand: str, mask: Array | None = None) -> int:
    """The address that all threads, or all of the mask, have in `[base + offset]`."""
    value = address_of(warp, operand, "u64")
    found = np.unique(value if mask is None else value[mask])
    if found.size != 1:
        raise Fault(f"threads of a warp differ in {operand}")
    return int(found[0])


def by_one(mask: Array | None) -> None:
    """Raise Fault if more than one thread acts."""
    count = WARP if mask is None else int(mask.sum())
    if count > 1:
        raise Fault(f"{count} threads do what one must")


def _nothing(parts: list[str], warp: Warp, mask: Array | None, operands: list[str]) -> None:
    """Instructions of which nothing shows here."""


def _ask(load: Act, warp: Warp, mask: Array | None, operands: list[str]) -> None:
    """ld.shared: an mbarrier that is told later does not wait for it (fp8train/kernels/gemm_gluon_sum.py)."""
    load(warp, mask, operands)
    warp.ask(warp.program.shared.loaded, names_in(operands[0]))


def _barrier(parts: list[str], warp: Warp, mask: Array | None, operands: list[str]) -> None:
    """bar.sync and barrier.sync."""
    if mask is not None or warp.apart is not None:
        raise Fault("some threads of a warp at a barrier")
    threads = int(operands[1]) if len(operands) > 1 else warp.launch.threads
    warp.program.meet(warp, one(warp, operands[0], "u32"), threads)


def _elect(parts: list[str], warp: Warp, mask: Array | None, operands: list[str]) -> None:
    here = np.ones(warp.shape, bool) if mask is None else mask
    first = int(np.flatnonzero(here[0])[0])
    number, chosen = operands[0].split("|")
    warp.set(number, np.asarray(first, np.uint32), mask)
    warp.set(chosen, np.broadcast_to(np.arange(WARP) == first, warp.shape), mask)


def _fence(parts: list[str], warp: Warp, mask: Array | None, operands: list[str]) -> None:
    """fence.proxy.async."""
    np.maximum(warp.clock.fenced, warp.clock.seen, out=warp.clock.fenced)
    warp.release()


def _mbarrier(parts: list[str], warp: Warp, mask: Array | None, operands: list[str]) -> None:
    """init, inval, arrive, arrive.expect_tx and try_wait.parity."""
    program, what = warp.program, parts[1]
    place = one(warp, operands[what in ("arrive", "try_wait")].strip("[]"), "u32", mask)
    if what == "init":
        by_one(mask)
        program.shared.store(warp.local, warp.warp, np.asarray([place]), np.zeros((1, 8), np.uint8))
        clocks = [Clock.zero(len(program.warps)) for _ in range(2)]
        made = warp.number, int(warp.clock.seen[warp.number])
        program.barriers[place] = Barrier(one(warp, operands[1], "u32"), made, *clocks)
        return
    barrier = program.barriers.get(place) if what == "inval" else _barrier_at(warp, place)
    if what == "inval":
        by_one(mask)
        program.shared.live[place : place + 8] = False
        if any(copy.barrier is barrier for copy in program.copies):
            raise Fault("an mbarrier ends before the copies that it counts have come")
        del program.barriers[place]
    elif what == "arrive":
        count = one(warp, operands[2], "u32") if len(operands) > 2 else 1
        threads = WARP if mask is None else int(mask.sum())
        expected = count if "expect_tx" in parts else 0
        barrier.change(warp.clock, threads if expected else threads * count, threads * expected)
        warp.release()
    else:
        parity = one(warp, operands[2], "u32", mask) & 1  # Triton gives -1 for 1
        if barrier.parity == parity:  # this phase has not ended: try again when it has
            warp.pc -= 1
            warp.waits = lambda: barrier.parity != parity
        else:
            warp.clock.join(barrier.done)


def _barrier_at(warp: Warp, place: int) -> Barrier:
    """That of this address. Triton leaves out the fence of proxies between init and TMA: it is not asked for."""
    barrier, shared = warp.program.barriers.get(place), warp.program.shared
    if barrier is None:
        raise Fault(f"no mbarrier is at {place}")
    if not shared.live[place]:  # not used so far: one that nobody uses may be overwritten, as Triton 3.6 does
        here = slice(place, place + 8)
        if {*zip(shared.writer[here].tolist(), shared.written[here].tolist(), strict=True)} != {barrier.maker}:
            raise Fault("an mbarrier has been overwritten")
        shared.live[here] = True
    maker, step = barrier.maker
    if maker != warp.number and warp.clock.seen[maker] < step:
        raise Fault("an mbarrier is used before its init is known to be done")
    return barrier


def _map_field(parts: list[str], warp: Warp, mask: Array | None, operands: list[str]) -> None:
    """tensormap.replace.tile: one number of a tensor map in shared memory."""
    place, kind = place_of(warp, operands[0], mask), parts[-1]
    shared, at = warp.program.shared, np.asarray([place])
    data = shared.load(warp.local, warp.warp, at, 128)
    shared.store(warp.local, warp.warp, at, data)
    index = int(operands[1], 0) if len(operands) > 2 else 0
    warp.program.maps.setdefault(place, {})[parts[3], index] = one(warp, operands[-1], kind, mask)


def _map_out(parts: list[str], warp: Warp, mask: Array | None, operands: list[str]) -> None:
    """tensormap.cp_fenceproxy: the tensor map goes to global memory."""
    to, place = (place_of(warp, operand) for operand in operands[:2])
    shared = warp.program.shared
    shared.load(warp.local, warp.warp, np.asarray([place]), 128)
    field = warp.program.maps.pop(place)
    rank = field["rank", 0] + 1
    sizes, box, steps = (
        tuple(field[name, at] for at in range(rank)) for name in ("global_dim", "box_dim", "element_stride")
    )
    strides = tuple(field["global_stride", at] for at in range(rank - 1))
    if set(steps) != {1}:
        raise NotImplementedError("a tensor map with steps")
    if to % 128:
        raise Fault("a tensor map that is not aligned")
    made = warp.number, int(warp.clock.seen[warp.number])
    size = {0: 1, 1: 2, 7: 4, 10: 2}[field.get(("elemtype", 0), 0)]  # u8, u16, f32, bf16
    warp.program.descriptors[to] = Descriptor(
        field["global_address", 0], sizes, strides, box, size, field["swizzle_mode", 0], made
    )
    warp.release()


def _box(warp: Warp, operand: str, place: int, mask: Array | None) -> tuple[Array, Array, Array, int]:
    """Of each element of a box: where in shared memory it lies, its address, whether it is inside; and its size."""
    descriptor, *corner = (part.strip("[] {}") for part in operand.split(","))
    found = warp.program.descriptors.get(one(warp, descriptor, "u64", mask))
    if found is None:
        raise Fault("no tensor map is there")
    if found.maker is not None and found.maker[0] != warp.number and warp.clock.seen[found.maker[0]] < found.maker[1]:
        raise Fault("a tensor map is used before it is known to be made")
    inner = found.box[0] * found.size
    if found.address % 16 or any(stride % 16 for stride in found.strides) or max(found.box) > 256 or inner % 16:
        raise Fault("a tensor map that TMA does not take")
    if place % 128 or (found.swizzle and inner > 16 << found.swizzle):
        raise Fault("a box that TMA does not take")
    first = [one(warp, name, "s32", mask) for name in corner]
    grids = np.meshgrid(*(np.arange(size) for size in found.box[::-1]), indexing="ij")[::-1]  # the inner one first
    inside, address = np.ones(grids[0].shape, bool), np.full(grids[0].shape, found.address, np.int64)
    for at, start, size, stride in zip(grids, first, found.sizes, (found.size, *found.strides), strict=True):
        inside &= (at + start >= 0) & (at + start < size)
        address += (at + start) * stride
    linear = place + found.size * np.arange(inside.size)
    if found.swizzle:  # 16 bytes change places among 32, 64 or 128, by the number of the 128 that they lie in
        linear ^= (linear >> 7 & (1 << found.swizzle) - 1) << 4
    return linear, address.ravel(), inside.ravel(), found.size


def _bulk_tensor(parts: list[str], warp: Warp, mask: Array | None, operands: list[str]) -> None:
    """cp.async.bulk.tensor: a TMA load, or a TMA store."""
    by_one(mask)
    program, shared = warp.program, warp.program.shared
    load = parts[5].startswith("shared")
    place = one(warp, operands[0 if load else 1].strip("[]"), "u32", mask)
    linear, address, inside, size = _box(warp, operands[1 if load else 0], place, mask)
    at = shared.place(linear, size)
    here = np.full(int(inside.sum()), program.number)
    if not load:
        shared.lend(at)
        program.launch.memory.store(address[inside], shared.data[at[inside]], here, 0)
        warp.stores.append(at)
        return
    barrier = _barrier_at(warp, one(warp, operands[2].strip("[]"), "u32", mask))
    data = np.zeros(at.shape, np.uint8)
    data[inside] = program.launch.memory.load(address[inside], size, here, 0)
    shared.send_for(at)
    clock = warp.clock.copy()
    clock.copies |= 1 << program.loads
    program.copies.append(Copy(at, data, barrier, clock, program.loads))
    program.loads += 1


def _bulk_group(parts: list[str], warp: Warp, mask: Array | None, operands: list[str]) -> None:
    """cp.async.bulk.commit_group and wait_group: of TMA stores."""
    if parts[3] == "commit_group":
        warp.store_groups.append(warp.stores)
        warp.stores = []
        return
    while len(warp.store_groups) > int(operands[0]):
        for at in warp.store_groups.pop(0):
            warp.program.shared.returned(at)


def _copy(parts: list[str], warp: Warp, mask: Array | None, operands: list[str]) -> None:
    """cp.async of 16 bytes by each thread, of which the last are zeros; commit_group; wait_group."""
    shared = warp.program.shared
    if parts[2] == "commit_group":
        warp.write_groups.append(warp.writes)
        warp.writes = []
    elif parts[2] == "wait_group":
        while len(warp.write_groups) > int(operands[0], 0):
            for at in warp.write_groups.pop(0):
                shared.coming[at] = False
                shared.writer[at], shared.written[at] = warp.number, warp.clock.seen[warp.number]
    else:
        if mask is not None and not mask.all():
            raise NotImplementedError("copies of some threads of a warp")
        to, source = (address_of(warp, operand, kind) for operand, kind in zip(operands, ("u32", "u64"), strict=False))
        count = warp.whole(warp.get(operands[3], "u32"))
        data = np.zeros((WARP, 16), np.uint8)
        for size in np.unique(count):
            pick = np.flatnonzero(count[0] == size)
            if size:
                programs = np.full(len(pick), warp.program.number)
                data[pick, :size] = warp.launch.memory.load(source[0, pick], 16, programs, 0)[:, :size]
        shared.store(warp.local, warp.warp, to[0], data)
        at = shared.place(to[0], 16)
        shared.coming[at] = True
        warp.writes.append(at)


def _add(parts: list[str], warp: Warp, mask: Array | None, operands: list[str]) -> None:
    """red.global.add.f32, or atom whose result nobody reads: L2 rounds as FMA does, subnormal numbers are zero."""
    operands = operands[-2:]
    pick = warp.whole(np.asarray(True) if mask is None else mask)
    names = names_in(operands[1])
    address = address_of(warp, operands[0], "u64")[pick]
    programs, memory = np.full(len(address), warp.program.number), warp.launch.memory
    terms = np.stack([warp.whole(warp.get(name, "f32"))[pick] for name in names], -1)
    before = np.ascontiguousarray(memory.load(address, 4 * len(names), programs, 0)).view(np.float32)
    after = flushed(flushed(before) + flushed(terms)).astype(np.float32)
    memory.store(address, after.view(np.uint8).reshape(len(address), 4 * len(names)), programs, 0)


def _rows(warp: Warp, operand: str, first: int, count: int, kind: str) -> tuple[Array, Array]:
    """Of an operand in shared memory, K fastest: numbers [count, 32] of rows from `first` on, and where they lie."""
    word = one(warp, operand, "u64")
    start, step, swizzle = (word & 0x3FFF) << 4, (word >> 32 & 0x3FFF) << 4, word >> 62
    if swizzle != 1 or word >> 49 & 7:
        raise NotImplementedError("an operand of a tensor core that does not lie in rows of 128 bytes, swizzled")
    row = np.arange(first, first + count)[:, None]
    place = start + row // 8 * step + row % 8 * 128 + np.arange(0, 32, 16)
    place ^= (place >> 7 & 7) << 4
    at = warp.program.shared.place(place.ravel(), 16)
    warp.program.shared.lend(at)
    return DECODED[kind][warp.program.shared.data[at]].reshape(count, 32), at


def _wgmma(parts: list[str], warp: Warp, mask: Array | None, operands: list[str]) -> None:
    """wgmma.fence, mma_async, commit_group and wait_group, by one of the four warps of a warpgroup."""
    if warp.apart is not None:
        raise Fault("some threads of a warp at a tensor core")
    if parts[1] == "fence":
        warp.touched.clear()
        warp.come(warp.computed)  # what has been computed, with the registers that it read
    elif parts[1] == "commit_group":
        warp.groups.append(warp.started)
        warp.started = Products()
    elif parts[1] == "wait_group":
        while len(warp.groups) > int(operands[0]):
            for at in warp.groups.pop(0).bytes:
                warp.program.shared.returned(at)
    else:
        _multiply(parts, warp, operands)


def _multiply(parts: list[str], warp: Warp, operands: list[str]) -> None:
    """D [64, N] = or += A [64, 32] B [N, 32]^T: this warp's 16 rows."""
    registers, columns = names_in(operands[0]), int(parts[4].partition("n")[2].partition("k")[0])
    adds = bool(one(warp, operands[3], "pred"))
    if operands[4:] != ["1", "1"] or not parts[4].endswith("k32"):
        raise NotImplementedError("a multiplication of another kind")
    if warp.touched & set(registers):
        raise Fault("a multiplication writes registers that were used after the last wgmma.fence")
    for group in (*warp.groups, warp.started):
        if group.registers & set(registers) and not group.registers >= set(registers):
            raise Fault("two multiplications share some of their registers")
    a, a_place = _rows(warp, operands[1], warp.number % GROUP * 16, 16, parts[6])
    b, b_place = _rows(warp, operands[2], 0, columns, parts[7])
    same = one(warp, operands[1], "u64"), one(warp, operands[2], "u64"), adds
    if warp.program.products.setdefault((warp.number // GROUP, warp.count), same) != same:
        raise Fault("warps of a warpgroup multiply different operands")
    warp.count += 1
    number, lane = np.arange(len(registers))[:, None], np.arange(WARP)
    row, column = lane // 4 + 8 * (number // 2 % 2), 8 * (number // 4) + 2 * (lane % 4) + number % 2
    d = (a @ b.T)[row, column]
    if adds:
        d += np.concatenate([warp.registers[name] for name in registers]).view(np.float32)
    warp.registers |= zip(registers, d.astype(np.float32).view(np.uint32)[:, None], strict=True)
    warp.started.registers |= set(registers)
    warp.started.bytes += [a_place, b_place]


ACTS: dict[str, Callable[..., None]] = {
    "bar.warp.sync": _nothing, "setmaxnreg": _nothing, "fence.proxy.tensormap": _nothing,
    "bar.sync": _barrier, "barrier.sync": _barrier, "elect.sync": _elect, "fence.proxy.async": _fence,
    "mbarrier": _mbarrier, "tensormap.replace": _map_field, "tensormap.cp_fenceproxy": _map_out,
    "cp.async.bulk.tensor": _bulk_tensor, "cp.async.bulk": _bulk_group, "cp.async": _copy,
    "red.global": _add, "atom.global": _add, "wgmma": _wgmma,
}  # fmt: skip
