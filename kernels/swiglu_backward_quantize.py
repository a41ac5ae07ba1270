"""Backward of SwiGLU and its quantisation in one pass: dgate and dup, each as a row copy and a transposed column copy.

h = silu(gate) * up. dup = dh * silu(gate); dgate = (dh * up) * s * (1 + gate * (1 - s)), s = 1 / (1 + exp(-gate)).
dh, gate, up [M, K] bf16/fp32, row-major, any leading strides -> for both gradients the four outputs of
quantize.quantize_dual, bit for bit, without the gradients ever being written. silu(gate), dh * up and both gradients
are rounded to the dtype of gate, as autograd of `F.silu(gate) * up` does. exp and the divisions are the device's fast
ones (2 ulp of FP32), hence not torch's bits: `swiglu_backward` is this without the quantiser, and the definition.
One program: a tile of 128x128 of one gradient (both spill); the two of a tile are neighbours, so that dh and gate come
from L2 the second time. What quantize.py has too is the same there, held by tests: kernel files import no other.
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
def _gradient(dh_ptr, gate_ptr, up_ptr, stride_dm, stride_gm, stride_um, half, i, m, k, M, K):
    """Quarter i of dgate (half 0) or dup (half 1), rounded where torch rounds, fp32."""
    dh = _load(dh_ptr, stride_dm, i, m, k, M, K)
    gate = _load(gate_ptr, stride_gm, i, m, k, M, K)
    denominator = 1.0 + tl.exp(-gate)
    if half == 0:
        up = _load(up_ptr, stride_um, i, m, k, M, K)
        sigmoid = 1.0 / denominator
        dsilu = (dh * up).to(gate_ptr.dtype.element_ty).to(tl.float32)
        gradient = dsilu * sigmoid * tl.fma(gate, 1.0 - sigmoid, 1.0)
    else:
        gradient = dh * (gate / denominator).to(gate_ptr.dtype.element_ty).to(tl.float32)
    return gradient.to(gate_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _store_quarters(x, m, k, M, K, out_ptr, stride_om):
    """Write the quarters of a tile, unquantised."""
    for i in tl.static_range(4):
        rows, cols, inside = _quarter(i, m, k, M, K)
        offsets = m * stride_om + k + rows.to(tl.int64)[:, None] * stride_om + cols[None, :]
        tl.store(out_ptr + offsets, x[i].to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward_quantize_kernel(
    dh_ptr, gate_ptr, up_ptr,  # [M, K] bf16 or fp32
    out_ptr,  # [2, M, K], the gradients themselves, if not QUANTIZE
    row_ptr, row_scale_ptr,  # [2, M, K] fp8, [2, M, ceil(K/128)] fp32
    col_ptr, col_scale_ptr,  # [2, K, M] fp8, [2, K, ceil(M/128)] fp32
    M, K, stride_dm, stride_gm, stride_um, stride_om, stride_row, stride_row_scale, stride_col, stride_col_scale,
    MAX_BITS: tl.constexpr, ROW_POW2: tl.constexpr, COL_POW2: tl.constexpr, COL: tl.constexpr, QUANTIZE: tl.constexpr,
):  # fmt: skip
    half = tl.program_id(0) % 2
    tiles_m, tiles_k = (M - 1) // 128 + 1, (K - 1) // 128 + 1  # M + 127 could overflow
    tile = tl.program_id(0) // 2
    m, k = (tile // tiles_k).to(tl.int64) * 128, (tile % tiles_k).to(tl.int64) * 128
    x = (
        _gradient(dh_ptr, gate_ptr, up_ptr, stride_dm, stride_gm, stride_um, half, 0, m, k, M, K),
        _gradient(dh_ptr, gate_ptr, up_ptr, stride_dm, stride_gm, stride_um, half, 1, m, k, M, K),
        _gradient(dh_ptr, gate_ptr, up_ptr, stride_dm, stride_gm, stride_um, half, 2, m, k, M, K),
        _gradient(dh_ptr, gate_ptr, up_ptr, stride_dm, stride_gm, stride_um, half, 3, m, k, M, K),
    )
    second = half.to(tl.int64)
    if QUANTIZE:
        row_ptr += second * M * stride_row
        row_scale_ptr += second * tiles_k * stride_row_scale
        if COL:
            col_ptr += second * K * stride_col
            col_scale_ptr += second * tiles_m * stride_col_scale
        _store_tile(
            x, m, k, M, K, row_ptr, row_scale_ptr, col_ptr, col_scale_ptr,
            stride_row, stride_row_scale, stride_col, stride_col_scale, MAX_BITS, ROW_POW2, COL_POW2, True, COL,
        )  # fmt: skip
    else:
        _store_quarters(x, m, k, M, K, out_ptr + second * M * stride_om, stride_om)


def _compile_cases() -> list[tuple]:
    """What tests compile: both dtypes and kinds of scale, the row copies alone, and the gradients themselves."""
    pointers = {"row_ptr": "*fp8e4nv", "row_scale_ptr": "*fp32", "col_ptr": "*fp8e4nv", "col_scale_ptr": "*fp32"}
    kernel, options = _swiglu_backward_quantize_kernel, {"num_warps": NUM_WARPS}
    sizes = [name for name in kernel.arg_names if name.startswith("stride_")]
    common = {"MAX_BITS": 0x43E00000, "out_ptr": None, "QUANTIZE": True}
    cases = []
    for dtype in ("bf16", "fp32"):
        inputs = dict.fromkeys(("dh_ptr", "gate_ptr", "up_ptr"), f"*{dtype}") | dict.fromkeys(("M", "K", *sizes), "i32")
        for pow2 in (True, False):
            constants = common | {"ROW_POW2": pow2, "COL_POW2": pow2, "COL": True}
            title = f"swiglu_backward_quantize {dtype} {'pow2' if pow2 else 'fp32'}"
            cases.append((title, kernel, inputs | pointers, constants, options))
    title, _, signature, constants, _ = cases[0]
    cases.append((f"{title} row copies", kernel, signature, constants | {"COL": False}, options))
    plain = {name: kind for name, kind in signature.items() if name not in pointers} | {"out_ptr": "*bf16"}
    nothing = {name: value for name, value in constants.items() if name != "out_ptr"} | dict.fromkeys(pointers)
    cases.append(("swiglu_backward bf16", kernel, plain, nothing | {"QUANTIZE": False}, options))
    return cases


# (name, kernel, signature, constexprs, options); pointers and integers are multiples of 16
COMPILE_CASES = _compile_cases()

Copies = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def swiglu_backward_quantize(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    *,
    fp8_dtype: torch.dtype,
    fp8_max: float,
    pow2: bool,
    col_pow2: bool | None = None,
    columns: bool = True,
    block: int = BLOCK,
) -> tuple[Copies, Copies]:
    """Row and column copies of dgate and of dup: quantize.quantize_dual of swiglu_backward's results, bit for bit.

    Args:
        dh, gate, up: [M, K] bf16 or fp32, the same dtype, row-major with any leading strides, on a GPU; any M, K >= 0.
        fp8_dtype: torch.float8_e4m3fn or torch.float8_e5m2.
        fp8_max: largest finite number of that format.
        pow2: round the scales up to powers of two.
        col_pow2: kind of scale of the column copies; None is that of the row copies.
        columns: write the column copies; without them the last two outputs of each are None.
        block: 128.

    Returns:
        For dgate and for dup (qdata, scale_inv, qdata of the transpose, its scale_inv), laid out as by quantize_dual.

    Raises:
        ValueError: an input, the format or the block do not fit.
    """
    _check("swiglu_backward_quantize", dh, gate, up, fp8_dtype, block)
    M, K = gate.shape
    row, row_scale = _empty_codes(gate, 2 * M, K, fp8_dtype, 16), _empty_scales(gate, M, 2 * BLOCK * -(-K // BLOCK))
    col = _empty_codes(gate, 2 * K, M, fp8_dtype, BLOCK) if columns else None
    col_scale = _empty_scales(gate, K, 2 * BLOCK * -(-M // BLOCK)) if columns else None
    kinds = _max_bits(fp8_max), pow2, pow2 if col_pow2 is None else col_pow2
    _launch(dh, gate, up, None, row, row_scale, col, col_scale, kinds)
    halves = [
        (
            row[half * M : (half + 1) * M],
            row_scale.chunk(2, dim=1)[half] if K else row_scale,
            None if col is None else col[half * K : (half + 1) * K],
            col_scale if col_scale is None or M == 0 else col_scale.chunk(2, dim=1)[half],
        )
        for half in (0, 1)
    ]
    return halves[0], halves[1]


def swiglu_backward(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup), each [M, K] in the dtype of gate, with the numbers that swiglu_backward_quantize quantises.

    Raises:
        ValueError: an input does not fit.
    """
    _check("swiglu_backward", dh, gate, up, torch.float8_e4m3fn, BLOCK)
    gradients = torch.empty(2, *gate.shape, dtype=gate.dtype, device=gate.device)
    _launch(dh, gate, up, gradients[0], None, None, None, None, (0, True, True))
    return gradients[0], gradients[1]


