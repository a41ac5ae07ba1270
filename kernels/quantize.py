"""Quantize a matrix in blocks of 128: a row copy (1x128), a transposed column copy (128x1), or both from one read.

scale_inv = amax / fp8_max, rounded up to 2^k for pow2, at least 2^-126, 1 for an all-zero block, NaN for a block with a
NaN or an Inf; qdata = saturate(x * (1 / scale_inv)), bit for bit as fp8train.quant.reference.quantize.

x [M, K] bf16/fp32, row-major, any leading stride.
Row copy: qdata [M, K], scale_inv [M, ceil(K/128)], M contiguous. Column copy: qdata [K, M], scale_inv [K, ceil(M/128)],
K contiguous. Leading dimensions are padded (_empty_codes, _empty_scales): tiles are stored, and read by a GEMM, whole.
One program: a tile of 128x128 in four quarters (rows 4 j + i), so that the four rows of a packed word meet in a thread.
Kernel files import no other, so the fused producers repeat the functions that store a tile; tests hold them identical.
Source: DeepSeek-V3 (arXiv:2412.19437) 3.3. Measured: not on hardware yet.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128
STATISTICS = ("amax_bits", "flushed", "saturated", "nonfinite", "elements")
NUM_WARPS = 8  # 4 warps spill with both copies and fp32 scales
SIZE_LIMIT = 2**31

INF_BITS = tl.constexpr(0x7F800000)
ONE_BITS = tl.constexpr(0x3F800000)
MIN_NORMAL = tl.constexpr(2.0**-126)
MIN_NORMAL_BITS = tl.constexpr(0x00800000)


@triton.jit
def _scales(amax_bits, MAX_BITS: tl.constexpr, POW2: tl.constexpr):
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
def _magnitude_bits(x):
    """Bits of |x|, whose maximum is that of the numbers, or a NaN's: a floating-point maximum drops NaN."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _quarter(i, m, k, M, K):
    """Rows [32] and columns [128] of quarter i of the tile at (m, k), from its corner, and which are inside [M, K]."""
    rows, cols = 4 * tl.arange(0, 32) + i, tl.arange(0, 128)
    return rows, cols, (rows < (M - m).to(tl.int32))[:, None] & (cols < (K - k).to(tl.int32))[None, :]


@triton.jit
def _store_rows(
    x, m, k, M, K,  # quarters of a tile as in _store_tile
    qdata_ptr,  # [M, K] fp8
    scale_inv_ptr,  # [M, ceil(K/128)] fp32
    stride_qm, stride_sk, MAX_BITS: tl.constexpr, POW2: tl.constexpr,
):  # fmt: skip
    """Write the row copy of a tile."""
    qdata_ptr += m * stride_qm + k
    scale_inv_ptr += k // 128 * stride_sk + m
    for i in tl.static_range(4):
        rows, cols, inside = _quarter(i, m, k, M, K)
        scale_inv, encode_scale = _scales(tl.max(_magnitude_bits(x[i]), axis=1), MAX_BITS, POW2)
        qdata = (encode_scale[:, None] * x[i]).to(qdata_ptr.dtype.element_ty)
        tl.store(qdata_ptr + rows.to(tl.int64)[:, None] * stride_qm + cols[None, :], qdata, mask=inside)
        tl.store(scale_inv_ptr + rows, scale_inv, mask=rows < (M - m).to(tl.int32))


@triton.jit
def _column_scales(x, MAX_BITS: tl.constexpr, POW2: tl.constexpr):
    """scale_inv and encode_scale [128] of the columns of a tile, from its quarters."""
    low = tl.maximum(_magnitude_bits(x[0]), _magnitude_bits(x[1]))
    high = tl.maximum(_magnitude_bits(x[2]), _magnitude_bits(x[3]))
    return _scales(tl.max(tl.maximum(low, high), axis=0), MAX_BITS, POW2)


