"""Quantize a weight in blocks of 128x128: codes, their byte transpose, and the scales in both orders, from one read.

w [N, K] fp32 (the master) or bf16, row-major, any leading stride -> qdata [N, K], qdata of w.T [K, N], the same bytes;
scale_inv [ceil(N/128), ceil(K/128)] fp32 and its transpose. Scales and codes as in tile.py, bit for bit as
fp8train.quant.reference.quantize with blocks of 128x128.
One program: one block; how it is scaled and stored is in tile.py.
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
    column_halves,
    load_strip,
    losses,
    magnitude_bits,
    scales,
    store_strip,
    store_transposed,
    strip,
)
from fp8train.kernels.tile_launch import (
    BLOCK,
    MAX_BITS,
    check_matrix,
    check_statistics,
    empty_codes,
    max_bits,
    tiles,
)

NUM_WARPS = 8
Copies = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # w, its scales, w.T, its scales


@triton.jit
def _quantize_weight_kernel(
    w_ptr,  # [N, K] fp32 or bf16
    qdata_ptr, scale_inv_ptr,  # [N, K] fp8, [ceil(N/128), ceil(K/128)] fp32
    qdata_t_ptr, scale_inv_t_ptr,  # [K, N] fp8, [ceil(K/128), ceil(N/128)] fp32
    stats_ptr,  # [5] int64
    N, K, stride_wn, stride_qn, stride_qk,
    MAX_BITS: tl.constexpr, POW2: tl.constexpr, STRAIGHT: tl.constexpr, TRANSPOSED: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    tiles_n, tiles_k = (N - 1) // 128 + 1, (K - 1) // 128 + 1  # N + 127 could overflow
    tile_n, tile_k = (tl.program_id(0) // tiles_k).to(tl.int64), (tl.program_id(0) % tiles_k).to(tl.int64)
    n, k = tile_n * 128, tile_k * 128
    w = (
        load_strip(w_ptr, stride_wn, 0, n, k, N, K, 4),
        load_strip(w_ptr, stride_wn, 1, n, k, N, K, 4),
        load_strip(w_ptr, stride_wn, 2, n, k, N, K, 4),
        load_strip(w_ptr, stride_wn, 3, n, k, N, K, 4),
    )
    low = tl.maximum(magnitude_bits(w[0]), magnitude_bits(w[1]))
    high = tl.maximum(magnitude_bits(w[2]), magnitude_bits(w[3]))
    scale_inv, encode_scale = scales(tl.max(tl.maximum(low, high)), MAX_BITS, POW2)
    if STRAIGHT:
        for i in tl.static_range(4):
            store_strip(encode_scale * w[i], qdata_ptr, stride_qn, i, n, k, N, K, 4)
        tl.store(scale_inv_ptr + tile_n * tiles_k + tile_k, scale_inv)
    if TRANSPOSED:
        FP8: tl.constexpr = qdata_t_ptr.dtype.element_ty
        words = column_halves(w[0], w[1], encode_scale, FP8) | column_halves(w[2], w[3], encode_scale, FP8) << 16
        store_transposed(words, qdata_t_ptr, stride_qk, n, k, K)
        tl.store(scale_inv_t_ptr + tile_k * tiles_n + tile_n, scale_inv)
    if STATS and STRAIGHT:
        amax_bits, counts = tl.zeros([32], tl.int32), tl.zeros([32], tl.int32)
        for i in range(4):  # read again: keeping both copies' numbers alive takes twice the registers
            _, _, inside = strip(i, n, k, N, K, 4)
            again = load_strip(w_ptr, stride_wn, i, n, k, N, K, 4)
            amax_of_rows, counts_of_rows = losses(again, encode_scale, inside, qdata_ptr.dtype.element_ty, MAX_BITS)
            amax_bits, counts = tl.maximum(amax_bits, amax_of_rows), counts + counts_of_rows
        add_statistics(stats_ptr, amax_bits, counts, n, k, N, K)


def _compile_cases() -> list[tuple]:
    """What tests compile: both dtypes of w and kinds of scale, E5M2, each of two launches, ragged sizes, counting."""
    sizes = ("N", "K", "stride_wn", "stride_qn", "stride_qk")
    pointers = dict.fromkeys(("qdata_ptr", "qdata_t_ptr"), "*fp8e4nv")
    pointers |= dict.fromkeys(("scale_inv_ptr", "scale_inv_t_ptr"), "*fp32")
    options, e4m3 = {"num_warps": NUM_WARPS}, MAX_BITS[torch.float8_e4m3fn]
    cases = []
    for dtype in ("fp32", "bf16"):
        for pow2 in (True, False):
            signature = {"w_ptr": f"*{dtype}"} | pointers | dict.fromkeys(sizes, "i32")
            constants = {"MAX_BITS": e4m3, "POW2": pow2, "STRAIGHT": True, "TRANSPOSED": True, "STATS": False}
            title = f"quantize_weight {dtype} {'pow2' if pow2 else 'fp32'}"
            cases.append((title, _quantize_weight_kernel, signature, constants | {"stats_ptr": None}, options))
    title, kernel, signature, constants, _ = cases[0]
    e5m2 = signature | {"qdata_ptr": "*fp8e5", "qdata_t_ptr": "*fp8e5"}
    counting = {key: value for key, value in constants.items() if key != "stats_ptr"} | {"STATS": True}
    cases.append((f"{title} e5m2", kernel, e5m2, constants | {"MAX_BITS": MAX_BITS[torch.float8_e5m2]}, options))
    cases.append((f"{title} straight", kernel, signature, constants | {"TRANSPOSED": False}, options))
    cases.append((f"{title} transposed", kernel, signature, constants | {"STRAIGHT": False}, options))
    cases.append((f"{title} ragged", kernel, signature, constants, options | {"odd": sizes[:3]}))
    cases.append((f"{title} stats", kernel, signature | {"stats_ptr": "*i64"}, counting, options))
    return cases


# (name, kernel, signature, constexprs, options); pointers and integers are multiples of 16 but those in options["odd"]
COMPILE_CASES = _compile_cases()


def quantize_weight(
    w: Tensor,
    *,
    fp8_dtype: torch.dtype,
    pow2: bool,
    out: Copies | None = None,
    stats: Tensor | None = None,
    two_launches: bool = False,
    straight: bool = True,
    transposed: bool = True,
) -> Copies:
    """Codes of w and of w.T with one scale per block of 128x128.

    Args:
        w: [N, K] fp32 or bf16, row-major with any leading stride, on a GPU; any N, K >= 0.
        fp8_dtype: torch.float8_e4m3fn or torch.float8_e5m2.
        pow2: round the scales up to powers of two.
        out: what an earlier call for the same shape returned, to be overwritten.
        stats: [5] int64, as in quantize.STATISTICS: amax is maximised into it, counts are added; None counts nothing.
        two_launches: write each copy by a kernel of its own, two reads: for a toolchain that miscompiles the pair.
        straight, transposed: whether the codes of w are wanted, and those of w.T.

    Returns:
        (qdata [N, K], scale_inv [ceil(N/128), ceil(K/128)], qdata of w.T [K, N], scale_inv of w.T), None for those that
        are not wanted. The leading strides of the codes are multiples of 16, and of 128 for w.T.

    Raises:
        ValueError: w, the format, out or stats do not fit.
    """
    name = "quantize_weight"
    check_matrix(name, "w", w, "[N, K]")
    check_statistics(name, stats, (5,))
    largest = max_bits(name, fp8_dtype)
    N, K = w.shape
    if out is None:
        out = (
            *(_empty(w, N, K, fp8_dtype, 16) if straight else (None, None)),
            *(_empty(w, K, N, fp8_dtype, BLOCK) if transposed else (None, None)),
        )
    else:
        reason = misfit(w, out, fp8_dtype, straight, transposed)
        if reason is not None:
            raise ValueError(f"{name}: {reason}. Pass what a call for this weight returned.")
    if N == 0 or K == 0:
        return out
    both = straight and transposed
    for copies in ((True, False), (False, True)) if two_launches and both else ((straight, transposed),):
        _launch(w, out, stats, (largest, pow2, *copies))
    return out


def _empty(w: Tensor, rows: int, cols: int, dtype: torch.dtype, multiple: int) -> tuple[Tensor, Tensor]:
    """Codes [rows, cols] and their scales."""
    scale_inv = torch.empty(-(-rows // BLOCK), -(-cols // BLOCK), dtype=torch.float32, device=w.device)
    return empty_codes(w, rows, cols, dtype, multiple), scale_inv


def _launch(w: Tensor, out: Copies, stats: Tensor | None, kinds: tuple[int, bool, bool, bool]) -> None:
    """kinds: the format's maximum, pow2, whether the straight copy is written, and the transposed one."""

    def rest() -> Rest:
        constants = dict(zip(("MAX_BITS", "POW2", "STRAIGHT", "TRANSPOSED"), kinds, strict=True))
        strides = [0 if codes is None else codes.stride(0) for codes in (out[0], out[2])]
        scalars = *w.shape, w.stride(0), *strides
        return tiles(*w.shape), scalars, constants | {"STATS": stats is not None}, {"num_warps": NUM_WARPS}

    launch(_quantize_weight_kernel, kinds, (w, *out, stats), rest)


