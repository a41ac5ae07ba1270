"""Transpose the FP8 codes of a matrix in blocks of 128x128: dgrad's w.T made from fprop's w, instead of kept beside it.

qdata [N, K] fp8, row-major, any leading stride, scale_inv [ceil(N/128), ceil(K/128)] fp32 contiguous -> qdata of x.T
[K, N], the same bytes, in rows padded to 128 with zeros, and its scale_inv [ceil(K/128), ceil(N/128)]; those that
quantize_weight.py writes beside qdata.
One program: one block; four rows of a column are a word, as in tile.py. Measured: kernels/README.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8train.kernels.launch import SIZE_LIMIT, Rest, launch
from fp8train.kernels.tile import store_transposed, strip
from fp8train.kernels.tile_launch import BLOCK, empty_codes, tiles

NUM_WARPS = 8
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@triton.jit
def _load_codes(qdata_ptr, stride_qn, i, n, k, N, K):
    """Strip i of the codes of the block at (n, k), int32, zero outside."""
    rows, cols, inside = strip(i, n, k, N, K, 4)
    qdata_ptr = (qdata_ptr + n * stride_qn + k).to(tl.pointer_type(tl.uint8), bitcast=True)
    offsets = rows.to(tl.int64)[:, None] * stride_qn + cols[None, :]
    return tl.load(qdata_ptr + offsets, mask=inside, other=0).to(tl.int32)


@triton.jit
def _transpose_codes_kernel(
    qdata_ptr, scale_inv_ptr,  # [N, K] fp8, [ceil(N/128), ceil(K/128)] fp32
    qdata_t_ptr, scale_inv_t_ptr,  # [K, N] fp8, [ceil(K/128), ceil(N/128)] fp32
    N, K, stride_qn, stride_qk,
):  # fmt: skip
    tiles_n, tiles_k = (N - 1) // 128 + 1, (K - 1) // 128 + 1  # N + 127 could overflow
    tile_n, tile_k = (tl.program_id(0) // tiles_k).to(tl.int64), (tl.program_id(0) % tiles_k).to(tl.int64)
    n, k = tile_n * 128, tile_k * 128
    low = _load_codes(qdata_ptr, stride_qn, 0, n, k, N, K) | _load_codes(qdata_ptr, stride_qn, 1, n, k, N, K) << 8
    high = _load_codes(qdata_ptr, stride_qn, 2, n, k, N, K) | _load_codes(qdata_ptr, stride_qn, 3, n, k, N, K) << 8
    store_transposed(low | high << 16, qdata_t_ptr, stride_qk, n, k, K)
    tl.store(scale_inv_t_ptr + tile_k * tiles_n + tile_n, tl.load(scale_inv_ptr + tile_n * tiles_k + tile_k))


def _compile_cases() -> list[tuple]:
    """What tests compile: aligned sizes, and ragged ones."""
    sizes = ("N", "K", "stride_qn", "stride_qk")
    signature = dict.fromkeys(("qdata_ptr", "qdata_t_ptr"), "*fp8e4nv")
    signature |= dict.fromkeys(("scale_inv_ptr", "scale_inv_t_ptr"), "*fp32") | dict.fromkeys(sizes, "i32")
    options = {"num_warps": NUM_WARPS}
    return [
        ("transpose_codes aligned", _transpose_codes_kernel, signature, {}, options),
        ("transpose_codes ragged", _transpose_codes_kernel, signature, {}, options | {"odd": sizes[:3]}),
    ]


# (name, kernel, signature, constexprs, options); pointers and integers are multiples of 16 but those in options["odd"]
COMPILE_CASES = _compile_cases()


def transpose_codes(qdata: Tensor, scale_inv: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of x.T and their scales from those of x.

    Args:
        qdata: [N, K] torch.float8_e4m3fn or torch.float8_e5m2, row-major, any leading stride; any N, K >= 0.
        scale_inv: [ceil(N/128), ceil(K/128)] fp32, contiguous.

    Returns:
        (qdata of x.T [K, N], leading stride a multiple of 128; scale_inv of x.T, contiguous).

    Raises:
        ValueError: dtype, shape or layout of an argument.
    """
    _check(qdata, scale_inv)
    N, K = qdata.shape
    qdata_t = empty_codes(qdata, K, N, qdata.dtype, BLOCK)
    scale_inv_t = torch.empty(scale_inv.shape[::-1], dtype=torch.float32, device=qdata.device)

    def rest() -> Rest:
        return tiles(N, K), (N, K, qdata.stride(0), qdata_t.stride(0)), {}, {"num_warps": NUM_WARPS}

    if N and K:
        launch(_transpose_codes_kernel, (), (qdata, scale_inv, qdata_t, scale_inv_t), rest)
    return qdata_t, scale_inv_t


def _check(qdata: Tensor, scale_inv: Tensor) -> None:
    name = "transpose_codes"
    if qdata.dim() != 2 or qdata.dtype not in FP8:
        wanted = "[N, K] in torch.float8_e4m3fn or torch.float8_e5m2"
        raise ValueError(f"{name}: qdata is {list(qdata.shape)} {qdata.dtype}; needs {wanted}. Quantise it.")
    if qdata.shape[1] > 1 and qdata.shape[0] > 0 and qdata.stride(1) != 1:
        raise ValueError(f"{name}: qdata has strides {qdata.stride()}; needs (any, 1). Pass qdata.contiguous().")
    if max(qdata.shape) >= SIZE_LIMIT:
        raise ValueError(f"{name}: qdata is {list(qdata.shape)}; needs dimensions below 2^31 - 4096. Split it.")
    blocks = [-(-size // BLOCK) for size in qdata.shape]
    if list(scale_inv.shape) != blocks or scale_inv.dtype is not torch.float32 or not scale_inv.is_contiguous():
        got = f"{list(scale_inv.shape)} {scale_inv.dtype}, strides {scale_inv.stride()}"
        raise ValueError(f"{name}: scale_inv is {got}; needs {blocks} torch.float32, contiguous. Pass qdata's.")
