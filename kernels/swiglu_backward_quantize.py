"""Backward of SwiGLU and its quantisation in one pass: dgate and dup, each as a row copy and a transposed column copy.

h = silu(gate) * up. s = 1 / (1 + exp(-gate)), silu(gate) = gate * s, dup = dh * silu(gate),
dgate = (dh * up) * (silu(gate) - silu(gate) * s + s).
dh, gate, up [M, K] bf16/fp32, row-major, any leading strides -> for both gradients the four outputs of
quantize.quantize_dual, bit for bit, without the gradients ever being written. silu(gate), dh * up and both gradients
are rounded to the dtype of gate, as autograd of `F.silu(gate) * up` does. exp and the division are the device's fast
ones (swiglu_quantize.sigmoid), hence not torch's bits: `swiglu_backward` is this without the quantiser: the definition.
One program: a tile of 128x128 of both gradients where they are BF16, tiles are whole and all scales powers of two
(tile_words.py); else of one of them (tile.py), since fp32 numbers of both do not fit the registers. On request also the
column copy of h, for wgrad of the linear that reads h: by a program for each tile, beside those that bring gate and up
of the same tile to L2.
Source: DeepSeek-V3 (arXiv:2412.19437) 3.3; SwiGLU: arXiv:2002.05202. Measured: kernels/README.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8train.kernels.launch import Rest, launch
from fp8train.kernels.swiglu_quantize import load_factors, sigmoid, swiglu_strip, swiglu_words
from fp8train.kernels.tile import load_strip, store_strip, store_tile
from fp8train.kernels.tile_launch import (
    BLOCK,
    MAX_BITS,
    NUM_WARPS,
    are_whole,
    as_words,
    check_matrix,
    empty_codes,
    empty_scales,
    leading_strides,
    max_bits,
    tiles,
    tiling,
)
from fp8train.kernels.tile_words import halves, load_words, paired, store_two_tiles, store_word_columns, times

KEEP = True  # calculate a gradient of whole tiles once
AHEAD = tl.constexpr(4)  # strips of each input that are loaded while one is worked on
RAGGED_WARPS = 16  # of a tile that may not be whole: with 8 all of them spill, with 16 those kept with FP32 scales
MAX_REGISTERS = 128  # of whole BF16 tiles with pow2 scales: two programs of 8 warps on an SM


@triton.jit
def _silu(gate):
    """silu(gate) and its derivative, fp32."""
    s = sigmoid(gate)
    silu = gate * s
    return silu, tl.fma(-silu, s, silu) + s


@triton.jit
def _gradients(
    dh_ptr, gate_ptr, up_ptr, stride_dm, stride_gm, stride_um, i, m, k, M, K, STRIPS: tl.constexpr
):  # fmt: skip
    """Strip i of dgate and of dup, rounded where torch rounds, fp32."""
    dh = load_strip(dh_ptr, stride_dm, i, m, k, M, K, STRIPS)
    gate = load_strip(gate_ptr, stride_gm, i, m, k, M, K, STRIPS)
    up = load_strip(up_ptr, stride_um, i, m, k, M, K, STRIPS)
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    silu, dsilu = _silu(gate)
    dgate = (dh * up).to(dtype).to(tl.float32) * dsilu
    dup = dh * silu.to(dtype).to(tl.float32)
    return dgate.to(dtype).to(tl.float32), dup.to(dtype).to(tl.float32)


@triton.jit
def _dgate(
    dh_ptr, gate_ptr, up_ptr, stride_dm, stride_gm, stride_um, i, m, k, M, K, STRIPS: tl.constexpr
):  # fmt: skip
    return _gradients(dh_ptr, gate_ptr, up_ptr, stride_dm, stride_gm, stride_um, i, m, k, M, K, STRIPS)[0]


@triton.jit
def _dup(
    dh_ptr, gate_ptr, up_ptr, stride_dm, stride_gm, stride_um, i, m, k, M, K, STRIPS: tl.constexpr
):  # fmt: skip
    return _gradients(dh_ptr, gate_ptr, up_ptr, stride_dm, stride_gm, stride_um, i, m, k, M, K, STRIPS)[1]


@triton.jit
def _load_words(dh_ptr, gate_ptr, up_ptr, stride_dm, stride_gm, stride_um, i, m, k, STRIPS: tl.constexpr):
    return (
        load_words(dh_ptr, stride_dm, i, m, k, STRIPS),
        load_words(gate_ptr, stride_gm, i, m, k, STRIPS),
        load_words(up_ptr, stride_um, i, m, k, STRIPS),
    )


@triton.jit
def _gradient_words(dh, gate, up):
    """Words of dgate and of dup from those of the inputs."""
    even, odd = halves(gate)
    silu, dsilu = _silu(even)
    odd_silu, odd_dsilu = _silu(odd)
    even, odd = halves(times(dh, up))
    return paired(even * dsilu, odd * odd_dsilu), times(dh, paired(silu, odd_silu))


@triton.jit
def _store_h_columns(
    gate_ptr, up_ptr, stride_gm, stride_um, zero, m, k, M, K, h_ptr, h_scale_ptr, stride_h, stride_h_scale,
    MAX_BITS: tl.constexpr, POW2: tl.constexpr, STRIPS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Write the column copy of a tile of h; without WORDS h is calculated twice, since to keep it spills."""
    inputs = gate_ptr, up_ptr, stride_gm, stride_um
    if WORDS:
        x = ()
        for i in tl.static_range(STRIPS):
            gate, up = load_factors(*inputs, i, m, k, STRIPS)
            x = x + (swiglu_words(gate, up),)
        store_word_columns(x, m, k, K, h_ptr, h_scale_ptr, stride_h, stride_h_scale, MAX_BITS)
    else:
        store_tile(
            swiglu_strip, inputs, inputs, zero, m, k, M, K, h_ptr, h_scale_ptr, h_ptr, h_scale_ptr,
            stride_h, stride_h_scale, stride_h, stride_h_scale, MAX_BITS, POW2, POW2, False, True, STRIPS, False,
        )  # fmt: skip


