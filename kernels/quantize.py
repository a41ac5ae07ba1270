"""Quantize a matrix in blocks of 128: a row copy (1x128), a transposed column copy (128x1), or both from one read.

scale_inv = amax / fp8_max, rounded up to 2^k for pow2, at least 2^-126, 1 for an all-zero block, NaN for a block with a
NaN or an Inf; qdata = saturate(x * (1 / scale_inv)), bit for bit as fp8train.quant.reference.quantize.

x [M, K] bf16/fp32, row-major, any leading stride.
Row copy: qdata [M, K], scale_inv [M, ceil(K/128)], M contiguous. Column copy: qdata [K, M], scale_inv [K, ceil(M/128)],
K contiguous. One program: a tile of 128x128; how it is scaled and stored is in tile.py, or in tile_words.py where that
serves.
Source: DeepSeek-V3 (arXiv:2412.19437) 3.3. Measured: kernels/README.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8train.kernels.launch import Rest, launch
from fp8train.kernels.tile import (
    add_statistics,
    hinted_strip,
    load_strip,
    losses,
    store_tile,
    strip,
)
from fp8train.kernels.tile_launch import (
    BLOCK,
    MAX_BITS,
    NUM_WARPS,
    are_whole,
    as_words,
    check_matrix,
    check_statistics,
    empty_codes,
    empty_copies,
    empty_scales,
    leading_strides,
    max_bits,
    tiles,
    word_tiling,
)
from fp8train.kernels.tile_words import load_words, store_word_tile

# Where not WORDS:
MAX_REGISTERS = 82  # of BF16, pow2 scales, whole tiles, no counts: three programs of 8 warps on an SM (Triton 3.6)
KEEP = False  # read x twice, the second time from L1

# Of a finite block none is saturated: its pow2 scale takes its amax to the maximum at most, its fp32 scale by three
# roundings of 2^-24 to at most 3 last places beyond, which FP8 does not see. Another count than 0: the scale is wrong.
STATISTICS = ("amax_bits", "flushed", "saturated", "nonfinite", "elements")


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
        rows, cols, inside = strip(i, m, k, M, K, 4)
        if COLUMNS:
            scale_inv = tl.load(scale_inv_ptr + cols, mask=cols < (K - k).to(tl.int32), other=1.0)[None, :]
        else:
            scale_inv = tl.load(scale_inv_ptr + rows, mask=rows < (M - m).to(tl.int32), other=1.0)[:, None]
        x = load_strip(x_ptr, stride_xm, i, m, k, M, K, 4)
        amax_of_rows, counts_of_rows = losses(x, tl.div_rn(1.0, scale_inv), inside, FP8, MAX_BITS)
        amax_bits, counts = tl.maximum(amax_bits, amax_of_rows), counts + counts_of_rows
    add_statistics(stats_ptr, amax_bits, counts, m, k, M, K)


@triton.jit
def _strip(x_ptr, stride_xm, TWICE: tl.constexpr, AGAIN: tl.constexpr, i, m, k, M, K, STRIPS: tl.constexpr):
    """A strip of x. What is read twice is to stay in L1 until it is (measured in near versions: kernels/README.md)."""
    EVICT: tl.constexpr = ("evict_first" if AGAIN else "evict_last") if TWICE else ""
    return hinted_strip(x_ptr, stride_xm, i, m, k, M, K, STRIPS, EVICT)


@triton.jit
def _load_words(x_ptr, stride_xm, i, m, k, STRIPS: tl.constexpr):
    return (load_words(x_ptr, stride_xm, i, m, k, STRIPS),)


@triton.jit
def _as_they_are(words):
    return words


@triton.jit
def _quantize_kernel(
    x_ptr,  # [M, K] bf16 or fp32
    row_ptr, row_scale_ptr,  # [M, K] fp8, [M, ceil(K/128)] fp32
    col_ptr, col_scale_ptr,  # [K, M] fp8, [K, ceil(M/128)] fp32
    stats_ptr,  # [copies, 5] int64
    M, K, stride_xm, stride_row, stride_row_scale, stride_col, stride_col_scale, zero,
    MAX_BITS: tl.constexpr, ROW_POW2: tl.constexpr, COL_POW2: tl.constexpr,
    ROW: tl.constexpr, COL: tl.constexpr, STATS: tl.constexpr, STRIPS: tl.constexpr, KEEP: tl.constexpr,
    WHOLE: tl.constexpr,  # are_whole: every tile lies inside
    WORDS: tl.constexpr,  # as_words: the tile is read once and kept
):  # fmt: skip
    tiles = (K - 1) // 128 + 1  # K + 127 could overflow
    m, k = (tl.program_id(0) // tiles).to(tl.int64) * 128, (tl.program_id(0) % tiles).to(tl.int64) * 128
    if WHOLE:  # of which the compiler knows that nothing is outside
        M, K = m + 128, k + 128
    if WORDS:
        store_word_tile(
            _load_words, (x_ptr, stride_xm), _as_they_are, m, k, M, K, row_ptr, row_scale_ptr, col_ptr, col_scale_ptr,
            stride_row, stride_row_scale, stride_col, stride_col_scale, MAX_BITS, STRIPS, STRIPS,
        )  # fmt: skip
    else:
        store_tile(
            _strip, (x_ptr, stride_xm, COL, False), (x_ptr, stride_xm, COL, True), zero, m, k, M, K,
            row_ptr, row_scale_ptr, col_ptr, col_scale_ptr,
            stride_row, stride_row_scale, stride_col, stride_col_scale,
            MAX_BITS, ROW_POW2, COL_POW2, ROW, COL, STRIPS, KEEP,
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
    sizes = ("M", "K", "stride_xm", "stride_row", "stride_row_scale", "stride_col", "stride_col_scale", "zero")
    copies = {"rows": (True, False), "columns": (False, True), "dual": (True, True)}
    cases = []
    for name, (row, col) in copies.items():
        for dtype in ("bf16", "fp32"):
            for pow2 in (True, False):
                signature = {"x_ptr": f"*{dtype}"} | dict.fromkeys(sizes, "i32")
                constants = {"MAX_BITS": MAX_BITS[torch.float8_e4m3fn], "ROW_POW2": pow2, "COL_POW2": pow2}
                constants |= {"ROW": row, "COL": col, "STATS": False, "stats_ptr": None}
                for copy, wanted in (("row", row), ("col", col)):
                    (signature if wanted else constants)[f"{copy}_ptr"] = "*fp8e4nv" if wanted else None
                    (signature if wanted else constants)[f"{copy}_scale_ptr"] = "*fp32" if wanted else None
                title = f"quantize {name} {dtype} {'pow2' if pow2 else 'fp32'}"
                more, options = word_tiling(
                    dtype == "bf16", col, KEEP, True, dtype == "bf16" and pow2, row, MAX_REGISTERS
                )
                cases.append((title, _quantize_kernel, signature, constants | more, options))
    title, kernel, signature, constants, options = cases[8]
    plain, limited = word_tiling(True, True, KEEP, True, True, False, MAX_REGISTERS)
    cases.append((f"{title} plain", kernel, signature, constants | plain, limited))
    free = {"num_warps": NUM_WARPS}
    e5m2 = signature | {"row_ptr": "*fp8e5", "col_ptr": "*fp8e5"}
    counting = {key: value for key, value in constants.items() if key != "stats_ptr"} | {"STATS": True}
    cases.append(
        ("quantize dual bf16 pow2 e5m2", kernel, e5m2, constants | {"MAX_BITS": MAX_BITS[torch.float8_e5m2]}, options)
    )
    ragged, counting = constants | plain | {"WHOLE": False}, counting | plain | {"WHOLE": False}
    cases.append(("quantize dual bf16 pow2 ragged", kernel, signature, ragged, free | {"odd": sizes[:3]}))
    cases.append(("quantize dual bf16 pow2 stats", kernel, signature | {"stats_ptr": "*i64"}, counting, free))
    return cases


# (name, kernel, signature, constexprs, options); pointers and integers are multiples of 16 but those in options["odd"]
COMPILE_CASES = _compile_cases()


def quantize_rows(
    x: Tensor, *, fp8_dtype: torch.dtype, pow2: bool, stats: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes of x with one scale per 1x128 block.

    Args:
        x: [M, K] bf16 or fp32, row-major with any leading stride, on a GPU; any M, K >= 0.
        fp8_dtype: torch.float8_e4m3fn or torch.float8_e5m2.
        pow2: round the scales up to powers of two.
        stats: [5] int64 (see STATISTICS): amax is maximised into it, counts are added; None counts nothing, at no cost.

    Returns:
        (qdata, scale_inv): [M, K] row-major, leading stride padded to 16; [M, ceil(K/128)] fp32 with M contiguous.

    Raises:
        ValueError: x, the format or stats do not fit.
    """
    largest = _checked("quantize_rows", x, fp8_dtype, stats, (len(STATISTICS),))
    M, K = x.shape
    row, row_scale = empty_codes(x, M, K, fp8_dtype, 16), empty_scales(x, M, K)
    _launch(x, row, row_scale, None, None, stats, largest, pow2, pow2)
    return row, row_scale