def _launch(
    dh: Tensor, gate: Tensor, up: Tensor, out: Tensor | None,
    row: Tensor | None, row_scale: Tensor | None, col: Tensor | None, col_scale: Tensor | None,
    kinds: tuple[int, bool, bool],
) -> None:  # fmt: skip
    M, K = gate.shape
    if M == 0 or K == 0:
        return
    strides = [0 if tensor is None else tensor.stride(axis) for tensor, axis in
               ((out, 0), (row, 0), (row_scale, 1), (col, 0), (col_scale, 1))]  # fmt: skip
    _swiglu_backward_quantize_kernel[(2 * triton.cdiv(M, BLOCK) * triton.cdiv(K, BLOCK),)](
        dh, gate, up, out, row, row_scale, col, col_scale, M, K, dh.stride(0), gate.stride(0), up.stride(0), *strides,
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


def _check(name: str, dh: Tensor, gate: Tensor, up: Tensor, fp8_dtype: torch.dtype, block: int) -> None:
    """Raise ValueError unless the inputs are alike, row-major, and format and block ones that the kernel serves."""
    if gate.dim() != 2 or gate.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(
            f"{name}: gate is {list(gate.shape)} {gate.dtype}; needs [M, K] in torch.bfloat16 or torch.float32. "
            "Reshape or cast it."
        )
    for label, x in (("dh", dh), ("gate", gate), ("up", up)):
        if x.shape != gate.shape or x.dtype is not gate.dtype:
            wanted = f"{list(gate.shape)} {gate.dtype}, as gate"
            raise ValueError(f"{name}: {label} is {list(x.shape)} {x.dtype}; needs {wanted}.")
        if x.shape[1] > 1 and x.shape[0] > 0 and x.stride(1) != 1:
            raise ValueError(f"{name}: {label} has strides {x.stride()}; needs (any, 1). Pass {label}.contiguous().")
    if max(gate.shape) >= SIZE_LIMIT:
        raise ValueError(f"{name}: gate is {list(gate.shape)}; needs dimensions below 2^31. Split it.")
    if fp8_dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        raise ValueError(f"{name}: fp8_dtype is {fp8_dtype}; needs torch.float8_e4m3fn or torch.float8_e5m2.")
    if block != BLOCK:
        raise ValueError(f"{name}: block is {block}; needs {BLOCK}. Use the unfused path for others.")
