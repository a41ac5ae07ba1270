"""The definition of quantize, dequantize and scaled_mm, in plain torch: what every backend is tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8train.quant.formats import QuantSpec
from fp8train.quant.qtensor import QTensor
from fp8train.quant.scaling import amax_bits, scale_inv_from_amax


def quantize(x: Tensor, spec: QuantSpec, *, transpose: bool = False) -> QTensor:
    """Round x to FP8 with one scale per block.

    scale_inv = amax(block) / spec.format.max, rounded up to 2^k if spec.scale is pow2; qdata = cast_rne(x * (1 /
    scale_inv)), saturating.

    Args:
        x: [..., M, K] bf16 or fp32; any sizes >= 0 (the last block of a row or column may be short).
        spec: element format, block shape and kind of scale.
        transpose: quantize x.T, so that blocks run along M, as wgrad needs.

    Returns:
        QTensor: qdata [..., M, K] (transposed [..., K, M]), scale_inv [..., ceil(M/rows), ceil(K/cols)] fp32.
        A block that holds a NaN or an Inf has scale_inv NaN and NaN codes; an all-zero block has scale_inv 1.

    Raises:
        ValueError: x is not a matrix (or a stack of them) in bf16 or fp32.

    Source: DeepSeek-V3 (arXiv:2412.19437) 3.3; an all-zero block gets scale 1, as in TransformerEngine.
    """
    check_quantize_input(x)
    blocks, sizes = to_blocks((x.transpose(-2, -1) if transpose else x).to(torch.float32), spec)
    bits = amax_bits(blocks, dim=(-3, -1), keepdim=True)
    scale_inv = scale_inv_from_amax(bits, spec.format, spec.scale)
    encode_scale = torch.ones_like(scale_inv) / scale_inv
    codes = encode(blocks * encode_scale, spec)
    codes = torch.where(scale_inv.isnan(), torch.full_like(codes, spec.format.nan_code), codes)
    qdata = from_blocks(codes, sizes).contiguous().view(spec.format.dtype)
    return QTensor(qdata, scale_inv.squeeze(-1).squeeze(-2).contiguous(), spec)


def encode(x: Tensor, spec: QuantSpec) -> Tensor:
    """Codes of x as bytes: round to nearest, ties to even, saturating at +-max; NaN becomes the format's NaN code.

    Args:
        x: fp32, any shape, already divided by its scale.
    """
    limit = spec.format.max
    # clamp first: torch's cast makes NaN of an overflow in 2.11 and saturates in 2.13
    codes = x.clamp(-limit, limit).to(spec.format.dtype).view(torch.uint8)
    return torch.where(x.isnan(), torch.full_like(codes, spec.format.nan_code), codes)


def dequantize(q: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decode: qdata * scale_inv in FP32, saturated at the largest finite magnitude of `dtype`, then rounded to `dtype`.

    Args:
        q: codes and scales of a matrix [..., M, K].
        dtype: torch.float32 or torch.bfloat16.

    Returns:
        Tensor: [..., M, K]; NaN where the block's scale_inv or the code is NaN.
    """
    x = q.qdata.to(torch.float32) * expand_scale(q)
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


def expand_scale(q: QTensor) -> Tensor:
    """scale_inv repeated over its blocks, fp32 [..., M, K]."""
    rows, cols = q.shape[-2], q.shape[-1]
    block_rows, block_cols = q.spec.block_shape(rows, cols)
    scale = q.scale_inv.repeat_interleave(block_rows, dim=-2).repeat_interleave(block_cols, dim=-1)
    return scale[..., :rows, :cols]


