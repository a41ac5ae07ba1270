"""SwiGLU and its quantisation in one pass: h = silu(gate) * up, as a row copy and a transposed column copy.

gate, up [M, K] bf16/fp32, row-major, any leading strides (also the halves of one [M, 2K]) -> the four outputs of
quantize.quantize_dual for h, bit for bit, without h ever being written. silu(gate) and h are rounded to the dtype of
gate, as torch does in `F.silu(gate) * up`. exp and the division of silu are the device's fast ones (`sigmoid`), so
that now and then a BF16 h differs from torch's in its last place: `swiglu` is this kernel without the quantiser, and
the definition of h.
One program: a tile of 128x128; how it is scaled and stored is in tile.py, or in tile_words.py where that serves.
Source: DeepSeek-V3 (arXiv:2412.19437) 3.3; SwiGLU: arXiv:2002.05202. Measured: kernels/README.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8train.kernels.launch import Rest, launch
from fp8train.kernels.tile import INTERPRETED, load_strip, store_plain, store_tile
from fp8train.kernels.tile_launch import (
    MAX_BITS,
    are_whole,
    as_words,
    check_matrix,
    empty_copies,
    leading_strides,
    max_bits,
    tiles,
    word_tiling,
)
from fp8train.kernels.tile_words import halves, load_words, paired, store_word_tile, times

LOG2_E = tl.constexpr(1.4426950408889634)
KEEP = True  # calculate h once
AHEAD = tl.constexpr(2)  # strips of each input that are loaded while others are worked on, where WORDS
MAX_REGISTERS = 128  # of BF16, pow2 scales, whole tiles, where not WORDS: two programs of 8 warps on an SM


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), FP32; relative error at most |x| 2^-23 + 2^-21.

    As a quarter over a quarter of the sum. `ftz`, which spares 6 of 33 instructions for a number, flushes nothing that
    would be seen: a power below 2^-126 is lost in the sum, and a reciprocal below 2^-126 is that of an exp(-x) beyond
    FP32, which is 0.
    """
    z = tl.fma(x, -LOG2_E, -2.0)  # 2^z = exp(-x) / 4
    if INTERPRETED:
        quadruple = 1.0 / (0.25 + tl.exp2(z))
    else:
        quadruple = tl.inline_asm_elementwise(
            "{ .reg .f32 t; ex2.approx.ftz.f32 t, $1; add.rn.f32 t, t, 0f3E800000; rcp.approx.ftz.f32 $0, t; }",
            "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return 0.25 * quadruple


@triton.jit
def swiglu_strip(gate_ptr, up_ptr, stride_gm, stride_um, i, m, k, M, K, STRIPS: tl.constexpr):
    """silu(gate) * up of strip i, rounded twice as torch does, fp32."""
    gate = load_strip(gate_ptr, stride_gm, i, m, k, M, K, STRIPS)
    up = load_strip(up_ptr, stride_um, i, m, k, M, K, STRIPS)
    silu = (gate * sigmoid(gate)).to(gate_ptr.dtype.element_ty).to(tl.float32)
    return (silu * up).to(gate_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def load_factors(gate_ptr, up_ptr, stride_gm, stride_um, i, m, k, STRIPS: tl.constexpr):
    """Words of strip i of gate and of up."""
    return load_words(gate_ptr, stride_gm, i, m, k, STRIPS), load_words(up_ptr, stride_um, i, m, k, STRIPS)


@triton.jit
def swiglu_words(gate, up):
    """Words of what swiglu_strip gives, from those of the inputs."""
    even, odd = halves(gate)
    return times(paired(even * sigmoid(even), odd * sigmoid(odd)), up)


@triton.jit
def _swiglu_quantize_kernel(
    gate_ptr, up_ptr,  # [M, K] bf16 or fp32
    out_ptr,  # [M, K], h itself, if not QUANTIZE
    row_ptr, row_scale_ptr,  # [M, K] fp8, [M, ceil(K/128)] fp32
    col_ptr, col_scale_ptr,  # [K, M] fp8, [K, ceil(M/128)] fp32
    M, K, stride_gm, stride_um, stride_om, stride_row, stride_row_scale, stride_col, stride_col_scale, zero,
    MAX_BITS: tl.constexpr, ROW_POW2: tl.constexpr, COL_POW2: tl.constexpr, COL: tl.constexpr, QUANTIZE: tl.constexpr,
    STRIPS: tl.constexpr, KEEP: tl.constexpr,
    WHOLE: tl.constexpr,  # are_whole: every tile lies inside
    WORDS: tl.constexpr,  # as_words
):  # fmt: skip
    tiles = (K - 1) // 128 + 1  # K + 127 could overflow
    m, k = (tl.program_id(0) // tiles).to(tl.int64) * 128, (tl.program_id(0) % tiles).to(tl.int64) * 128
    if WHOLE:  # of which the compiler knows that nothing is outside
        M, K = m + 128, k + 128
    inputs = gate_ptr, up_ptr, stride_gm, stride_um
    if WORDS:
        store_word_tile(
            load_factors, inputs, swiglu_words, m, k, M, K, row_ptr, row_scale_ptr, col_ptr, col_scale_ptr,
            stride_row, stride_row_scale, stride_col, stride_col_scale, MAX_BITS, STRIPS, AHEAD,
        )  # fmt: skip
    elif QUANTIZE:
        store_tile(
            swiglu_strip, inputs, inputs, zero, m, k, M, K, row_ptr, row_scale_ptr, col_ptr, col_scale_ptr, stride_row,
            stride_row_scale, stride_col, stride_col_scale, MAX_BITS, ROW_POW2, COL_POW2, True, COL, STRIPS, KEEP,
        )  # fmt: skip
    else:
        store_plain(swiglu_strip, inputs, out_ptr, stride_om, m, k, M, K)


def _compile_cases() -> list[tuple]:
    """What tests compile: both dtypes and kinds of scale, the row copy alone, and h itself."""
    pointers = {"row_ptr": "*fp8e4nv", "row_scale_ptr": "*fp32", "col_ptr": "*fp8e4nv", "col_scale_ptr": "*fp32"}
    sizes = [name for name in _swiglu_quantize_kernel.arg_names if name.islower() and not name.endswith("_ptr")]
    common = {"MAX_BITS": MAX_BITS[torch.float8_e4m3fn], "out_ptr": None, "QUANTIZE": True}
    cases = []
    for dtype in ("bf16", "fp32"):
        inputs = dict.fromkeys(("gate_ptr", "up_ptr"), f"*{dtype}") | dict.fromkeys(("M", "K", *sizes), "i32")
        for pow2 in (True, False):
            constants = common | {"ROW_POW2": pow2, "COL_POW2": pow2, "COL": True}
            title = f"swiglu_quantize {dtype} {'pow2' if pow2 else 'fp32'}"
            more, options = word_tiling(
                dtype == "bf16", True, KEEP, True, dtype == "bf16" and pow2, True, MAX_REGISTERS
            )
            cases.append((title, _swiglu_quantize_kernel, inputs | pointers, constants | more, options))
    title, kernel, signature, constants, _ = cases[0]
    more, options = word_tiling(True, True, KEEP, True, True, False, MAX_REGISTERS)
    cases.append((f"{title} plain", kernel, signature, constants | more, options))
    more, options = word_tiling(True, False, KEEP, True, True, True, MAX_REGISTERS)
    constants = constants | more
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
    pow2: bool,
    col_pow2: bool | None = None,
    columns: bool = True,
    words: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Row copy and column copy of h = silu(gate) * up: quantize.quantize_dual(swiglu(gate, up)), bit for bit.

    Args:
        gate, up: [M, K] bf16 or fp32, the same dtype, row-major with any leading strides, on a GPU; any M, K >= 0.
        fp8_dtype: torch.float8_e4m3fn or torch.float8_e5m2.
        pow2: round the scales up to powers of two.
        col_pow2: kind of scale of the column copy; None is that of the row copy.
        columns: write the column copy; without it the last two outputs are None.
        words: take two numbers at a time where that serves (as_words), to the same codes.

    Returns:
        (qdata, scale_inv, qdata of h.T, scale_inv of h.T), laid out as by quantize_dual.

    Raises:
        ValueError: gate, up or the format do not fit.
    """
    _check("swiglu_quantize", gate, up)
    kinds = max_bits("swiglu_quantize", fp8_dtype), pow2, pow2 if col_pow2 is None else col_pow2
    copies = empty_copies(gate, fp8_dtype, columns)
    _launch(gate, up, None, *copies, kinds, words)
    return copies


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """h = silu(gate) * up [M, K] in the dtype of gate, with the numbers that swiglu_quantize quantises.

    Raises:
        ValueError: gate or up do not fit.
    """
    _check("swiglu", gate, up)
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _launch(gate, up, h, None, None, None, None, (0, True, True))
    return h


def _launch(
    gate: Tensor, up: Tensor, out: Tensor | None,
    row: Tensor | None, row_scale: Tensor | None, col: Tensor | None, col_scale: Tensor | None,
    kinds: tuple[int, bool, bool], words: bool = False,
) -> None:  # fmt: skip
    if gate.numel() == 0:
        return

    def rest() -> Rest:
        (M, K), bf16 = gate.shape, gate.dtype is torch.bfloat16
        whole = are_whole(M, K, gate.stride(0), up.stride(0))
        fits = as_words(bf16, col is not None, whole, kinds[1] and kinds[2], gate, up)
        tile, options = word_tiling(bf16, col is not None, KEEP, whole, fits, words, MAX_REGISTERS)
        constants = {"MAX_BITS": kinds[0], "ROW_POW2": kinds[1], "COL_POW2": kinds[2]}
        constants |= {"COL": col is not None, "QUANTIZE": row is not None}
        strides = 0 if out is None else out.stride(0), *leading_strides(row, row_scale, col, col_scale)
        return tiles(M, K), (M, K, gate.stride(0), up.stride(0), *strides, 0), constants | tile, options

    launch(_swiglu_quantize_kernel, (*kinds, words), (gate, up, out, row, row_scale, col, col_scale), rest)


def _check(name: str, gate: Tensor, up: Tensor) -> None:
    """Raise ValueError unless gate and up are alike and row-major."""
    check_matrix(name, "gate", gate)
    if up.shape != gate.shape or up.dtype is not gate.dtype:
        got, wanted = f"{list(up.shape)} {up.dtype}", f"{list(gate.shape)} {gate.dtype}, as gate"
        raise ValueError(f"{name}: up is {got}; needs {wanted}. Reshape or cast one of them.")
    check_matrix(name, "up", up)
