"""What the instructions of a Triton kernel's PTX compute: those that the kernels have, GEMMs left out.

Approximate instructions (ex2.approx, rcp.approx, div.full) give the correctly rounded result. Source: PTX ISA 8.8.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

import numpy as np

from tests.kernels.ptx_machine import UNSIGNED, WARP, Array, Fault, Group, Instruction, Launch, Memory

Act = Callable[[Group, Array | None, list[str]], None]
NAN_F32, NAN_BF16, NAN_FP8 = 0x7FFFFFFF, 0x7FFF, 0x7F
MIN_NORMAL = 2.0**-126
WAIT_LOOP = "@!complete bra.uni waitLoop"  # around mbarrier.try_wait, which waits here until the phase has ended
# bits of the mantissa, exponent of the smallest normal number, largest number
FP8 = {"e4m3x2": (3, -6, 448.0), "e5m2x2": (2, -14, 57344.0)}
COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
PREDICATES = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "not": np.logical_not}
FLOATS = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "sqrt": np.sqrt, "max": np.fmax,
}  # fmt: skip
INTEGERS = {
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "max": np.maximum, "min": np.minimum, "neg": np.negative,
}  # fmt: skip


def launch_of(
    ptx: str,
    shared_bytes: int,
    grid: int,
    arguments: Sequence[int],
    memory: Memory,
    act: Callable[[str], Act | None] | None = None,
) -> Launch:
    """A launch of the one kernel in this text; arguments are numbers, and addresses in `memory`; act: as `action`."""
    threads = re.search(r"\.reqntid\s+(\d+)", ptx)
    body = re.search(r"^\{(.*)^\$L__func_end", re.sub(r"//.*|^\s*\.loc.*", "", ptx, flags=re.M), re.M | re.S)
    assert threads and body
    code, labels = [], {}
    for text in re.split(r";|(?<=:)\s*\n", body[1]):
        text = text.strip().lstrip("{} \t\n")
        while label := re.match(r"([$\w]+):", text):
            labels[label[1]] = len(code)
            text = text[label.end() :].lstrip("{} \t\n")
        found = re.match(r"(?:@(!?%p\d+)\s+)?([a-z]\S*)\s*(.*)", text, re.S)
        if found:
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", found[3])
            code.append(Instruction(found[1] or "", found[2], operands, (act or action)(found[2])))
        else:
            assert text[:1] in ("", ".") or text == WAIT_LOOP, f"not understood: {text}"
    return Launch(code, labels, int(threads[1]), shared_bytes, grid, arguments, memory)


def action(opcode: str) -> Act | None:
    """What an instruction does to a group of programs; None: a branch."""
    parts = opcode.replace("::", "_").split(".")
    name = parts[0]
    if name in ("bra", "ret"):
        return None
    if name == "bar":
        return lambda group, mask, operands: group.shared.barrier()
    if name in ("ld", "st"):
        return _parameter if parts[1] == "param" else functools.partial(_access, parts)
    if name in ("mov", "cvta"):
        return functools.partial(move, parts[-1])
    others = {"ldmatrix": _matrix_access, "stmatrix": _matrix_access, "shfl": _shuffle, "redux": _reduce}
    if name in others:
        return functools.partial(others[name], parts)
    return functools.partial(calculate, parts)


def rounded(x: Array, mantissa: int, least: int) -> Array:
    """FP64 numbers, exact or rounded to odd, to so many bits behind the leading one, ties to even."""
    _, exponent = np.frexp(x)
    step = np.ldexp(1.0, np.maximum(exponent - 1, least) - mantissa)
    return np.where(np.isfinite(x) & (x != 0), np.rint(x / step) * step, x)


def fused(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of FP32 numbers in FP64, rounded to odd, so that rounding again gives the bits of one rounding."""
    product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    odd = np.isfinite(total) & (error != 0) & ((total.view(np.int64) & 1) == 0)
    return np.where(odd, np.nextafter(total, np.copysign(np.inf, error)), total)