@triton.jit
def _swiglu_backward_quantize_kernel(
    dh_ptr, gate_ptr, up_ptr,  # [M, K] bf16 or fp32
    out_ptr,  # [2, M, K], the gradients themselves, if not QUANTIZE
    row_ptr, row_scale_ptr,  # [2, M, K] fp8, [2, M, ceil(K/128)] fp32
    col_ptr, col_scale_ptr,  # [2, K, M] fp8, [2, K, ceil(M/128)] fp32
    h_ptr, h_scale_ptr,  # [K, M] fp8, [K, ceil(M/128)] fp32
    M, K, stride_dm, stride_gm, stride_um, stride_om, stride_row, stride_row_scale, stride_col, stride_col_scale,
    stride_h, stride_h_scale, zero,
    MAX_BITS: tl.constexpr, ROW_POW2: tl.constexpr, COL_POW2: tl.constexpr, COL: tl.constexpr, QUANTIZE: tl.constexpr,
    H: tl.constexpr, H_MAX_BITS: tl.constexpr, H_POW2: tl.constexpr, STRIPS: tl.constexpr, KEEP: tl.constexpr,
    PARTS: tl.constexpr,  # programs to a tile; with H the last makes h's
    WHOLE: tl.constexpr,  # are_whole: every tile lies inside
    WORDS: tl.constexpr,  # as_words: a program makes a tile of both gradients
):  # fmt: skip
    tiles_m, tiles_k = (M - 1) // 128 + 1, (K - 1) // 128 + 1  # M + 127 could overflow
    tile, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    m, k = (tile // tiles_k).to(tl.int64) * 128, (tile % tiles_k).to(tl.int64) * 128
    inputs = dh_ptr, gate_ptr, up_ptr, stride_dm, stride_gm, stride_um
    rows, cols = tl.cast(M, tl.int64), tl.cast(K, tl.int64)
    row_gap, row_scale_gap = rows * stride_row, tl.cast(tiles_k, tl.int64) * stride_row_scale
    col_gap, col_scale_gap = cols * stride_col, tl.cast(tiles_m, tl.int64) * stride_col_scale
    if WHOLE:  # of which the compiler knows that nothing is outside
        M, K = m + 128, k + 128
    if H:  # noqa: SIM102  known when it is compiled
        if part == PARTS - 1:
            _store_h_columns(
                gate_ptr, up_ptr, stride_gm, stride_um, zero, m, k, M, K, h_ptr, h_scale_ptr, stride_h, stride_h_scale,
                H_MAX_BITS, H_POW2, STRIPS, WORDS,
            )  # fmt: skip
            return
    if WORDS:
        store_two_tiles(
            _load_words, inputs, _gradient_words, m, k, M, K, row_ptr, row_scale_ptr, col_ptr, col_scale_ptr,
            stride_row, stride_row_scale, stride_col, stride_col_scale,
            row_gap, row_scale_gap, col_gap, col_scale_gap, MAX_BITS, STRIPS, AHEAD,
        )  # fmt: skip
    elif QUANTIZE:
        half = part.to(tl.int64)
        row_ptr += half * row_gap
        row_scale_ptr += half * row_scale_gap
        if COL:
            col_ptr += half * col_gap
            col_scale_ptr += half * col_scale_gap
        if half == 0:
            store_tile(
                _dgate, inputs, inputs, zero, m, k, M, K, row_ptr, row_scale_ptr, col_ptr, col_scale_ptr,
                stride_row, stride_row_scale, stride_col, stride_col_scale,
                MAX_BITS, ROW_POW2, COL_POW2, True, COL, STRIPS, KEEP,
            )  # fmt: skip
        else:
            store_tile(
                _dup, inputs, inputs, zero, m, k, M, K, row_ptr, row_scale_ptr, col_ptr, col_scale_ptr,
                stride_row, stride_row_scale, stride_col, stride_col_scale,
                MAX_BITS, ROW_POW2, COL_POW2, True, COL, STRIPS, KEEP,
            )  # fmt: skip
    else:
        for i in tl.static_range(4):
            dgate, dup = _gradients(*inputs, i, m, k, M, K, 4)
            store_strip(dgate, out_ptr, stride_om, i, m, k, M, K, 4)
            store_strip(dup, out_ptr + rows * stride_om, stride_om, i, m, k, M, K, 4)


Format = tuple[int, bool]  # bits of its maximum, whether its scales are powers of two


def _tiling(
    bf16: bool, columns: bool, whole: bool, fits: bool, words: bool, h: Format | None = None, quantize: bool = True
) -> tuple[dict[str, object], dict[str, object]]:
    """columns: whether the gradients' column copies are wanted; fits: as_words."""
    warps, limit = NUM_WARPS if whole else RAGGED_WARPS, MAX_REGISTERS if fits else None
    constants, options = tiling(bf16, columns or h is not None, KEEP and whole, warps, whole, limit)
    words = fits and words
    parts = (1 if words or not quantize else 2) + (h is not None)
    constants |= {"COL": columns, "QUANTIZE": quantize, "WORDS": words, "PARTS": parts, "H": h is not None}
    return constants | dict(zip(("H_MAX_BITS", "H_POW2"), h or (0, True), strict=True)), options


def _compile_cases() -> list[tuple]:
    """What tests compile: both dtypes and kinds of scale, the row copies alone, and the gradients themselves."""
    pairs = [(f"{copy}_ptr", f"{copy}_scale_ptr") for copy in ("row", "col", "h")]
    pointers = {name: kind for pair in pairs for name, kind in zip(pair, ("*fp8e4nv", "*fp32"), strict=True)}
    without_h = dict.fromkeys(pairs[2])
    kernel, e4m3 = _swiglu_backward_quantize_kernel, MAX_BITS[torch.float8_e4m3fn]
    sizes = [name for name in kernel.arg_names if name.startswith("stride_")] + ["zero"]
    common = {"MAX_BITS": e4m3, "out_ptr": None}
    cases = []
    for dtype in ("bf16", "fp32"):
        inputs = dict.fromkeys(("dh_ptr", "gate_ptr", "up_ptr"), f"*{dtype}") | dict.fromkeys(("M", "K", *sizes), "i32")
        for pow2 in (True, False):
            constants = common | {"ROW_POW2": pow2, "COL_POW2": pow2}
            title = f"swiglu_backward_quantize {dtype} {'pow2' if pow2 else 'fp32'}"
            more, options = _tiling(dtype == "bf16", True, True, dtype == "bf16" and pow2, True, (e4m3, pow2))
            cases.append((title, kernel, inputs | pointers, constants | more, options))
    title, _, signature, constants, _ = cases[0]
    h = e4m3, True
    plain, limited = _tiling(True, True, True, True, False, h)
    cases.append((f"{title} plain", kernel, signature, constants | plain, limited))
    more, options = _tiling(True, True, True, False, True, h)
    pointers_odd = {"odd": ("dh_ptr", "gate_ptr", "up_ptr")}
    cases.append((f"{title} between words", kernel, signature, constants | more, options | pointers_odd))
    odd = {"odd": ("M", "K", *sizes[:3])}
    for scale, row, col in (("pow2", True, True), ("fp32", False, False), ("mixed", False, True)):
        more, options = _tiling(True, True, False, False, True, (e4m3, col))
        kinds = {"ROW_POW2": row, "COL_POW2": col}
        name = title.replace("pow2", f"{scale} ragged")
        cases.append((name, kernel, signature, constants | more | kinds, options | odd))
    one_row = {name: kind for name, kind in signature.items() if name != "M"}  # a size of 1 is a constant of the kernel
    cases.append((f"{title} one row", kernel, one_row, constants | more | {"M": 1}, options))
    for name, columns, h_format in (("row copies and h", False, h), ("row copies", False, None), ("no h", True, None)):
        more, options = _tiling(True, columns, True, columns, True, h_format)
        gone = without_h if h_format is None else {}
        kept = {name: kind for name, kind in signature.items() if name not in gone}
        cases.append((f"{title} {name}", kernel, kept, constants | more | gone, options))
    plain = {name: kind for name, kind in signature.items() if name not in pointers} | {"out_ptr": "*bf16"}
    nothing = {name: value for name, value in constants.items() if name != "out_ptr"} | dict.fromkeys(pointers)
    more, options = _tiling(True, False, True, False, True, quantize=False)
    cases.append(("swiglu_backward bf16", kernel, plain, nothing | more, options))
    return cases


# (name, kernel, signature, constexprs, options); pointers and integers are multiples of 16 but those in options["odd"]
COMPILE_CASES = _compile_cases()

Copies = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def swiglu_backward_quantize(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    *,
    fp8_dtype: torch.dtype,
    pow2: bool,
    col_pow2: bool | None = None,
    columns: bool = True,
    h: tuple[torch.dtype, bool] | None = None,
    words: bool = True,
) -> tuple[Copies, Copies, tuple[Tensor, Tensor] | None]:
    """Row and column copies of dgate and of dup: quantize.quantize_dual of swiglu_backward's results, bit for bit.

    Args:
        dh, gate, up: [M, K] bf16 or fp32, the same dtype, row-major with any leading strides, on a GPU; any M, K >= 0.
        fp8_dtype: torch.float8_e4m3fn or torch.float8_e5m2.
        pow2: round the scales up to powers of two.
        col_pow2: kind of scale of the column copies; None is that of the row copies.
        columns: write the column copies; without them the last two outputs of each are None.
        h: fp8_dtype and pow2 of a column copy of h, as swiglu_quantize writes it; None: none is written.
        words: take two numbers at a time, and both gradients in one program, where that serves (as_words), to the
            same codes.

    Returns:
        For dgate and for dup (qdata, scale_inv, qdata of the transpose, its scale_inv), laid out as by quantize_dual;
        and (qdata of h.T [K, M], its scale_inv), or None.

    Raises:
        ValueError: an input or a format do not fit.
    """
    name = "swiglu_backward_quantize"
    _check(name, dh, gate, up)
    kinds = max_bits(name, fp8_dtype), pow2, pow2 if col_pow2 is None else col_pow2
    h_kinds = None if h is None else (max_bits(name, h[0]), h[1])
    M, K = gate.shape
    row, row_scale = empty_codes(gate, 2 * M, K, fp8_dtype, 16), empty_scales(gate, M, 2 * BLOCK * -(-K // BLOCK))
    col = empty_codes(gate, 2 * K, M, fp8_dtype, BLOCK) if columns else None
    col_scale = empty_scales(gate, K, 2 * BLOCK * -(-M // BLOCK)) if columns else None
    h_copy = None if h is None else (empty_codes(gate, K, M, h[0], BLOCK), empty_scales(gate, K, M))
    _launch(dh, gate, up, None, (row, row_scale, col, col_scale), h_copy or (None, None), kinds, h_kinds, words)
    halves = [
        (
            row[half * M : (half + 1) * M],
            row_scale.chunk(2, dim=1)[half] if K else row_scale,
            None if col is None else col[half * K : (half + 1) * K],
            col_scale if col_scale is None or M == 0 else col_scale.chunk(2, dim=1)[half],
        )
        for half in (0, 1)
    ]
    return halves[0], halves[1], h_copy


def swiglu_backward(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup), each [M, K] in the dtype of gate, with the numbers that swiglu_backward_quantize quantises.

    Raises:
        ValueError: an input does not fit.
    """
    _check("swiglu_backward", dh, gate, up)
    gradients = torch.empty(2, *gate.shape, dtype=gate.dtype, device=gate.device)
    _launch(dh, gate, up, gradients[0], (None, None, None, None), (None, None), (0, True, True), None)
    return gradients[0], gradients[1]


def _launch(
    dh: Tensor, gate: Tensor, up: Tensor, out: Tensor | None,
    copies: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None], h: tuple[Tensor | None, Tensor | None],
    kinds: tuple[int, bool, bool], h_kinds: Format | None, words: bool = False,
) -> None:  # fmt: skip
    if gate.numel() == 0:
        return

    def rest() -> Rest:
        (M, K), bf16 = gate.shape, gate.dtype is torch.bfloat16
        inputs, columns = (dh.stride(0), gate.stride(0), up.stride(0)), copies[2] is not None
        whole, pow2 = are_whole(M, K, *inputs), kinds[1] and kinds[2] and (h_kinds is None or h_kinds[1])
        fits = as_words(bf16, columns, whole, pow2, dh, gate, up)
        tile, options = _tiling(bf16, columns, whole, fits, words, h_kinds, copies[0] is not None)
        constants = {"MAX_BITS": kinds[0], "ROW_POW2": kinds[1], "COL_POW2": kinds[2]} | tile
        strides = 0 if out is None else out.stride(0), *leading_strides(*copies), *leading_strides(None, None, *h)[2:]
        return tiles(M, K, tile["PARTS"]), (M, K, *inputs, *strides, 0), constants, options

    tensors = dh, gate, up, out, *copies, *h
    launch(_swiglu_backward_quantize_kernel, (*kinds, h_kinds, words), tensors, rest)


def _check(name: str, dh: Tensor, gate: Tensor, up: Tensor) -> None:
    """Raise ValueError unless the inputs are alike and row-major."""
    check_matrix(name, "gate", gate)
    for label, x in (("dh", dh), ("up", up)):
        if x.shape != gate.shape or x.dtype is not gate.dtype:
            got, wanted = f"{list(x.shape)} {x.dtype}", f"{list(gate.shape)} {gate.dtype}, as gate"
            raise ValueError(f"{name}: {label} is {got}; needs {wanted}. Reshape or cast one of them.")
        check_matrix(name, label, x)
