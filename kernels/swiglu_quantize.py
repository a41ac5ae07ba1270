"""SwiGLU and its quantisation in one pass: h = silu(gate) * up, as a row copy and a transposed column copy.

gate, up [M, K] bf16/fp32, row-major, any leading strides (also the halves of one [M, 2K]) -> the four outputs of
quantize.quantize_dual for h, bit for bit, without h ever being written. silu(gate) and h are rounded to the dtype of
gate, as torch does in `F.silu(gate) * up`. exp and the division of silu are the device's fast ones (2 ulp of FP32), so
that now and then a BF16 h differs from torch's in its last place: `swiglu` is this kernel without the quantiser, and
the definition of h.
One program: a tile of 128x128. What quantize.py has too is the same there, held by tests: kernel files import no other.
Source: DeepSeek-V3 (arXiv:2412.19437) 3.3; SwiGLU: arXiv:2002.05202. Measured: not on hardware yet.
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
def _swiglu(gate_ptr, up_ptr, stride_gm, stride_um, i, m, k, M, K):
    """silu(gate) * up of quarter i, rounded twice as torch does, fp32."""
    gate = _load(gate_ptr, stride_gm, i, m, k, M, K)
    up = _load(up_ptr, stride_um, i, m, k, M, K)
    silu = (gate / (1.0 + tl.exp(-gate))).to(gate_ptr.dtype.element_ty).to(tl.float32)
    return (silu * up).to(gate_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _store_quarters(x, m, k, M, K, out_ptr, stride_om):
    """Write the quarters of a tile, unquantised."""
    for i in tl.static_range(4):
        rows, cols, inside = _quarter(i, m, k, M, K)
        offsets = m * stride_om + k + rows.to(tl.int64)[:, None] * stride_om + cols[None, :]
        tl.store(out_ptr + offsets, x[i].to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_quantize_kernel(
    gate_ptr, up_ptr,  # [M, K] bf16 or fp32
    out_ptr,  # [M, K], h itself, if not QUANTIZE
    row_ptr, row_scale_ptr,  # [M, K] fp8, [M, ceil(K/128)] fp32
    col_ptr, col_scale_ptr,  # [K, M] fp8, [K, ceil(M/128)] fp32
    M, K, stride_gm, stride_um, stride_om, stride_row, stride_row_scale, stride_col, stride_col_scale,
    MAX_BITS: tl.constexpr, ROW_POW2: tl.constexpr, COL_POW2: tl.constexpr, COL: tl.constexpr, QUANTIZE: tl.constexpr,
):  # fmt: skip
    tiles = (K - 1) // 128 + 1  # K + 127 could overflow
    m, k = (tl.program_id(0) // tiles).to(tl.int64) * 128, (tl.program_id(0) % tiles).to(tl.int64) * 128
    h = (
        _swiglu(gate_ptr, up_ptr, stride_gm, stride_um, 0, m, k, M, K),
        _swiglu(gate_ptr, up_ptr, stride_gm, stride_um, 1, m, k, M, K),
        _swiglu(gate_ptr, up_ptr, stride_gm, stride_um, 2, m, k, M, K),
        _swiglu(gate_ptr, up_ptr, stride_gm, stride_um, 3, m, k, M, K),
    )
    if QUANTIZE:
        _store_tile(
            h, m, k, M, K, row_ptr, row_scale_ptr, col_ptr, col_scale_ptr,
            stride_row, stride_row_scale, stride_col, stride_col_scale, MAX_BITS, ROW_POW2, COL_POW2, True, COL,
        )  # fmt: skip
    else:
        _store_quarters(h, m, k, M, K, out_ptr, stride_om)


def _compile_cases() -> list[tuple]:
    """What tests compile: both dtypes and kinds of scale, the row copy alone, and h itself."""
    pointers = {"row_ptr": "*fp8e4nv", "row_scale_ptr": "*fp32", "col_ptr": "*fp8e4nv", "col_scale_ptr": "*fp32"}
    sizes = [name for name in _swiglu_quantize_kernel.arg_names if name.islower() and not name.endswith("_ptr")]
    common = {"MAX_BITS": 0x43E00000, "out_ptr": None, "QUANTIZE": True}
    cases = []
    for dtype in ("bf16", "fp32"):
        inputs = dict.fromkeys(("gate_ptr", "up_ptr"), f"*{dtype}") | dict.fromkeys(("M", "K", *sizes), "i32")
        for pow2 in (True, False):
            constants = common | {"ROW_POW2": pow2, "COL_POW2": pow2, "COL": True}
            title = f"swiglu_quantize {dtype} {'pow2' if pow2 else 'fp32'}"
            cases.append((title, _swiglu_quantize_kernel, inputs | pointers, constants, {"num_warps": NUM_WARPS}))
    _, kernel, signature, constants, options = cases[0]
    cases.append(("swiglu_quantize bf16 pow2 row copy", kernel, signature, constants | {"COL": False}, options))
    plain = {name: kind for name, kind in signature.items() if name not in pointers} | {"out_ptr": "*bf16"}
    nothing = {name: value for name, value in constants.items() if name != "out_ptr"} | dict.fromkeys(pointers)
    cases.append(("swiglu bf16", kernel, plain, nothing | {"QUANTIZE": False}, options))
    return cases


# (name, kernel, signature, constexprs, options); pointers and integers are multiples of 16
COMPILE_CASES = _compile_cases()


def swiglu_quantize(
    gate: Tensor,
    up: Tensor,
    *,
    fp8_dtype: torch.dtype,
    fp8_max: float,
    pow2: bool,
    col_pow2: bool | None = None,
    columns: bool = True,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Row copy and column copy of h = silu(gate) * up: quantize.quantize_dual(swiglu(gate, up)), bit for bit.

    Args:
        gate, up: [M, K] bf16 or fp32, the same dtype, row-major with any leading strides, on a GPU; any M, K >= 0.
        fp8_dtype: torch.float8_e4m3fn or torch.float8_e5m2.
        fp8_max: largest finite number of that format.
        pow2: round the scales up to powers of two.
        col_pow2: kind of scale of the column copy; None is that of the row copy.
        columns: write the column copy; without it the last two outputs are None.
        block: 128.

    Returns:
        (qdata, scale_inv, qdata of h.T, scale_inv of h.T), laid out as by quantize_dual.

    Raises:
        ValueError: gate, up, the format or the block do not fit.
    """
    _check("swiglu_quantize", gate, up, fp8_dtype, block)
    M, K = gate.shape
    row, row_scale = _empty_codes(gate, M, K, fp8_dtype, 16), _empty_scales(gate, M, K)
    col = _empty_codes(gate, K, M, fp8_dtype, BLOCK) if columns else None
    col_scale = _empty_scales(gate, K, M) if columns else None
    kinds = _max_bits(fp8_max), pow2, pow2 if col_pow2 is None else col_pow2
    _launch(gate, up, None, row, row_scale, col, col_scale, kinds)
    return row, row_scale, col, col_scale


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """h = silu(gate) * up [M, K] in the dtype of gate, with the numbers that swiglu_quantize quantises.

    Raises:
        ValueError: gate or up do not fit.
    """
    _check("swiglu", gate, up, torch.float8_e4m3fn, BLOCK)
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _launch(gate, up, h, None, None, None, None, (0, True, True))
    return h


