"""The product of RMSNorm and its quantisation: y = x * rstd * weight, as a row copy and a transposed column copy.

x [M, K] bf16/fp32, row-major, any leading stride; weight [K] fp32; rstd [M] fp32, from rmsnorm_rstd -> the four outputs
of quantize.quantize_dual for y, bit for bit, without y ever being written. y = (x * rstd) * weight in FP32, rounded to
out_dtype: given rstd, the very products of torch's rms_norm; `rmsnorm` is the same without the quantiser, and the
definition of y. rstd comes from a kernel before this one, since column blocks need 128 whole rows, which fit no SM.
How a tile is scaled and stored is in tile.py, or in tile_words.py where that serves.
Source: DeepSeek-V3 (arXiv:2412.19437) 3.3; RMSNorm: arXiv:1910.07467. Measured: kernels/README.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8train.kernels.launch import Rest, launch
from fp8train.kernels.tile import load_strip, store_plain, store_tile, strip
from fp8train.kernels.tile_launch import (
    MAX_BITS,
    are_whole,
    as_words,
    check_matrix,
    check_vector,
    empty_copies,
    leading_strides,
    max_bits,
    tiles,
    word_tiling,
)
from fp8train.kernels.tile_words import load_halves, paired, store_word_tile

KEEP = True  # normalise once
AHEAD = tl.constexpr(2)  # strips of x that are loaded while others are worked on, where WORDS
MAX_REGISTERS = 128  # of BF16, pow2 scales, whole tiles, where not WORDS: two programs of 8 warps on an SM


@triton.jit
def _normalize(
    x_ptr, rstd_ptr, weight_ptr, stride_xm, BF16: tl.constexpr, i, m, k, M, K, STRIPS: tl.constexpr
):  # fmt: skip
    """x * rstd * weight of strip i, rounded to BF16 if BF16, fp32."""
    rows, cols, _ = strip(i, m, k, M, K, STRIPS)
    x = load_strip(x_ptr, stride_xm, i, m, k, M, K, STRIPS)
    rstd = tl.load(rstd_ptr + m + rows, mask=rows < (M - m).to(tl.int32), other=0.0)
    weight = tl.load(weight_ptr + k + cols, mask=cols < (K - k).to(tl.int32), other=0.0)
    y = x * rstd[:, None] * weight[None, :]
    return y.to(tl.bfloat16).to(tl.float32) if BF16 else y


@triton.jit
def _load_words(x_ptr, rstd_ptr, even_weight, odd_weight, stride_xm, i, m, k, STRIPS: tl.constexpr):
    even, odd = load_halves(x_ptr, stride_xm, i, m, k, STRIPS)
    rstd = tl.load(rstd_ptr + m + STRIPS * tl.arange(0, 128 // STRIPS) + i)
    return even, odd, rstd[:, None], even_weight[None, :], odd_weight[None, :]


@triton.jit
def _normalized_words(even, odd, rstd, even_weight, odd_weight):
    """Words of what _normalize gives."""
    return paired(even * rstd * even_weight, odd * rstd * odd_weight)


@triton.jit
def _rmsnorm_quantize_kernel(
    x_ptr,  # [M, K] bf16 or fp32
    rstd_ptr, weight_ptr,  # [M] fp32, [K] fp32
    out_ptr,  # [M, K], y itself, if not QUANTIZE
    row_ptr, row_scale_ptr,  # [M, K] fp8, [M, ceil(K/128)] fp32
    col_ptr, col_scale_ptr,  # [K, M] fp8, [K, ceil(M/128)] fp32
    M, K, stride_xm, stride_om, stride_row, stride_row_scale, stride_col, stride_col_scale, zero,
    BF16: tl.constexpr, MAX_BITS: tl.constexpr, ROW_POW2: tl.constexpr, COL_POW2: tl.constexpr,
    COL: tl.constexpr, QUANTIZE: tl.constexpr, STRIPS: tl.constexpr, KEEP: tl.constexpr,
    WHOLE: tl.constexpr,  # are_whole: every tile lies inside
    WORDS: tl.constexpr,  # as_words
):  # fmt: skip
    tiles = (K - 1) // 128 + 1  # K + 127 could overflow
    m, k = (tl.program_id(0) // tiles).to(tl.int64) * 128, (tl.program_id(0) % tiles).to(tl.int64) * 128
    if WHOLE:  # of which the compiler knows that nothing is outside
        M, K = m + 128, k + 128
    inputs = x_ptr, rstd_ptr, weight_ptr, stride_xm, BF16
    if WORDS:
        pairs = 2 * tl.arange(0, 64)[:, None] + tl.arange(0, 2)[None, :]
        even_weight, odd_weight = tl.split(tl.load(weight_ptr + k + pairs))
        store_word_tile(
            _load_words, (x_ptr, rstd_ptr, even_weight, odd_weight, stride_xm), _normalized_words, m, k, M, K,
            row_ptr, row_scale_ptr, col_ptr, col_scale_ptr,
            stride_row, stride_row_scale, stride_col, stride_col_scale, MAX_BITS, STRIPS, AHEAD,
        )  # fmt: skip
    elif QUANTIZE:
        store_tile(
            _normalize, inputs, inputs, zero, m, k, M, K, row_ptr, row_scale_ptr, col_ptr, col_scale_ptr, stride_row,
            stride_row_scale, stride_col, stride_col_scale, MAX_BITS, ROW_POW2, COL_POW2, True, COL, STRIPS, KEEP,
        )  # fmt: skip
    else:
        store_plain(_normalize, inputs, out_ptr, stride_om, m, k, M, K)


def _compile_cases() -> list[tuple]:
    """What tests compile: both dtypes of x and kinds of scale, the row copy alone, and y itself."""
    pointers = {"row_ptr": "*fp8e4nv", "row_scale_ptr": "*fp32", "col_ptr": "*fp8e4nv", "col_scale_ptr": "*fp32"}
    kernel = _rmsnorm_quantize_kernel
    sizes = [name for name in kernel.arg_names if name.startswith("stride_")] + ["zero"]
    vectors = dict.fromkeys(("rstd_ptr", "weight_ptr"), "*fp32") | dict.fromkeys(("M", "K", *sizes), "i32")
    common = {"MAX_BITS": MAX_BITS[torch.float8_e4m3fn], "BF16": True, "out_ptr": None, "QUANTIZE": True}
    cases = []
    for dtype in ("bf16", "fp32"):
        for pow2 in (True, False):
            constants = common | {"ROW_POW2": pow2, "COL_POW2": pow2, "COL": True}
            title = f"rmsnorm_quantize {dtype} {'pow2' if pow2 else 'fp32'}"
            more, options = word_tiling(True, True, KEEP, True, pow2, True, MAX_REGISTERS)
            cases.append((title, kernel, {"x_ptr": f"*{dtype}"} | vectors | pointers, constants | more, options))
    title, _, signature, constants, _ = cases[0]
    for case in (cases[0], cases[2]):
        more, options = word_tiling(True, True, KEEP, True, True, False, MAX_REGISTERS)
        cases.append((f"{case[0]} plain", kernel, case[2], constants | more, options))
    more, options = word_tiling(True, False, KEEP, True, True, True, MAX_REGISTERS)
    constants = constants | more
    cases.append((f"{title} row copy", kernel, signature, constants | {"COL": False}, options))
    plain = {name: kind for name, kind in signature.items() if name not in pointers} | {"out_ptr": "*bf16"}
    nothing = {name: value for name, value in constants.items() if name != "out_ptr"} | dict.fromkeys(pointers)
    cases.append(("rmsnorm bf16", kernel, plain, nothing | {"QUANTIZE": False}, options))
    return cases


# (name, kernel, signature, constexprs, options); pointers and integers are multiples of 16 but those in options["odd"]
COMPILE_CASES = _compile_cases()


def rmsnorm_quantize(
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    *,
    fp8_dtype: torch.dtype,
    pow2: bool,
    out_dtype: torch.dtype = torch.bfloat16,
    col_pow2: bool | None = None,
    columns: bool = True,
    words: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Row copy and column copy of the normalised x: quantize.quantize_dual(rmsnorm(x)), bit for bit.

    Args:
        x: [M, K] bf16 or fp32, row-major with any leading stride, on a GPU; any M, K >= 0.
        weight: [K] fp32.
        rstd: [M] fp32, of rmsnorm_rstd.
        fp8_dtype: torch.float8_e4m3fn or torch.float8_e5m2.
        pow2: round the scales up to powers of two.
        out_dtype: torch.bfloat16 or torch.float32: what y would be rounded to if it were written.
        col_pow2: kind of scale of the column copy; None is that of the row copy.
        columns: write the column copy; without it both of its outputs are None.
        words: take two numbers at a time where that serves (as_words), to the same codes.

    Returns:
        (qdata, scale_inv, qdata of y.T, scale_inv of y.T), laid out as by quantize_dual.

    Raises:
        ValueError: x, weight, rstd or a dtype do not fit.
    """
    _check("rmsnorm_quantize", x, weight, rstd, out_dtype)
    kinds = max_bits("rmsnorm_quantize", fp8_dtype), pow2, pow2 if col_pow2 is None else col_pow2
    copies = empty_copies(x, fp8_dtype, columns)
    _launch(x, rstd, weight, out_dtype, None, *copies, kinds, words)
    return copies


