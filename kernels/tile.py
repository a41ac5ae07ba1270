"""What the quantisers share: the scale of a block, and a tile of 128x128 read once and written as both copies.

scale_inv = amax / fp8_max, rounded up to 2^k for pow2, at least 2^-126, 1 for an all-zero block, NaN for a block with a
NaN or an Inf; qdata = saturate(x * (1 / scale_inv)), bit for bit as fp8train.quant.reference.quantize.

A tile is STRIPS strips (strip i: rows STRIPS j + i), so that the neighbouring rows of a column meet in a thread, which
writes them side by side. One pass over them finds the scales of the columns, a second one writes both copies; between
the two they are kept as BF16, or calculated again. Row copy: qdata [M, K],
scale_inv [M, ceil(K/128)], M contiguous. Column copy: qdata [K, M], scale_inv [K, ceil(M/128)], K contiguous. Leading
dimensions are padded (empty_codes, empty_scales): tiles are stored, and read by a GEMM, whole.
Source: DeepSeek-V3 (arXiv:2412.19437) 3.3.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128
NUM_WARPS = 8  # of a tile of which a column copy is written; 4 warps hold twice as much a thread
ROW_WARPS = 8  # of one of which none is
SIZE_LIMIT = 2**31

INF_BITS = tl.constexpr(0x7F800000)
ONE_BITS = tl.constexpr(0x3F800000)
MIN_NORMAL = tl.constexpr(2.0**-126)
MIN_NORMAL_BITS = tl.constexpr(0x00800000)


@triton.jit
def scales(amax_bits, MAX_BITS: tl.constexpr, POW2: tl.constexpr):
    """Bits of amax -> scale_inv and encode_scale = 1 / scale_inv, fp32; MAX_BITS: those of the format's maximum."""
    if POW2:
        # amax / max <= 2^k just where amax <= max * 2^k, so the division and its inverse are integer sums on the bits
        scale_bits = (amax_bits + (0x7FFFFF - MAX_BITS % 0x800000)) & INF_BITS
        scale_bits = tl.maximum(scale_bits - (MAX_BITS // 0x800000 - 127) * 0x800000, MIN_NORMAL_BITS)
        scale_bits = tl.where(amax_bits == 0, ONE_BITS, scale_bits)
        scale_inv = scale_bits.to(tl.float32, bitcast=True)
        encode_scale = (0x7F000000 - scale_bits).to(tl.float32, bitcast=True)
    else:
        limit = tl.full([], MAX_BITS, tl.int32).to(tl.float32, bitcast=True)
        scale_inv = tl.maximum(tl.div_rn(amax_bits.to(tl.float32, bitcast=True), limit), MIN_NORMAL)
        scale_inv = tl.where(amax_bits == 0, 1.0, scale_inv)
        encode_scale = tl.div_rn(1.0, scale_inv)
    finite = amax_bits < INF_BITS
    return tl.where(finite, scale_inv, float("nan")), tl.where(finite, encode_scale, float("nan"))


@triton.jit
def magnitude_bits(x):
    """Bits of |x|, whose maximum is that of the numbers, or a NaN's: a floating-point maximum drops NaN."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def strip(i, m, k, M, K, STRIPS: tl.constexpr):
    """Rows STRIPS j + i [128 / STRIPS] and columns [128] of the tile at (m, k), from its corner; which are inside."""
    rows, cols = STRIPS * tl.arange(0, 128 // STRIPS) + i, tl.arange(0, 128)
    return rows, cols, (rows < (M - m).to(tl.int32))[:, None] & (cols < (K - k).to(tl.int32))[None, :]


@triton.jit
def load_strip(x_ptr, stride_xm, i, m, k, M, K, STRIPS: tl.constexpr):
    """Strip i of the tile at (m, k) of x [M, K], fp32, zero outside."""
    _, _, inside = strip(i, m, k, M, K, STRIPS)
    rows, cols = STRIPS * tl.arange(0, 128 // STRIPS), tl.arange(0, 128)
    x_ptr += (m + i) * stride_xm + k  # a scalar: the strips share the offsets below
    return tl.load(x_ptr + rows.to(tl.int64)[:, None] * stride_xm + cols[None, :], mask=inside, other=0.0).to(
        tl.float32
    )


@triton.jit
def store_strip(x, out_ptr, stride_om, i, m, k, M, K, STRIPS: tl.constexpr):
    """Write strip i of a tile in the dtype of out [M, K]."""
    _, _, inside = strip(i, m, k, M, K, STRIPS)
    rows, cols = STRIPS * tl.arange(0, 128 // STRIPS), tl.arange(0, 128)
    out_ptr += (m + i) * stride_om + k
    offsets = rows.to(tl.int64)[:, None] * stride_om + cols[None, :]
    tl.store(out_ptr + offsets, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def four_strips(STRIP: tl.constexpr, arguments, i, m, k, M, K, STRIPS: tl.constexpr):
    """Strips i to i + 3; all before the first is used, so that their loads are in flight together."""
    return (
        STRIP(*arguments, i, m, k, M, K, STRIPS), STRIP(*arguments, i + 1, m, k, M, K, STRIPS),
        STRIP(*arguments, i + 2, m, k, M, K, STRIPS), STRIP(*arguments, i + 3, m, k, M, K, STRIPS),
    )  # fmt: skip


@triton.jit
def store_plain(STRIP: tl.constexpr, arguments, out_ptr, stride_om, m, k, M, K):
    """Write a tile unquantised."""
    x = four_strips(STRIP, arguments, 0, m, k, M, K, 4)
    for i in tl.static_range(4):
        store_strip(x[i], out_ptr, stride_om, i, m, k, M, K, 4)


@triton.jit
def store_row_copy(
    x,  # strip i of the tile at (m, k), fp32
    qdata_ptr,  # [M, K] fp8
    scale_inv_ptr,  # [M, ceil(K/128)] fp32
    stride_qm, stride_sk, i, m, k, M, K, MAX_BITS: tl.constexpr, POW2: tl.constexpr, STRIPS: tl.constexpr,
):  # fmt: skip
    """Write the row copy of a strip."""
    rows, _, _ = strip(i, m, k, M, K, STRIPS)
    scale_inv, encode_scale = scales(tl.max(magnitude_bits(x), axis=1), MAX_BITS, POW2)
    store_strip(encode_scale[:, None] * x, qdata_ptr, stride_qm, i, m, k, M, K, STRIPS)
    scale_inv_ptr += k // 128 * stride_sk + m
    tl.store(scale_inv_ptr + rows, scale_inv, mask=rows < (M - m).to(tl.int32))


@triton.jit
def packed(x, zero):
    """Numbers of a strip that BF16 holds, two neighbours to a word, so that they can wait in half the registers.

    zero: 0, which the compiler must not know: it would keep the numbers that it sees to be packed and unpacked again.
    """
    even, odd = tl.split(tl.reshape(x.to(tl.int32, bitcast=True), [x.shape[0], 64, 2]))
    return ((even >> 16) & 0xFFFF | (odd & -65536)) ^ zero


@triton.jit
def unpacked(words):
    """The strip of such words."""
    even, odd = (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)
    return tl.reshape(tl.join(even, odd), [words.shape[0], 128])


@triton.jit
def measure(
    STRIP: tl.constexpr, arguments, zero, m, k, M, K, i: tl.constexpr, STEP: tl.constexpr, STRIPS: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Bits of the largest magnitudes over strips i to i + 2 STEP [128 / STRIPS, 128]; the packed strips, if KEEP."""
    if STEP == 0:
        x = STRIP(*arguments, i, m, k, M, K, STRIPS)
        if KEEP:
            return magnitude_bits(x), packed(x, zero)
        else:
            return magnitude_bits(x), zero
    else:
        amax_bits, words = measure(STRIP, arguments, zero, m, k, M, K, i, STEP // 2, STRIPS, KEEP)
        more_bits, more_words = measure(STRIP, arguments, zero, m, k, M, K, i + STEP, STEP // 2, STRIPS, KEEP)
        if KEEP:
            return tl.maximum(amax_bits, more_bits), tl.join(words, more_words)
        else:
            return tl.maximum(amax_bits, more_bits), zero


@triton.jit
def column_scales(amax_bits, MAX_BITS: tl.constexpr, POW2: tl.constexpr):
    """scale_inv and encode_scale [128] of the columns of a tile from the maxima of its strips [128 / STRIPS, 128].

    A thread holds 8 neighbouring columns: reduced in that order, 16 threads of a warp meet in a bank of shared memory.
    """
    rows: tl.constexpr = amax_bits.shape[0]
    apart = tl.reshape(tl.permute(tl.reshape(amax_bits, [rows, 16, 8]), (0, 2, 1)), [rows, 128])
    together = tl.permute(tl.reshape(tl.max(apart, axis=0), [8, 16]), (1, 0))
    return scales(tl.reshape(together, [128]), MAX_BITS, POW2)


@triton.jit
def column_codes(x, encode_scale, FP8: tl.constexpr):
    """FP8 codes [rows, 128, 4] of four strips.

    Neighbours in a tensor are converted in pairs. Here they are rows, so that a pair is half of a word of the column
    copy, and that no conversion is shared with the row copy: ptxas 12.x loses bytes of an FP8 pair that is stored both
    straight and transposed (triton-lang/triton#11111).
    """
    low = tl.join(encode_scale * x[0], encode_scale * x[2])
    high = tl.join(encode_scale * x[1], encode_scale * x[3])
    return tl.reshape(tl.join(low, high), [low.shape[0], 128, 4]).to(FP8)


@triton.jit
def encode(
    STRIP: tl.constexpr, arguments, words, encode_scale, row, m, k, M, K, i: tl.constexpr, STEP: tl.constexpr,
    FP8: tl.constexpr, MAX_BITS: tl.constexpr, POW2: tl.constexpr, ROW: tl.constexpr, STRIPS: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Write the row copy of strips i to i + 2 STEP, return codes of the column copy [128 / STRIPS, 128, 4, ...]."""
    if STEP == 2:
        if KEEP:
            low, high = tl.split(words)
            one, two = tl.split(low)
            three, four = tl.split(high)
            x = unpacked(one), unpacked(two), unpacked(three), unpacked(four)
        else:
            x = four_strips(STRIP, arguments, i, m, k, M, K, STRIPS)
        if ROW:
            for j in tl.static_range(4):
                store_row_copy(x[j], *row, i + j, m, k, M, K, MAX_BITS, POW2, STRIPS)
        return column_codes(x, encode_scale[None, :], FP8)
    else:
        one, two = words, words
        if KEEP:
            one, two = tl.split(words)
        return tl.join(
            encode(
                STRIP, arguments, one, encode_scale, row, m, k, M, K, i, STEP // 2,
                FP8, MAX_BITS, POW2, ROW, STRIPS, KEEP,
            ),
            encode(
                STRIP, arguments, two, encode_scale, row, m, k, M, K, i + STEP, STEP // 2,
                FP8, MAX_BITS, POW2, ROW, STRIPS, KEEP,
            ),
        )  # fmt: skip


@triton.jit
def store_transposed(codes, qdata_ptr, stride_qk, m, k, K):
    """Store the FP8 codes that `encode` returned transposed, in qdata [K, M]; its rows are stored whole."""
    if len(codes.shape) == 5:
        codes = tl.permute(codes, (1, 0, 4, 3, 2))
    elif len(codes.shape) == 4:
        codes = tl.permute(codes, (1, 0, 3, 2))
    else:
        codes = tl.permute(codes, (1, 0, 2))
    cols = tl.arange(0, 128)[:, None]
    offsets = k * stride_qk + m + cols.to(tl.int64) * stride_qk + tl.arange(0, 128)[None, :]
    tl.store(qdata_ptr + offsets, tl.reshape(codes, [128, 128]), mask=cols < (K - k).to(tl.int32))


@triton.jit
def store_tile(
    STRIP: tl.constexpr, arguments,  # STRIP(*arguments, i, m, k, M, K, STRIPS): strip i of a tile, fp32, zero outside
    zero,  # 0; see packed
    m, k, M, K,  # the corner of the tile, int64; the sizes of the matrix
    row_ptr, row_scale_ptr, col_ptr, col_scale_ptr, stride_row, stride_row_scale, stride_col, stride_col_scale,
    MAX_BITS: tl.constexpr, ROW_POW2: tl.constexpr, COL_POW2: tl.constexpr, ROW: tl.constexpr, COL: tl.constexpr,
    STRIPS: tl.constexpr,
    KEEP: tl.constexpr,  # keep the strips, which BF16 must hold, between the two passes; else call STRIP again
):  # fmt: skip
    """Write the copies of a tile that are asked for: one pass for the scales of the columns, one for the codes."""
    row = row_ptr, row_scale_ptr, stride_row, stride_row_scale
    if COL:
        amax_bits, words = measure(STRIP, arguments, zero, m, k, M, K, 0, STRIPS // 2, STRIPS, KEEP)
        scale_inv, encode_scale = column_scales(amax_bits, MAX_BITS, COL_POW2)
        cols = tl.arange(0, 128)
        tl.store(col_scale_ptr + m // 128 * stride_col_scale + k + cols, scale_inv, mask=cols < (K - k).to(tl.int32))
        codes = encode(
            STRIP, arguments, words, encode_scale, row, m, k, M, K, 0, STRIPS // 2,
            col_ptr.dtype.element_ty, MAX_BITS, ROW_POW2, ROW, STRIPS, KEEP,
        )  # fmt: skip
        store_transposed(codes, col_ptr, stride_col, m, k, K)
    else:
        x = four_strips(STRIP, arguments, 0, m, k, M, K, 4)
        for i in tl.static_range(4):
            store_row_copy(x[i], *row, i, m, k, M, K, MAX_BITS, ROW_POW2, 4)


@triton.jit
def losses(x, encode_scale, inside, FP8: tl.constexpr, MAX_BITS: tl.constexpr):
    """Of 32 rows of a strip: bits of the finite amax [32]; flushed, saturated, non-finite counts [32], 10 bits each."""
    bits, scaled = magnitude_bits(x), encode_scale * x
    finite = inside & (bits < INF_BITS)
    codes = scaled.to(FP8).to(tl.uint8, bitcast=True)
    flushed = finite & (bits != 0) & ((codes & 0x7F) == 0)  # a zero stays zero, whatever its sign
    # an fp32 scale, rounded twice, takes amax up to 4 ulp beyond the maximum
    saturated = finite & (magnitude_bits(scaled) > MAX_BITS + 4) & (magnitude_bits(scaled) < INF_BITS)
    nonfinite = inside & (bits >= INF_BITS)
    counts = flushed.to(tl.int32) | (saturated.to(tl.int32) << 10) | (nonfinite.to(tl.int32) << 20)
    return tl.max(tl.where(finite, bits, 0), axis=1), tl.sum(counts, axis=1)


@triton.jit
def add_statistics(stats_ptr, amax_bits, counts, m, k, M, K):
    """Add the losses of a tile at (m, k) to stats [5] int64, in the order of STATISTICS."""
    tl.atomic_max(stats_ptr, tl.max(amax_bits).to(tl.int64))
    tl.atomic_add(stats_ptr + 1, tl.sum(counts & 0x3FF).to(tl.int64))
    tl.atomic_add(stats_ptr + 2, tl.sum((counts >> 10) & 0x3FF).to(tl.int64))
    tl.atomic_add(stats_ptr + 3, tl.sum(counts >> 20).to(tl.int64))
    tl.atomic_add(stats_ptr + 4, tl.minimum(M - m, 128) * tl.minimum(K - k, 128))


def empty_codes(x: Tensor, rows: int, cols: int, dtype: torch.dtype, multiple: int) -> Tensor:
    """[rows, cols] with a leading stride that is a multiple of `multiple`: TMA wants 16 bytes, whole tiles 128."""
    padded = -(-cols // multiple) * multiple
    made = torch.empty(rows, padded, dtype=dtype, device=x.device)
    return made if padded == cols else made[:, :cols]


def empty_scales(x: Tensor, rows: int, cols: int) -> Tensor:
    """[rows, ceil(cols/128)] fp32, rows contiguous; a GEMM tile of up to 256 rows may read beyond the last one."""
    blocks, padded = -(-cols // BLOCK), -(-(rows + 255) // 16) * 16
    return torch.empty(blocks * padded, dtype=torch.float32, device=x.device).as_strided((rows, blocks), (1, padded))


def empty_copies(
    x: Tensor, fp8_dtype: torch.dtype, columns: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Row copy and column copy of x [M, K], each with its scales; without `columns` the last two are None."""
    M, K = x.shape
    row = empty_codes(x, M, K, fp8_dtype, 16), empty_scales(x, M, K)
    return (*row, empty_codes(x, K, M, fp8_dtype, BLOCK), empty_scales(x, K, M)) if columns else (*row, None, None)


def tiling(
    packs: bool, columns: bool, keep: bool, num_warps: int, max_registers: int | None = None
) -> tuple[dict[str, object], dict[str, object]]:
    """Constants and options of a launch: of each of 64 / num_warps strips a thread holds 8 numbers.

    packs: the numbers are BF16; others are not kept. max_registers: None where fewer than the compiler wants spill.
    """
    if not columns:
        return {"STRIPS": 4, "KEEP": False}, {"num_warps": ROW_WARPS}
    limit: dict[str, object] = {"maxnreg": max_registers} if max_registers else {}
    return {"STRIPS": 64 // num_warps, "KEEP": keep and packs}, {"num_warps": num_warps} | limit


def tiles(rows: int, cols: int, parts: int = 1) -> tuple[int]:
    """Grid with `parts` programs to each tile of 128x128."""
    return (parts * -(-rows // BLOCK) * -(-cols // BLOCK),)


def leading_strides(
    row: Tensor | None, row_scale: Tensor | None, col: Tensor | None, col_scale: Tensor | None
) -> list[int]:
    """Strides of both copies as the kernels take them; 0 for what is not there."""
    axes = ((row, 0), (row_scale, 1), (col, 0), (col_scale, 1))
    return [0 if tensor is None else tensor.stride(axis) for tensor, axis in axes]


def max_bits(fp8_max: float) -> int:
    """Bit pattern of fp8_max as an fp32 number."""
    fraction, exponent = math.frexp(fp8_max)
    return (exponent + 126 << 23) | int((2 * fraction - 1) * 2**23)


def check_matrix(name: str, label: str, x: Tensor, sizes: str = "[M, K]") -> None:
    """Raise ValueError unless x is a matrix in bf16 or fp32, row-major, with dimensions that offsets can hold."""
    if x.dim() != 2 or x.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(
            f"{name}: {label} is {list(x.shape)} {x.dtype}; needs {sizes} in torch.bfloat16 or torch.float32. "
            "Reshape or cast it."
        )
    if x.shape[1] > 1 and x.shape[0] > 0 and x.stride(1) != 1:
        raise ValueError(f"{name}: {label} has strides {x.stride()}; needs (any, 1). Pass {label}.contiguous().")
    if max(x.shape) >= SIZE_LIMIT:
        raise ValueError(f"{name}: {label} is {list(x.shape)}; needs dimensions below 2^31. Split it.")


def check_format(name: str, fp8_dtype: torch.dtype, block: int) -> None:
    """Raise ValueError unless format and block are ones that the kernels serve."""
    if fp8_dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        raise ValueError(f"{name}: fp8_dtype is {fp8_dtype}; needs torch.float8_e4m3fn or torch.float8_e5m2.")
    if block != BLOCK:
        raise ValueError(f"{name}: block is {block}; needs {BLOCK}. Other blocks run on backend=reference.")