def quantize_columns(
    x: Tensor, *, fp8_dtype: torch.dtype, pow2: bool, stats: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes of x.T with one scale per block of 128 rows and one column of x; arguments as quantize_rows.

    Returns:
        (qdata, scale_inv): [K, M] row-major, leading stride padded to 128; [K, ceil(M/128)] fp32 with K contiguous.

    Raises:
        ValueError: x, the format or stats do not fit.
    """
    largest = _checked("quantize_columns", x, fp8_dtype, stats, (len(STATISTICS),))
    M, K = x.shape
    col, col_scale = empty_codes(x, K, M, fp8_dtype, BLOCK), empty_scales(x, K, M)
    _launch(x, None, None, col, col_scale, stats, largest, pow2, pow2)
    return col, col_scale


def quantize_dual(
    x: Tensor,
    *,
    fp8_dtype: torch.dtype,
    pow2: bool,
    col_pow2: bool | None = None,
    words: bool = True,
    stats: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """quantize_rows and quantize_columns of x from one read; arguments as there.

    Args:
        col_pow2: kind of scale of the column copy; None is that of the row copy.
        words: take two numbers at a time where that serves (as_words), to the same codes.
        stats: [2, 5] int64: row copy, column copy.

    Returns:
        (qdata, scale_inv, qdata of x.T, scale_inv of x.T).

    Raises:
        ValueError: x, the format or stats do not fit.
    """
    largest = _checked("quantize_dual", x, fp8_dtype, stats, (2, len(STATISTICS)))
    row, row_scale, col, col_scale = empty_copies(x, fp8_dtype, columns=True)
    _launch(x, row, row_scale, col, col_scale, stats, largest, pow2, pow2 if col_pow2 is None else col_pow2, words)
    return row, row_scale, col, col_scale


def _launch(
    x: Tensor, row: Tensor | None, row_scale: Tensor | None, col: Tensor | None, col_scale: Tensor | None,
    stats: Tensor | None, largest: int, pow2: bool, col_pow2: bool, words: bool = False,
) -> None:  # fmt: skip
    if x.numel() == 0:
        return

    def rest() -> Rest:
        (M, K), bf16 = x.shape, x.dtype is torch.bfloat16
        whole = are_whole(M, K, x.stride(0)) and stats is None
        fits = as_words(bf16, True, whole, pow2 and col_pow2, x)
        tile, options = word_tiling(bf16, col is not None, KEEP, whole, fits, words and row is not None, MAX_REGISTERS)
        constants = {"MAX_BITS": largest, "ROW_POW2": pow2, "COL_POW2": col_pow2}
        constants |= {"ROW": row is not None, "COL": col is not None, "STATS": stats is not None}
        scalars = M, K, x.stride(0), *leading_strides(row, row_scale, col, col_scale), 0
        return tiles(M, K), scalars, constants | tile, options

    launch(_quantize_kernel, (largest, pow2, col_pow2, words), (x, row, row_scale, col, col_scale, stats), rest)


def _checked(name: str, x: Tensor, fp8_dtype: torch.dtype, stats: Tensor | None, wanted: tuple[int, ...]) -> int:
    """max_bits of a format; raises ValueError unless x is a row-major matrix and stats [*wanted]."""
    check_matrix(name, "x", x)
    check_statistics(name, stats, wanted)
    return max_bits(name, fp8_dtype)