def misfit(
    w: Tensor, out: Copies, fp8_dtype: torch.dtype, straight: bool = True, transposed: bool = True
) -> str | None:
    """Why the kernel cannot write to `out` for w, or None; which copies are wanted."""
    N, K = w.shape
    blocks = -(-N // BLOCK), -(-K // BLOCK)
    row = (((N, K), fp8_dtype), (blocks, torch.float32)) if straight else (None, None)
    col = (((K, N), fp8_dtype), (blocks[::-1], torch.float32)) if transposed else (None, None)
    wanted = *row, *col
    got = tuple(None if tensor is None else (tuple(tensor.shape), tensor.dtype) for tensor in out)
    if got != wanted:
        return f"out is {got}; needs {wanted}"
    there = [tensor for tensor in out if tensor is not None]
    if any(tensor.device != w.device for tensor in there):
        return f"out is on {[str(tensor.device) for tensor in there]}; needs {w.device}, as w"
    if min(N, K) == 0:
        return None
    qdata, scale_inv, qdata_t, scale_inv_t = out
    fits = qdata is None or scale_inv is None or (qdata.stride(1) == 1 and scale_inv.is_contiguous())
    if qdata_t is not None and scale_inv_t is not None:
        fits = fits and qdata_t.stride(1) == 1 and scale_inv_t.is_contiguous() and qdata_t.data_ptr() % 4 == 0
        fits = fits and qdata_t.stride(0) % 4 == 0 and qdata_t.stride(0) >= BLOCK * blocks[0]
        fits = fits and qdata_t.untyped_storage().nbytes() - qdata_t.storage_offset() >= K * qdata_t.stride(0)
    if not fits:
        return (
            f"out has strides {[tensor.stride() for tensor in there]}; needs row-major codes, contiguous scales, and "
            f"for the codes of w.T whole rows of {BLOCK * blocks[0]}"
        )
    storages = [tensor.untyped_storage().data_ptr() for tensor in (w, *there)]
    if len(set(storages)) < len(storages):
        return "out shares memory with w or within itself; needs tensors of their own"
    return None