def rmsnorm(x: Tensor, weight: Tensor, rstd: Tensor, *, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """y [M, K] in out_dtype, the numbers that rmsnorm_quantize quantises.

    Raises:
        ValueError: x, weight, rstd or out_dtype do not fit.
    """
    _check("rmsnorm", x, weight, rstd, out_dtype)
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    _launch(x, rstd, weight, out_dtype, y, None, None, None, None, (0, True, True))
    return y


def _launch(
    x: Tensor, rstd: Tensor, weight: Tensor, out_dtype: torch.dtype, out: Tensor | None,
    row: Tensor | None, row_scale: Tensor | None, col: Tensor | None, col_scale: Tensor | None,
    kinds: tuple[int, bool, bool], words: bool = False,
) -> None:  # fmt: skip
    if x.numel() == 0:
        return

    def rest() -> Rest:
        (M, K), bf16 = x.shape, out_dtype is torch.bfloat16
        whole = are_whole(M, K, x.stride(0))
        fits = as_words(bf16, col is not None, whole, kinds[1] and kinds[2], x)
        tile, options = word_tiling(bf16, col is not None, KEEP, whole, fits, words, MAX_REGISTERS)
        constants = {"BF16": bf16, "MAX_BITS": kinds[0], "ROW_POW2": kinds[1], "COL_POW2": kinds[2]}
        constants |= {"COL": col is not None, "QUANTIZE": row is not None}
        strides = 0 if out is None else out.stride(0), *leading_strides(row, row_scale, col, col_scale)
        return tiles(M, K), (M, K, x.stride(0), *strides, 0), constants | tile, options

    tensors = x, rstd, weight, out, row, row_scale, col, col_scale
    launch(_rmsnorm_quantize_kernel, (out_dtype, kinds, words), tensors, rest)


def _check(name: str, x: Tensor, weight: Tensor, rstd: Tensor, out_dtype: torch.dtype) -> None:
    """Raise ValueError unless x is row-major, weight and rstd fit it, and out_dtype is one that the kernel serves."""
    check_matrix(name, "x", x)
    check_vector(name, "weight", weight, x.shape[1], "Pass the norm's own, .float().contiguous()")
    check_vector(name, "rstd", rstd, x.shape[0], "Pass what rmsnorm_rstd gave")
    if out_dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"{name}: out_dtype is {out_dtype}; needs torch.bfloat16 or torch.float32. Cast the result.")