def _launch(
    gate: Tensor, up: Tensor, out: Tensor | None,
    row: Tensor | None, row_scale: Tensor | None, col: Tensor | None, col_scale: Tensor | None,
    kinds: tuple[int, bool, bool],
) -> None:  # fmt: skip
    M, K = gate.shape
    if M == 0 or K == 0:
        return
    strides = [0 if tensor is None else tensor.stride(axis) for tensor, axis in
               ((out, 0), (row, 0), (row_scale, 1), (col, 0), (col_scale, 1))]  # fmt: skip
    _swiglu_quantize_kernel[(triton.cdiv(M, BLOCK) * triton.cdiv(K, BLOCK),)](
        gate, up, out, row, row_scale, col, col_scale, M, K, gate.stride(0), up.stride(0), *strides,
        MAX_BITS=kinds[0], ROW_POW2=kinds[1], COL_POW2=kinds[2], COL=col is not None, QUANTIZE=row is not None,
        num_warps=NUM_WARPS,
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


def _check(name: str, gate: Tensor, up: Tensor, fp8_dtype: torch.dtype, block: int) -> None:
    """Raise ValueError unless gate and up are alike, row-major, and format and block ones that the kernel serves."""
    if gate.dim() != 2 or gate.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(
            f"{name}: gate is {list(gate.shape)} {gate.dtype}; needs [M, K] in torch.bfloat16 or torch.float32. "
            "Reshape or cast it."
        )
    if up.shape != gate.shape or up.dtype is not gate.dtype:
        raise ValueError(f"{name}: up is {list(up.shape)} {up.dtype}; needs {list(gate.shape)} {gate.dtype}, as gate.")
    for label, x in (("gate", gate), ("up", up)):
        if x.shape[1] > 1 and x.shape[0] > 0 and x.stride(1) != 1:
            raise ValueError(f"{name}: {label} has strides {x.stride()}; needs (any, 1). Pass {label}.contiguous().")
    if max(gate.shape) >= SIZE_LIMIT:
        raise ValueError(f"{name}: gate is {list(gate.shape)}; needs dimensions below 2^31. Split it.")
    if fp8_dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        raise ValueError(f"{name}: fp8_dtype is {fp8_dtype}; needs torch.float8_e4m3fn or torch.float8_e5m2.")
    if block != BLOCK:
        raise ValueError(f"{name}: block is {block}; needs {BLOCK}. Use the unfused path for others.")
