"""RMSNorm and its quantisation: y = x / sqrt(mean(x^2) + eps) * weight, as a row copy and a transposed column copy.

x [M, K] bf16/fp32, row-major, any leading stride; weight [K] fp32 -> the four outputs of quantize.quantize_dual for y,
bit for bit, without y ever being written, and rstd [M] fp32 = 1 / sqrt(mean(x^2) + eps), which backward needs beside x.
y = (x * rstd) * weight in FP32, rounded to out_dtype: given rstd, the very products of torch's rms_norm. rstd itself
differs by the order of a sum: `rmsnorm` is the same without the quantiser, and the definition of y and rstd.
Two kernels: rows to rstd, then one program per tile of 128x128, which reads x again: column blocks need 128 whole rows,
which fit no SM.
What quantize.py has too is the same there, held by tests: kernel files import no other.
Source: DeepSeek-V3 (arXiv:2412.19437) 3.3; RMSNorm: arXiv:1910.07467. Measured: not on hardware yet.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128
NUM_WARPS = 8
SIZE_LIMIT = 2**31
RSTD_ROWS, RSTD_COLS = 4, 1024  # tile of the first kernel: 32 numbers a thread with 4 warps
RSTD_WARPS = 4

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
def _rstd_kernel(
    x_ptr,  # [M, K] bf16 or fp32
    rstd_ptr,  # [M] fp32
    M, K, stride_xm, eps,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    squares = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, K, COLS):
        inside = (rows < M)[:, None] & (cols < K - start)[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride_xm + start + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        squares = tl.fma(x, x, squares)
    mean = tl.div_rn(tl.sum(squares, axis=1), K.to(tl.float32))
    tl.store(rstd_ptr + rows, tl.div_rn(1.0, tl.sqrt_rn(mean + eps)), mask=rows < M)


@triton.jit
def _normalize(x_ptr, rstd_ptr, weight_ptr, stride_xm, i, m, k, M, K, DTYPE: tl.constexpr):
    """x * rstd * weight of quarter i, rounded to DTYPE, fp32."""
    rows, cols, _ = _quarter(i, m, k, M, K)
    x = _load(x_ptr, stride_xm, i, m, k, M, K)
    rstd = tl.load(rstd_ptr + m + rows, mask=rows < (M - m).to(tl.int32), other=0.0)
    weight = tl.load(weight_ptr + k + cols, mask=cols < (K - k).to(tl.int32), other=0.0)
    return (x * rstd[:, None] * weight[None, :]).to(DTYPE).to(tl.float32)


@triton.jit
def _store_quarters(x, m, k, M, K, out_ptr, stride_om):
    """Write the quarters of a tile, unquantised."""
    for i in tl.static_range(4):
        rows, cols, inside = _quarter(i, m, k, M, K)
        offsets = m * stride_om + k + rows.to(tl.int64)[:, None] * stride_om + cols[None, :]
        tl.store(out_ptr + offsets, x[i].to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rmsnorm_quantize_kernel(
    x_ptr,  # [M, K] bf16 or fp32
    rstd_ptr, weight_ptr,  # [M] fp32, [K] fp32
    out_ptr,  # [M, K], y itself, if not QUANTIZE
    row_ptr, row_scale_ptr,  # [M, K] fp8, [M, ceil(K/128)] fp32
    col_ptr, col_scale_ptr,  # [K, M] fp8, [K, ceil(M/128)] fp32
    M, K, stride_xm, stride_om, stride_row, stride_row_scale, stride_col, stride_col_scale,
    BF16: tl.constexpr, MAX_BITS: tl.constexpr, ROW_POW2: tl.constexpr, COL_POW2: tl.constexpr,
    COL: tl.constexpr, QUANTIZE: tl.constexpr,
):  # fmt: skip
    tiles = (K - 1) // 128 + 1  # K + 127 could overflow
    m, k = (tl.program_id(0) // tiles).to(tl.int64) * 128, (tl.program_id(0) % tiles).to(tl.int64) * 128
    DTYPE: tl.constexpr = tl.bfloat16 if BF16 else tl.float32
    y = (
        _normalize(x_ptr, rstd_ptr, weight_ptr, stride_xm, 0, m, k, M, K, DTYPE),
        _normalize(x_ptr, rstd_ptr, weight_ptr, stride_xm, 1, m, k, M, K, DTYPE),
        _normalize(x_ptr, rstd_ptr, weight_ptr, stride_xm, 2, m, k, M, K, DTYPE),
        _normalize(x_ptr, rstd_ptr, weight_ptr, stride_xm, 3, m, k, M, K, DTYPE),
    )
    if QUANTIZE:
        _store_tile(
            y, m, k, M, K, row_ptr, row_scale_ptr, col_ptr, col_scale_ptr,
            stride_row, stride_row_scale, stride_col, stride_col_scale, MAX_BITS, ROW_POW2, COL_POW2, True, COL,
        )  # fmt: skip
    else:
        _store_quarters(y, m, k, M, K, out_ptr, stride_om)


def _compile_cases() -> list[tuple]:
    """What tests compile: both dtypes of x and kinds of scale, the row copy alone, y itself, and rstd."""
    pointers = {"row_ptr": "*fp8e4nv", "row_scale_ptr": "*fp32", "col_ptr": "*fp8e4nv", "col_scale_ptr": "*fp32"}
    kernel, options = _rmsnorm_quantize_kernel, {"num_warps": NUM_WARPS}
    sizes = [name for name in kernel.arg_names if name.startswith("stride_")]
    vectors = dict.fromkeys(("rstd_ptr", "weight_ptr"), "*fp32") | dict.fromkeys(("M", "K", *sizes), "i32")
    common = {"MAX_BITS": 0x43E00000, "BF16": True, "out_ptr": None, "QUANTIZE": True}
    cases = []
    for dtype in ("bf16", "fp32"):
        for pow2 in (True, False):
            constants = common | {"ROW_POW2": pow2, "COL_POW2": pow2, "COL": True}
            title = f"rmsnorm_quantize {dtype} {'pow2' if pow2 else 'fp32'}"
            cases.append((title, kernel, {"x_ptr": f"*{dtype}"} | vectors | pointers, constants, options))
        rstd = {"x_ptr": f"*{dtype}", "rstd_ptr": "*fp32", "M": "i32", "K": "i32", "stride_xm": "i32", "eps": "fp32"}
        tile = {"ROWS": RSTD_ROWS, "COLS": RSTD_COLS}
        cases.append((f"rmsnorm rstd {dtype}", _rstd_kernel, rstd, tile, {"num_warps": RSTD_WARPS, "odd": ("eps",)}))
    title, _, signature, constants, _ = cases[0]
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
    *,
    eps: float,
    fp8_dtype: torch.dtype,
    fp8_max: float,
    pow2: bool,
    out_dtype: torch.dtype = torch.bfloat16,
    col_pow2: bool | None = None,
    columns: bool = True,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """Row copy and column copy of the normalised x: quantize.quantize_dual(rmsnorm(x)), bit for bit; and rstd.

    Args:
        x: [M, K] bf16 or fp32, row-major with any leading stride, on a GPU; any M, K >= 0.
        weight: [K] fp32.
        eps: added to the mean square.
        fp8_dtype: torch.float8_e4m3fn or torch.float8_e5m2.
        fp8_max: largest finite number of that format.
        pow2: round the scales up to powers of two.
        out_dtype: torch.bfloat16 or torch.float32: what y would be rounded to if it were written.
        col_pow2: kind of scale of the column copy; None is that of the row copy.
        columns: write the column copy; without it both of its outputs are None.
        block: 128.

    Returns:
        (qdata, scale_inv, qdata of y.T, scale_inv of y.T, rstd [M] fp32), laid out as by quantize_dual.

    Raises:
        ValueError: x, weight, a dtype or the block do not fit.
    """
    _check("rmsnorm_quantize", x, weight, out_dtype, fp8_dtype, block)
    M, K = x.shape
    row, row_scale = _empty_codes(x, M, K, fp8_dtype, 16), _empty_scales(x, M, K)
    col = _empty_codes(x, K, M, fp8_dtype, BLOCK) if columns else None
    col_scale = _empty_scales(x, K, M) if columns else None
    kinds = _max_bits(fp8_max), pow2, pow2 if col_pow2 is None else col_pow2
    rstd = _rstd(x, eps)
    _launch(x, rstd, weight, out_dtype, None, row, row_scale, col, col_scale, kinds)
    return row, row_scale, col, col_scale, rstd


def rmsnorm(x: Tensor, weight: Tensor, *, eps: float, out_dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """(y [M, K] in out_dtype, rstd [M] fp32), with the numbers that rmsnorm_quantize quantises.

    Raises:
        ValueError: x, weight or out_dtype do not fit.
    """
    _check("rmsnorm", x, weight, out_dtype, torch.float8_e4m3fn, BLOCK)
    y, rstd = torch.empty(x.shape, dtype=out_dtype, device=x.device), _rstd(x, eps)
    _launch(x, rstd, weight, out_dtype, y, None, None, None, None, (0, True, True))
    return y, rstd


def _rstd(x: Tensor, eps: float) -> Tensor:
    M, K = x.shape
    rstd = torch.empty(M, dtype=torch.float32, device=x.device)
    if M and K:
        _rstd_kernel[(triton.cdiv(M, RSTD_ROWS),)](
            x, rstd, M, K, x.stride(0), eps, ROWS=RSTD_ROWS, COLS=RSTD_COLS, num_warps=RSTD_WARPS
        )
    return rstd if K else rstd.fill_(float("nan"))  # the mean of no numbers


def _launch(
    x: Tensor, rstd: Tensor, weight: Tensor, out_dtype: torch.dtype, out: Tensor | None,
    row: Tensor | None, row_scale: Tensor | None, col: Tensor | None, col_scale: Tensor | None,
    kinds: tuple[int, bool, bool],
) -> None:  # fmt: skip
    M, K = x.shape
    if M == 0 or K == 0:
        return
    strides = [0 if tensor is None else tensor.stride(axis) for tensor, axis in
               ((out, 0), (row, 0), (row_scale, 1), (col, 0), (col_scale, 1))]  # fmt: skip
    _rmsnorm_quantize_kernel[(triton.cdiv(M, BLOCK) * triton.cdiv(K, BLOCK),)](
        x, rstd, weight, out, row, row_scale, col, col_scale, M, K, x.stride(0), *strides,
        BF16=out_dtype is torch.bfloat16, MAX_BITS=kinds[0], ROW_POW2=kinds[1], COL_POW2=kinds[2],
        COL=col is not None, QUANTIZE=row is not None, num_warps=NUM_WARPS,
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


def _check(name: str, x: Tensor, weight: Tensor, out_dtype: torch.dtype, fp8_dtype: torch.dtype, block: int) -> None:
    """Raise ValueError unless x is row-major, weight fits it, and dtypes and block are ones that the kernel serves."""
    high = (torch.bfloat16, torch.float32)
    if x.dim() != 2 or x.dtype not in high:
        raise ValueError(
            f"{name}: x is {list(x.shape)} {x.dtype}; needs [M, K] in torch.bfloat16 or torch.float32. "
            "Reshape or cast it."
        )
    if x.shape[1] > 1 and x.shape[0] > 0 and x.stride(1) != 1:
        raise ValueError(f"{name}: x has strides {x.stride()}; needs (any, 1). Pass x.contiguous().")
    if max(x.shape) >= SIZE_LIMIT:
        raise ValueError(f"{name}: x is {list(x.shape)}; needs dimensions below 2^31. Split it.")
    if weight.shape != x.shape[1:] or weight.dtype is not torch.float32 or not weight.is_contiguous():
        wanted = f"[{x.shape[1]}] torch.float32, contiguous"
        raise ValueError(f"{name}: weight is {list(weight.shape)} {weight.dtype}; needs {wanted}.")
    if out_dtype not in high:
        raise ValueError(f"{name}: out_dtype is {out_dtype}; needs torch.bfloat16 or torch.float32.")
    if fp8_dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        raise ValueError(f"{name}: fp8_dtype is {fp8_dtype}; needs torch.float8_e4m3fn or torch.float8_e5m2.")
    if block != BLOCK:
        raise ValueError(f"{name}: block is {block}; needs {BLOCK}. Use the unfused path for others.")
