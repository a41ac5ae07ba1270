"""What the quantisers share: the scale of a block, and a tile of 128x128 read once and written as both copies.

scale_inv = amax / fp8_max, rounded up to 2^k for pow2, at least 2^-126, 1 for an all-zero block, NaN for a block with a
NaN or an Inf; qdata = saturate(x * (1 / scale_inv)), bit for bit as fp8train.quant.reference.quantize.

A tile is four quarters (rows 4 j + i), so that the four rows of a packed word meet in a thread. Row copy: qdata [M, K],
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
NUM_WARPS = 8  # 4 warps spill with both copies and fp32 scales
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
def quarter(i, m, k, M, K):
    """Rows [32] and columns [128] of quarter i of the tile at (m, k), from its corner, and which are inside [M, K]."""
    rows, cols = 4 * tl.arange(0, 32) + i, tl.arange(0, 128)
    return rows, cols, (rows < (M - m).to(tl.int32))[:, None] & (cols < (K - k).to(tl.int32))[None, :]


@triton.jit
def load_quarter(x_ptr, stride_xm, i, m, k, M, K):
    """Quarter i of the tile at (m, k) of x [M, K], fp32, zero outside."""
    rows, cols, inside = quarter(i, m, k, M, K)
    x_ptr += m * stride_xm + k + rows.to(tl.int64)[:, None] * stride_xm + cols[None, :]
    return tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_rows(
    x, m, k, M, K,  # quarters of a tile as in store_tile
    qdata_ptr,  # [M, K] fp8
    scale_inv_ptr,  # [M, ceil(K/128)] fp32
    stride_qm, stride_sk, MAX_BITS: tl.constexpr, POW2: tl.constexpr,
):  # fmt: skip
    """Write the row copy of a tile."""
    qdata_ptr += m * stride_qm + k
    scale_inv_ptr += k // 128 * stride_sk + m
    for i in tl.static_range(4):
        rows, cols, inside = quarter(i, m, k, M, K)
        scale_inv, encode_scale = scales(tl.max(magnitude_bits(x[i]), axis=1), MAX_BITS, POW2)
        qdata = (encode_scale[:, None] * x[i]).to(qdata_ptr.dtype.element_ty)
        tl.store(qdata_ptr + rows.to(tl.int64)[:, None] * stride_qm + cols[None, :], qdata, mask=inside)
        tl.store(scale_inv_ptr + rows, scale_inv, mask=rows < (M - m).to(tl.int32))


@triton.jit
def column_scales(x, MAX_BITS: tl.constexpr, POW2: tl.constexpr):
    """scale_inv and encode_scale [128] of the columns of a tile, from its quarters."""
    low = tl.maximum(magnitude_bits(x[0]), magnitude_bits(x[1]))
    high = tl.maximum(magnitude_bits(x[2]), magnitude_bits(x[3]))
    return scales(tl.max(tl.maximum(low, high), axis=0), MAX_BITS, POW2)


@triton.jit
def store_columns(
    x, m, k, K,  # quarters of a tile as in store_tile
    qdata_ptr,  # [K, M] fp8
    scale_inv_ptr,  # [K, ceil(M/128)] fp32
    stride_qk, stride_sm, MAX_BITS: tl.constexpr, POW2: tl.constexpr,
):  # fmt: skip
    """Write the transposed column copy of a tile."""
    scale_inv, encode_scale = column_scales(x, MAX_BITS, POW2)
    encode_scale = encode_scale[None, :]
    scaled = encode_scale * x[0], encode_scale * x[1], encode_scale * x[2], encode_scale * x[3]
    store_transposed(scaled, m, k, K, qdata_ptr, stride_qk)
    cols = tl.arange(0, 128)
    tl.store(scale_inv_ptr + m // 128 * stride_sm + k + cols, scale_inv, mask=cols < (K - k).to(tl.int32))


@triton.jit
def store_transposed(x, m, k, K, qdata_ptr, stride_qk):
    """Store the scaled quarters of the tile at (m, k) as FP8, transposed, in qdata [K, M]; its rows are stored whole.

    Neighbours in a tensor are converted in pairs. Here they are rows, so that a pair is half of a word of qdata, and
    that no conversion is shared with a row copy: ptxas 12.x loses bytes of an FP8 pair that is stored both straight and
    transposed (triton-lang/triton#11111).
    """
    pairs = tl.join(tl.join(x[0], x[2]), tl.join(x[1], x[3]))
    codes = tl.permute(tl.reshape(pairs, [32, 128, 4]).to(qdata_ptr.dtype.element_ty), (1, 0, 2))
    cols = tl.arange(0, 128)[:, None]
    offsets = k * stride_qk + m + cols.to(tl.int64) * stride_qk + tl.arange(0, 128)[None, :]
    tl.store(qdata_ptr + offsets, tl.reshape(codes, [128, 128]), mask=cols < (K - k).to(tl.int32))


@triton.jit
def store_tile(
    x,  # 4 quarters [32, 128] fp32 of a tile: rows 4 j + i; zero outside [M, K]
    m, k, M, K,  # its corner, int64; the sizes of the matrix
    row_ptr, row_scale_ptr, col_ptr, col_scale_ptr, stride_row, stride_row_scale, stride_col, stride_col_scale,
    MAX_BITS: tl.constexpr, ROW_POW2: tl.constexpr, COL_POW2: tl.constexpr, ROW: tl.constexpr, COL: tl.constexpr,
):  # fmt: skip
    """Write the copies of a tile that are asked for."""
    if ROW:
        store_rows(x, m, k, M, K, row_ptr, row_scale_ptr, stride_row, stride_row_scale, MAX_BITS, ROW_POW2)
    if COL:
        store_columns(x, m, k, K, col_ptr, col_scale_ptr, stride_col, stride_col_scale, MAX_BITS, COL_POW2)


@triton.jit
def store_quarters(x, m, k, M, K, out_ptr, stride_om):
    """Write the quarters of a tile, unquantised."""
    for i in tl.static_range(4):
        rows, cols, inside = quarter(i, m, k, M, K)
        offsets = m * stride_om + k + rows.to(tl.int64)[:, None] * stride_om + cols[None, :]
        tl.store(out_ptr + offsets, x[i].to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def losses(x, encode_scale, inside, FP8: tl.constexpr, MAX_BITS: tl.constexpr):
    """Of a quarter's rows: bits of the finite amax [32]; flushed, saturated, non-finite counts [32], 10 bits each."""
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
    return torch.empty(rows, padded, dtype=dtype, device=x.device)[:, :cols]


def empty_scales(x: Tensor, rows: int, cols: int) -> Tensor:
    """[rows, ceil(cols/128)] fp32, rows contiguous; a GEMM tile of up to 256 rows may read beyond the last one."""
    padded = -(-(rows + 255) // 16) * 16
    return torch.empty(-(-cols // BLOCK), padded, dtype=torch.float32, device=x.device).t()[:rows]


def empty_copies(
    x: Tensor, fp8_dtype: torch.dtype, columns: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Row copy and column copy of x [M, K], each with its scales; without `columns` the last two are None."""
    M, K = x.shape
    row = empty_codes(x, M, K, fp8_dtype, 16), empty_scales(x, M, K)
    return (*row, empty_codes(x, K, M, fp8_dtype, BLOCK), empty_scales(x, K, M)) if columns else (*row, None, None)


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