@triton.jit
def _store_columns(
    x, m, k, K,  # quarters of a tile as in _store_tile
    qdata_ptr,  # [K, M] fp8
    scale_inv_ptr,  # [K, ceil(M/128)] fp32
    stride_qk, stride_sm, MAX_BITS: tl.constexpr, POW2: tl.constexpr,
):  # fmt: skip
    """Write the transposed column copy of a tile."""
    scale_inv, encode_scale = _column_scales(x, MAX_BITS, POW2)
    encode_scale = encode_scale[None, :]
    codes = (
        (encode_scale * x[0]).to(qdata_ptr.dtype.element_ty),
        (encode_scale * x[1]).to(qdata_ptr.dtype.element_ty),
        (encode_scale * x[2]).to(qdata_ptr.dtype.element_ty),
        (encode_scale * x[3]).to(qdata_ptr.dtype.element_ty),
    )
    _store_transposed(codes, m, k, K, qdata_ptr, stride_qk)
    cols = tl.arange(0, 128)
    tl.store(scale_inv_ptr + m // 128 * stride_sm + k + cols, scale_inv, mask=cols < (K - k).to(tl.int32))


@triton.jit
def _word_byte(code, SHIFT: tl.constexpr):
    """An FP8 code as a byte of an int32."""
    return code.to(tl.uint8, bitcast=True).to(tl.int32) << SHIFT


@triton.jit
def _store_transposed(codes, m, k, K, qdata_ptr, stride_qk):
    """Store the FP8 quarters [32, 128] of the tile at (m, k) transposed, in qdata [K, M]; its rows are stored whole.

    Four rows become one 32-bit word within a thread and the words are transposed: a fourth of the shared memory
    accesses, and no FP8 tile is ever transposed, which ptxas 12.x miscompiles (triton-lang/triton#11111).
    """
    words = _word_byte(codes[0], 0) | _word_byte(codes[1], 8) | _word_byte(codes[2], 16) | _word_byte(codes[3], 24)
    cols = tl.arange(0, 128)[:, None]
    words_ptr = (qdata_ptr + k * stride_qk + m).to(tl.pointer_type(tl.int32), bitcast=True)
    words_ptr += cols.to(tl.int64) * (stride_qk // 4) + tl.arange(0, 32)[None, :]
    tl.store(words_ptr, tl.trans(words), mask=cols < (K - k).to(tl.int32))


@triton.jit
def _store_tile(
    x,  # 4 quarters [32, 128] fp32 of a tile: rows 4 j + i; zero outside [M, K]
    m, k, M, K,  # its corner, int64; the sizes of the matrix
    row_ptr, row_scale_ptr, col_ptr, col_scale_ptr, stride_row, stride_row_scale, stride_col, stride_col_scale,
    MAX_BITS: tl.constexpr, ROW_POW2: tl.constexpr, COL_POW2: tl.constexpr, ROW: tl.constexpr, COL: tl.constexpr,
):  # fmt: skip
    """Write the copies of a tile that are asked for."""
    if ROW:
        _store_rows(x, m, k, M, K, row_ptr, row_scale_ptr, stride_row, stride_row_scale, MAX_BITS, ROW_POW2)
    if COL:
        _store_columns(x, m, k, K, col_ptr, col_scale_ptr, stride_col, stride_col_scale, MAX_BITS, COL_POW2)


@triton.jit
def _load(x_ptr, stride_xm, i, m, k, M, K):
    """Quarter i of the tile at (m, k) of x [M, K], fp32, zero outside."""
    rows, cols, inside = _quarter(i, m, k, M, K)
    x_ptr += m * stride_xm + k + rows.to(tl.int64)[:, None] * stride_xm + cols[None, :]
    return tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _losses(x, encode_scale, inside, FP8: tl.constexpr, MAX_BITS: tl.constexpr):
    """Of a quarter's rows: bits of the finite amax [32]; flushed, saturated, non-finite counts [32], 10 bits each."""
    bits, scaled = _magnitude_bits(x), encode_scale * x
    finite = inside & (bits < INF_BITS)
    codes = scaled.to(FP8).to(tl.uint8, bitcast=True)
    flushed = finite & (bits != 0) & ((codes & 0x7F) == 0)  # a zero stays zero, whatever its sign
    # an fp32 scale, rounded twice, takes amax up to 4 ulp beyond the maximum
    saturated = finite & (_magnitude_bits(scaled) > MAX_BITS + 4) & (_magnitude_bits(scaled) < INF_BITS)
    nonfinite = inside & (bits >= INF_BITS)
    counts = flushed.to(tl.int32) | (saturated.to(tl.int32) << 10) | (nonfinite.to(tl.int32) << 20)
    return tl.max(tl.where(finite, bits, 0), axis=1), tl.sum(counts, axis=1)


@triton.jit
def _add_statistics(stats_ptr, amax_bits, counts, m, k, M, K):
    """Add the losses of a tile at (m, k) to stats [5] int64, in the order of STATISTICS."""
    tl.atomic_max(stats_ptr, tl.max(amax_bits).to(tl.int64))
    tl.atomic_add(stats_ptr + 1, tl.sum(counts & 0x3FF).to(tl.int64))
    tl.atomic_add(stats_ptr + 2, tl.sum((counts >> 10) & 0x3FF).to(tl.int64))
    tl.atomic_add(stats_ptr + 3, tl.sum(counts >> 20).to(tl.int64))
    tl.atomic_add(stats_ptr + 4, tl.minimum(M - m, 128) * tl.minimum(K - k, 128))


@triton.jit
def _count(
    x_ptr, stride_xm, m, k, M, K,
    scale_inv_ptr,  # of the tile: fp32 [128], of its columns or rows
    stats_ptr,  # [5] int64
    FP8: tl.constexpr, MAX_BITS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Count what a copy of a tile lost. x and the scales are read again: keeping both copies' numbers alive spills."""
    amax_bits, counts = tl.zeros([32], tl.int32), tl.zeros([32], tl.int32)
    for i in range(4):
        rows, cols, inside = _quarter(i, m, k, M, K)
        if COLUMNS:
            scale_inv = tl.load(scale_inv_ptr + cols, mask=cols < (K - k).to(tl.int32), other=1.0)[None, :]
        else:
            scale_inv = tl.load(scale_inv_ptr + rows, mask=rows < (M - m).to(tl.int32), other=1.0)[:, None]
        x = _load(x_ptr, stride_xm, i, m, k, M, K)
        amax_of_rows, counts_of_rows = _losses(x, tl.div_rn(1.0, scale_inv), inside, FP8, MAX_BITS)
        amax_bits, counts = tl.maximum(amax_bits, amax_of_rows), counts + counts_of_rows
    _add_statistics(stats_ptr, amax_bits, counts, m, k, M, K)


@triton.jit
def _quantize_kernel(
    x_ptr,  # [M, K] bf16 or fp32
    row_ptr, row_scale_ptr,  # [M, K] fp8, [M, ceil(K/128)] fp32
    col_ptr, col_scale_ptr,  # [K, M] fp8, [K, ceil(M/128)] fp32
    stats_ptr,  # [copies, 5] int64
    M, K, stride_xm, stride_row, stride_row_scale, stride_col, stride_col_scale,
    MAX_BITS: tl.constexpr, ROW_POW2: tl.constexpr, COL_POW2: tl.constexpr,
    ROW: tl.constexpr, COL: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    tiles = (K - 1) // 128 + 1  # K + 127 could overflow
    m, k = (tl.program_id(0) // tiles).to(tl.int64) * 128, (tl.program_id(0) % tiles).to(tl.int64) * 128
    x = (
        _load(x_ptr, stride_xm, 0, m, k, M, K),
        _load(x_ptr, stride_xm, 1, m, k, M, K),
        _load(x_ptr, stride_xm, 2, m, k, M, K),
        _load(x_ptr, stride_xm, 3, m, k, M, K),
    )
    _store_tile(
        x, m, k, M, K, row_ptr, row_scale_ptr, col_ptr, col_scale_ptr,
        stride_row, stride_row_scale, stride_col, stride_col_scale, MAX_BITS, ROW_POW2, COL_POW2, ROW, COL,
    )  # fmt: skip
    if STATS:
        tl.debug_barrier()  # the scales are written
    if STATS and ROW:
        row_scale_ptr += k // 128 * stride_row_scale + m
        _count(x_ptr, stride_xm, m, k, M, K, row_scale_ptr, stats_ptr, row_ptr.dtype.element_ty, MAX_BITS, False)
        stats_ptr += 5
    if STATS and COL:
        col_scale_ptr += m // 128 * stride_col_scale + k
        _count(x_ptr, stride_xm, m, k, M, K, col_scale_ptr, stats_ptr, col_ptr.dtype.element_ty, MAX_BITS, True)


def _compile_cases() -> list[tuple]:
    """What tests compile: every copy, kind of scale and dtype of x; the dual copy also in E5M2, ragged and counting."""
    sizes = ("M", "K", "stride_xm", "stride_row", "stride_row_scale", "stride_col", "stride_col_scale")
    copies = {"rows": (True, False), "columns": (False, True), "dual": (True, True)}
    cases = []
    for name, (row, col) in copies.items():
        for dtype in ("bf16", "fp32"):
            for pow2 in (True, False):
                signature = {"x_ptr": f"*{dtype}"} | dict.fromkeys(sizes, "i32")
                constants = {"MAX_BITS": 0x43E00000, "ROW_POW2": pow2, "COL_POW2": pow2}
                constants |= {"ROW": row, "COL": col, "STATS": False, "stats_ptr": None}
                for copy, wanted in (("row", row), ("col", col)):
                    (signature if wanted else constants)[f"{copy}_ptr"] = "*fp8e4nv" if wanted else None
                    (signature if wanted else constants)[f"{copy}_scale_ptr"] = "*fp32" if wanted else None
                title = f"quantize {name} {dtype} {'pow2' if pow2 else 'fp32'}"
                cases.append((title, _quantize_kernel, signature, constants, {"num_warps": NUM_WARPS}))
    _, kernel, signature, constants, options = cases[8]
    e5m2 = signature | {"row_ptr": "*fp8e5", "col_ptr": "*fp8e5"}
    counting = {key: value for key, value in constants.items() if key != "stats_ptr"} | {"STATS": True}
    cases.append(("quantize dual bf16 pow2 e5m2", kernel, e5m2, constants | {"MAX_BITS": 0x47600000}, options))
    cases.append(("quantize dual bf16 pow2 ragged", kernel, signature, constants, options | {"odd": sizes[:3]}))
    cases.append(("quantize dual bf16 pow2 stats", kernel, signature | {"stats_ptr": "*i64"}, counting, options))
    return cases


# (name, kernel, signature, constexprs, options); pointers and integers are multiples of 16 but those in options["odd"]
COMPILE_CASES = _compile_cases()


def quantize_rows(
    x: Tensor, *, fp8_dtype: torch.dtype, fp8_max: float, pow2: bool, block: int = BLOCK, stats: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes of x with one scale per 1x128 block.

    Args:
        x: [M, K] bf16 or fp32, row-major with any leading stride, on a GPU; any M, K >= 0.
        fp8_dtype: torch.float8_e4m3fn or torch.float8_e5m2.
        fp8_max: largest finite number of that format.
        pow2: round the scales up to powers of two.
        block: 128.
        stats: [5] int64 (see STATISTICS): amax is maximised into it, counts are added; None counts nothing, at no cost.

    Returns:
        (qdata, scale_inv): [M, K] row-major, leading stride padded to 16; [M, ceil(K/128)] fp32 with M contiguous.

    Raises:
        ValueError: x, the format, the block or stats do not fit.
    """
    _check("quantize_rows", x, fp8_dtype, block, stats, (len(STATISTICS),))
    M, K = x.shape
    row, row_scale = _empty_codes(x, M, K, fp8_dtype, 16), _empty_scales(x, M, K)
    _launch(x, row, row_scale, None, None, stats, _max_bits(fp8_max), pow2, pow2)
    return row, row_scale


def quantize_columns(
    x: Tensor, *, fp8_dtype: torch.dtype, fp8_max: float, pow2: bool, block: int = BLOCK, stats: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes of x.T with one scale per block of 128 rows and one column of x; arguments as quantize_rows.

    Returns:
        (qdata, scale_inv): [K, M] row-major, leading stride padded to 128; [K, ceil(M/128)] fp32 with K contiguous.

    Raises:
        ValueError: x, the format, the block or stats do not fit.
    """
    _check("quantize_columns", x, fp8_dtype, block, stats, (len(STATISTICS),))
    M, K = x.shape
    col, col_scale = _empty_codes(x, K, M, fp8_dtype, BLOCK), _empty_scales(x, K, M)
    _launch(x, None, None, col, col_scale, stats, _max_bits(fp8_max), pow2, pow2)
    return col, col_scale


def quantize_dual(
    x: Tensor,
    *,
    fp8_dtype: torch.dtype,
    fp8_max: float,
    pow2: bool,
    col_pow2: bool | None = None,
    block: int = BLOCK,
    stats: Tensor | None = None,
    two_launches: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """quantize_rows and quantize_columns of x from one read; arguments as there.

    Args:
        col_pow2: kind of scale of the column copy; None is that of the row copy.
        stats: [2, 5] int64: row copy, column copy.
        two_launches: write each copy by a kernel of its own, two reads: for a toolchain that miscompiles the pair.

    Returns:
        (qdata, scale_inv, qdata of x.T, scale_inv of x.T).

    Raises:
        ValueError: x, the format, the block or stats do not fit.
    """
    _check("quantize_dual", x, fp8_dtype, block, stats, (2, len(STATISTICS)))
    M, K = x.shape
    row, row_scale = _empty_codes(x, M, K, fp8_dtype, 16), _empty_scales(x, M, K)
    col, col_scale = _empty_codes(x, K, M, fp8_dtype, BLOCK), _empty_scales(x, K, M)
    kinds = _max_bits(fp8_max), pow2, pow2 if col_pow2 is None else col_pow2
    if two_launches:
        row_stats, col_stats = (None, None) if stats is None else stats
        _launch(x, row, row_scale, None, None, row_stats, *kinds)
        _launch(x, None, None, col, col_scale, col_stats, *kinds)
    else:
        _launch(x, row, row_scale, col, col_scale, stats, *kinds)
    return row, row_scale, col, col_scale


def _launch(
    x: Tensor, row: Tensor | None, row_scale: Tensor | None, col: Tensor | None, col_scale: Tensor | None,
    stats: Tensor | None, max_bits: int, pow2: bool, col_pow2: bool,
) -> None:  # fmt: skip
    M, K = x.shape
    if M == 0 or K == 0:
        return
    strides = [0 if tensor is None else tensor.stride(axis) for tensor, axis in
               ((row, 0), (row_scale, 1), (col, 0), (col_scale, 1))]  # fmt: skip
    _quantize_kernel[(triton.cdiv(M, BLOCK) * triton.cdiv(K, BLOCK),)](
        x, row, row_scale, col, col_scale, stats, M, K, x.stride(0), *strides,
        MAX_BITS=max_bits, ROW_POW2=pow2, COL_POW2=col_pow2,
        ROW=row is not None, COL=col is not None, STATS=stats is not None, num_warps=NUM_WARPS,
    )  # fmt: skip


def _empty_codes(x: Tensor, rows: int, cols: int, dtype: torch.dtype, multiple: int) -> Tensor:
    """[rows, cols] with a leading stride that is a multiple of `multiple`: TMA wants 16 bytes, whole tiles 128."""
    padded = -(-cols // multiple) * multiple
    return torch.empty(rows, padded, dtype=dtype, device=x.device)[:, :cols]


def _empty_scales(x: Tensor, rows: int, cols: int) -> Tensor:
    """[rows, ceil(cols/128)] fp32, rows contiguous; a GEMM tile of up to 256 rows may read beyond the last one."""
    padded = -(-(rows + 255) // 16) * 16
    return torch.empty(-(-cols // BLOCK), padded, dtype=torch.float32, device=x.device).t()[:rows]


def _max_bits(fp8_max: float) -> int:
    """Bit pattern of fp8_max as an fp32 number."""
    fraction, exponent = math.frexp(fp8_max)
    return (exponent + 126 << 23) | int((2 * fraction - 1) * 2**23)


def _check(
    name: str, x: Tensor, fp8_dtype: torch.dtype, block: int, stats: Tensor | None, wanted: tuple[int, ...]
) -> None:
    """Raise ValueError unless x is a row-major matrix and format, block and stats are ones that the kernel serves."""
    if x.dim() != 2 or x.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(
            f"{name}: x is {list(x.shape)} {x.dtype}; needs [M, K] in torch.bfloat16 or torch.float32. "
            "Reshape or cast it."
        )
    if x.shape[1] > 1 and x.shape[0] > 0 and x.stride(1) != 1:
        raise ValueError(f"{name}: x has strides {x.stride()}; needs (any, 1). Pass x.contiguous().")
    if max(x.shape) >= SIZE_LIMIT:
        raise ValueError(f"{name}: x is {list(x.shape)}; needs dimensions below 2^31. Split it.")
    if fp8_dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        raise ValueError(f"{name}: fp8_dtype is {fp8_dtype}; needs torch.float8_e4m3fn or torch.float8_e5m2.")
    if block != BLOCK:
        raise ValueError(f"{name}: block is {block}; needs {BLOCK}. Other blocks run on backend=reference.")
    if stats is not None and (stats.shape != wanted or stats.dtype is not torch.int64 or not stats.is_contiguous()):
        raise ValueError(
            f"{name}: stats is {list(stats.shape)} {stats.dtype}; needs {list(wanted)} torch.int64, contiguous."
        )