def scaled_mm(
    qa: QTensor,
    qb: QTensor,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    accumulate: bool = False,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """a @ b.T from FP8 operands: per block of the contracted dimension, acc = fma(partial, RN(sa * sb), acc) in FP32.

    Args:
        qa: [M, K], K-major.
        qb: [N, K], K-major.
        bias: [N], added in FP32 before rounding to out_dtype.
        out: [M, N], written in place; its dtype replaces out_dtype.
        accumulate: add to `out` (FP32) instead of overwriting it.
        out_dtype: torch.bfloat16 or torch.float32.

    Returns:
        Tensor: [M, N]; `out` if given.

    Raises:
        ValueError: shapes, bias or out do not fit.
    """
    M, N, K = check_scaled_mm(qa, qb, bias, out, accumulate, out_dtype)
    left, right = qa.qdata.to(torch.float64), qb.qdata.to(torch.float64)
    scale_a, scale_b = expand_scale(qa), expand_scale(qb)
    acc = torch.zeros(M, N, dtype=torch.float32, device=left.device)
    for start, stop in contraction_blocks(qa, qb):
        # products of two codes and their sums over one block are exact in FP64, so partial is rounded once
        partial = (left[:, start:stop] @ right[:, start:stop].T).to(torch.float32)
        scale = scale_a[:, start, None] * scale_b[None, :, start]
        acc = fma(partial, scale, acc)
    return finish(acc, bias, out, accumulate, out_dtype)


def fma(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x * y + z of FP32 tensors, rounded once.

    The product is exact in FP64. Their sum is rounded to odd there: to the neighbour whose last bit is 1 where it is
    not exact, so that rounding it to FP32, of 29 bits less, is that of the exact sum.
    Source: Boldo and Melquiond, IEEE Trans. Comput. 57 (2008) 462.
    """
    product, z = x.to(torch.float64) * y.to(torch.float64), z.to(torch.float64)
    total = product + z
    part = total - product
    error = (product - (total - part)) + (z - part)  # of the sum, exactly (Knuth)
    inexact = total.isfinite() & (error != 0) & (total.view(torch.int64) & 1 == 0)
    beyond = torch.nextafter(total, torch.full_like(total, float("inf")).copysign(error))
    return torch.where(inexact, beyond, total).to(torch.float32)


def finish(acc: Tensor, bias: Tensor | None, out: Tensor | None, accumulate: bool, out_dtype: torch.dtype) -> Tensor:
    """Epilogue of a GEMM: add the bias in FP32, then store, accumulate, or round to out_dtype."""
    if bias is not None:
        acc = acc + bias.to(torch.float32)
    if out is None:
        return acc.to(out_dtype)
    return out.add_(acc) if accumulate else out.copy_(acc)


def contraction_blocks(qa: QTensor, qb: QTensor) -> list[tuple[int, int]]:
    """Spans of K over which both operands keep their scales, in order."""
    K = qa.shape[-1]
    steps = (qa.spec.block_shape(*qa.shape[-2:])[1], qb.spec.block_shape(*qb.shape[-2:])[1])
    edges = sorted({edge for step in steps for edge in range(0, K, step)} | {K})
    return list(zip(edges, edges[1:], strict=False))


def check_quantize_input(x: Tensor) -> None:
    """Raise ValueError unless x is a stack of matrices in bf16 or fp32."""
    if x.dim() < 2 or x.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(
            f"quantize: x is {list(x.shape)} {x.dtype}; needs a matrix [M, K] in torch.bfloat16 or torch.float32. "
            "Reshape or cast it first."
        )


def check_scaled_mm(
    qa: QTensor, qb: QTensor, bias: Tensor | None, out: Tensor | None, accumulate: bool, out_dtype: torch.dtype
) -> tuple[int, int, int]:
    """M, N, K of a GEMM, or a ValueError that says what does not fit."""
    if qa.qdata.dim() != 2 or qb.qdata.dim() != 2 or qa.shape[1] != qb.shape[1]:
        raise ValueError(
            f"scaled_mm: operands are {list(qa.shape)} and {list(qb.shape)}; needs [M, K] and [N, K] with the same K."
        )
    for q in (qa, qb):
        needed = q.spec.scale_shape(*q.shape)
        if tuple(q.scale_inv.shape) != needed:
            raise ValueError(
                f"scaled_mm: scale_inv is {list(q.scale_inv.shape)}; needs {list(needed)} for codes {list(q.shape)} in "
                f"blocks {q.block}."
            )
    M, K = qa.shape
    N = qb.shape[0]
    if out_dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"scaled_mm: out_dtype is {out_dtype}; needs torch.bfloat16 or torch.float32.")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"scaled_mm: bias is {list(bias.shape)}; needs [{N}].")
    if out is not None and (out.shape != (M, N) or out.dtype not in (torch.bfloat16, torch.float32)):
        raise ValueError(
            f"scaled_mm: out is {list(out.shape)} {out.dtype}; needs [{M}, {N}] in torch.bfloat16 or torch.float32."
        )
    if accumulate and (out is None or out.dtype is not torch.float32):
        raise ValueError(
            "scaled_mm: accumulate needs an out in torch.float32 to add to. Pass out=, or accumulate=False."
        )
    return M, N, K


def to_blocks(x: Tensor, spec: QuantSpec) -> tuple[Tensor, tuple[int, int]]:
    """x as [..., row_blocks, block_rows, col_blocks, block_cols], padded with zeros, and its true sizes."""
    rows, cols = x.shape[-2], x.shape[-1]
    block_rows, block_cols = spec.block_shape(rows, cols)
    row_blocks, col_blocks = spec.scale_shape(rows, cols)
    pad = (0, col_blocks * block_cols - cols, 0, row_blocks * block_rows - rows)
    return (F.pad(x, pad) if any(pad) else x).reshape(*x.shape[:-2], row_blocks, block_rows, col_blocks, block_cols), (
        rows,
        cols,
    )


def from_blocks(blocks: Tensor, sizes: tuple[int, int]) -> Tensor:
    """Undo to_blocks: [..., rows, cols] without the padding."""
    *lead, row_blocks, block_rows, col_blocks, block_cols = blocks.shape
    return blocks.reshape(*lead, row_blocks * block_rows, col_blocks * block_cols)[..., : sizes[0], : sizes[1]]