def from_bf16(bits: Array) -> Array:
    """FP32 numbers."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x: Array) -> Array:
    """BF16 bits of FP64 or FP32 numbers."""
    near = rounded(x.astype(np.float64), 7, -126)
    bits = np.where(np.abs(near) >= 2.0**128, np.copysign(np.inf, near), near).astype(np.float32).view(np.uint32)
    return np.where(np.isnan(x), NAN_BF16, bits >> np.uint32(16)).astype(np.uint16)


def to_fp8(x: Array, kind: str) -> Array:
    """FP8 bits of FP32 numbers, saturated."""
    mantissa, least, most = FP8[kind]
    size = np.minimum(np.abs(rounded(x.astype(np.float64), mantissa, least)), most)
    power = np.where(size < 2.0**least, least, np.frexp(size)[1] - 1)
    units = (np.nan_to_num(size) / np.ldexp(1.0, power - mantissa)).astype(np.int64)  # with the leading one, if any
    code = (power - least << mantissa) + units
    return np.where(np.isnan(x), NAN_FP8, code | (np.signbit(x) << 7)).astype(np.uint16)


def to_f32(x: Array) -> Array:
    """FP32 bits."""
    x = x.astype(np.float32)
    return np.where(np.isnan(x), np.uint32(NAN_F32), x.view(np.uint32))


def flushed(x: Array) -> Array:
    """Subnormal FP32 numbers made zero."""
    return np.where(np.abs(x) < MIN_NORMAL, np.copysign(0, x), x).astype(np.float32)


def calculate(parts: list[str], group: Group, mask: Array | None, operands: list[str]) -> None:
    """Instructions that compute one register from others."""
    name, kind, to = parts[0], parts[-1], operands[0]

    def sources(*kinds: str) -> list[Array]:
        return [group.get(operand, one) for operand, one in zip(operands[1:], kinds, strict=True)]

    if name == "createpolicy":
        made = np.asarray(0, np.uint64)
    elif name == "cvt":
        made = _converted(*parts[-2:], group, operands)
    elif name == "setp":
        made = COMPARE[parts[1]](*sources(kind, kind))
    elif name == "selp":
        yes, no, which = sources("u" + kind[1:], "u" + kind[1:], "pred")
        made = np.where(which, yes, no)
    elif kind == "pred":
        made = PREDICATES[name](*sources(*["pred"] * (len(operands) - 1)))
    elif kind.startswith("bf16"):
        made = _bf16(name, parts, sources(*["u32" if kind == "bf16x2" else "u16"] * (len(operands) - 1)))
    elif kind == "f32":
        made = _float(name, sources(*["f32"] * (len(operands) - 1)))
    else:
        made = _integer(name, parts, sources(*_integer_kinds(parts)[: len(operands) - 1]))
    group.set(to, made, mask)


def _converted(to: str, source: str, group: Group, operands: list[str]) -> Array:
    if to.endswith("x2"):
        high, low = (group.get(name, "f32") for name in operands[1:3])
        if to == "bf16x2":
            return to_bf16(high).astype(np.uint32) << np.uint32(16) | to_bf16(low)
        return to_fp8(high, to) << np.uint16(8) | to_fp8(low, to)
    if source == "bf16":
        return from_bf16(group.get(operands[1], "u16"))
    x = group.get(operands[1], source)
    return to_bf16(x) if to == "bf16" else x.astype({"s": "i"}.get(to[0], to[0]) + str(int(to[1:]) // 8))


def _float(name: str, x: list[Array]) -> Array:
    """FP32 bits."""
    if name == "neg":
        return x[0].view(np.uint32) ^ np.uint32(1 << 31)
    if name == "fma":
        return to_f32(fused(*x))
    if name == "ex2":  # these two are used with ftz
        return to_f32(flushed(np.exp2(flushed(x[0]).astype(np.float64)).astype(np.float32)))
    if name == "rcp":
        return to_f32(flushed((1 / flushed(x[0]).astype(np.float64)).astype(np.float32)))
    return to_f32(FLOATS[name](*x))


def _bf16(name: str, parts: list[str], bits: list[Array]) -> Array:
    """BF16 arithmetic, on one or two numbers."""
    if parts[-1] == "bf16x2":
        single = [*parts[:-1], "bf16"]
        low = _bf16(name, single, [x.astype(np.uint16) for x in bits])
        high = _bf16(name, single, [(x >> np.uint32(16)).astype(np.uint16) for x in bits])
        return high.astype(np.uint32) << np.uint32(16) | low
    x = [from_bf16(one) for one in bits]
    if name == "max":
        assert parts[1:4] == ["NaN", "xorsign", "abs"], parts
        sign, size = (bits[0] ^ bits[1]) & np.uint16(0x8000), np.uint16(0x7FFF)
        most = np.maximum(bits[0] & size, bits[1] & size) | sign
        return np.where(np.isnan(x[0]) | np.isnan(x[1]), NAN_BF16, most).astype(np.uint16)
    one, zero = np.asarray(1, np.float32), np.asarray(-0.0, np.float32)
    return to_bf16(fused(*{"fma": x, "add": [x[0], one, x[-1]], "mul": [x[0], x[1], zero]}[name]))


def _integer_kinds(parts: list[str]) -> list[str]:
    """Types of the operands of an integer instruction."""
    name, kind = parts[0], parts[-1]
    if name in ("shl", "shr", "bfe"):
        return [kind, "u32", "u32"]
    return [kind, kind, kind[0] + str(2 * int(kind[1:])) if parts[1] == "wide" else kind]


def _integer(name: str, parts: list[str], x: list[Array]) -> Array:
    a, b, c = [*x, x[0], x[0]][:3]
    if name in ("mul", "mad"):
        wide = a.dtype.kind + str(min(2 * a.dtype.itemsize, 8))
        product = a.astype(wide) * b.astype(wide)
        product = product >> product.dtype.type(32) if parts[1] == "hi" else product
        product = product if parts[1] == "wide" else product.astype(a.dtype)
        return product + c if name == "mad" else product
    if name in ("div", "rem"):
        whole = np.abs(a.astype(np.int64)) // np.maximum(np.abs(b.astype(np.int64)), 1)
        whole = np.where((a < 0) != (b < 0), -whole, whole)
        return (whole if name == "div" else a - whole * b).astype(a.dtype)
    if name in ("shl", "shr"):
        width = 8 * a.dtype.itemsize
        by = np.minimum(b, width - 1).astype(a.dtype)
        return np.where((b >= width) & (a.dtype.kind == "u"), 0, a << by if name == "shl" else a >> by).astype(a.dtype)
    if name == "bfe":
        assert b.ndim == c.ndim == 0 and 0 < b + c <= 32
        return (a.view(np.uint32) << np.uint32(32 - b - c)).view(a.dtype) >> a.dtype.type(32 - c)
    return _permuted(a, b, c) if name == "prmt" else INTEGERS[name](*x)


def _permuted(a: Array, b: Array, selector: Array) -> Array:
    """prmt: each byte of the result is one of the eight of a and b, or its sign."""
    both, made = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32), np.asarray(0, np.uint32)
    for at in range(4):
        select = selector.astype(np.uint64) >> np.uint64(4 * at)
        byte = both >> (select & np.uint64(7)) * np.uint64(8) & np.uint64(0xFF)
        byte = np.where(select & np.uint64(8), byte // np.uint64(0x80) * np.uint64(0xFF), byte)
        made = made | byte.astype(np.uint32) << np.uint32(8 * at)
    return made


def names_in(operand: str) -> list[str]:
    """The registers of {a, b}."""
    return re.findall(r"[^\s,{}]+", operand)


def move(kind: str, group: Group, mask: Array | None, operands: list[str]) -> None:
    """mov, of one register or of halves of one."""
    to, source = operands
    if kind == "pred":
        return group.set(to, group.get(source, kind), mask)
    bits = int(kind[1:])
    whole, half, by = f"u{bits}", f"u{bits // 2}", UNSIGNED[bits // 8](bits // 2)
    if to[0] == "{":
        value = group.get(source, whole)
        for name, part in zip(names_in(to), (value, value >> by), strict=True):
            if name != "_":
                group.set(name, part.astype(UNSIGNED[bits // 16]), mask)
    elif source[0] == "{":
        low, high = (group.get(name, half).astype(UNSIGNED[bits // 8]) for name in names_in(source))
        group.set(to, low | high << by, mask)
    else:
        group.set(to, group.get(source, whole), mask)


def _parameter(group: Group, mask: Array | None, operands: list[str]) -> None:
    number = int(operands[1].rstrip("]").rpartition("_")[2])
    group.set(operands[0], np.asarray(group.launch.arguments[number] & (1 << 64) - 1, np.uint64))


def address_of(group: Group, operand: str, kind: str) -> Array:
    """What `[base + offset]` says, of each thread."""
    base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
    return group.whole(group.get(base, kind) + UNSIGNED[int(kind[1:]) // 8](int(offset or 0)))


def _access(parts: list[str], group: Group, mask: Array | None, operands: list[str]) -> None:
    """ld and st, of one to four registers."""
    load, shared, size = parts[0] == "ld", parts[1].startswith("shared"), int(parts[-1][1:]) // 8
    registers, place = operands[:2] if load else operands[1::-1]
    names, pick = names_in(registers), group.whole(np.asarray(True) if mask is None else mask)
    address = address_of(group, place, "u32" if shared else "u64")[pick]
    local, warp = group.local[pick], group.warp[pick]
    program, memory, barriers = group.programs[local], group.launch.memory, group.shared.barriers
    if load:
        total = size * len(names)
        data = (
            group.shared.load(local, warp, address, total) if shared else memory.load(address, total, program, barriers)
        )
        words = np.ascontiguousarray(data).view(UNSIGNED[size])
        for at, name in enumerate(names):
            whole = np.zeros(group.shape, UNSIGNED[size])
            whole[pick] = words[:, at]
            group.set(name, whole, mask)
        return
    data = np.stack([group.whole(group.get(name, f"u{8 * size}"))[pick] for name in names], -1).view(np.uint8)
    if shared:
        group.shared.store(local, warp, address, data)
    else:
        memory.store(address, data, program, barriers)


def _matrix_access(parts: list[str], group: Group, mask: Array | None, operands: list[str]) -> None:
    """ldmatrix and stmatrix of 8x8 numbers of 16 bits: lane i holds the address of row i % 8 of matrix i // 8."""
    load = parts[0] == "ldmatrix"
    registers, place = operands if load else operands[::-1]
    names = names_in(registers)
    address = address_of(group, place, "u32").reshape(len(group.programs), -1, WARP)
    if mask is not None or (address[:, :, : 8 * len(names)] % 16).any():
        raise Fault("matrix access with a predicate or not aligned")
    lane, half = np.arange(WARP)[:, None], np.arange(2)
    row, byte = lane // 4, 4 * (lane % 4) + 2 * half
    if "trans" in parts:
        row, byte = 2 * (lane % 4) + half, 2 * (lane // 4)
    row, byte = np.broadcast_arrays(row, byte.astype(np.uint32))
    local, warp = group.local.repeat(2), group.warp.repeat(2)
    for number, name in enumerate(names):
        own = (address[:, :, 8 * number + row] + byte).ravel()
        if load:
            data = group.shared.load(local, warp, own, 2)
            group.set(name, data.reshape(-1, 4).view(np.uint32).reshape(group.shape))
        else:
            halves = np.ascontiguousarray(group.whole(group.get(name, "u32"))).reshape(-1, 1).view(np.uint8)
            group.shared.store(local, warp, own, halves.reshape(-1, 2))


def _warps(group: Group, name: str, kind: str) -> Array:
    """An operand [programs, warps, lanes]."""
    return group.whole(group.get(name, kind)).reshape(len(group.programs), -1, WARP)


def _shuffle(parts: list[str], group: Group, mask: Array | None, operands: list[str]) -> None:
    to, source, number, clamp, members = operands
    if mask is not None or int(clamp, 0) != WARP - 1 or int(members, 0) not in (-1, 0xFFFFFFFF):
        raise Fault("shfl among some of the lanes")
    lane = _warps(group, number, "u32").astype(np.int64)
    lane = np.arange(WARP) ^ lane if parts[2] == "bfly" else lane
    group.set(to, np.take_along_axis(_warps(group, source, "u32"), lane % WARP, 2).reshape(group.shape), mask)


def _reduce(parts: list[str], group: Group, mask: Array | None, operands: list[str]) -> None:
    value, members = _warps(group, operands[1], parts[-1]), _warps(group, operands[2], "u32")
    lane = np.arange(WARP)
    among = (members[..., None] >> lane.astype(np.uint32) & 1).astype(bool)
    agree = (members[:, :, None, :] == members[..., None]) | ~among
    if mask is not None or not agree.all() or not among[..., lane, lane].all():
        raise Fault("redux: lanes that do not agree who takes part")
    least = np.iinfo(value.dtype).min
    assert parts[2] == "max", parts
    group.set(operands[0], np.where(among, value[:, :, None, :], least).max(-1).reshape(group.shape))
