"""GEMMs that torch itself does on the device that its operands are on, and their parts; shared by the backends."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8train.quant import reference
from fp8train.quant.qtensor import QTensor

# with scales in this range the smallest decoded value is 2^-50 * 2^-16 (E5M2), so that even a product of two, 2^-132
# ... 2^132, is off only where its terms are 2^-100 of the largest; outside it, codes are multiplied block by block
SCALE_RANGE = (2.0**-50, 2.0**50)
MULTIPLE = 16  # N and K of FP8 operands, for cuBLASLt and for TMA


def mm(
    a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor | None, accumulate: bool, out_dtype: torch.dtype
) -> Tensor:
    """a [M, K] @ b [N, K].T of two bf16 or two fp32 matrices, products summed in FP32; arguments as Backend.mm."""
    with torch.autocast(a.device.type, enabled=False):
        if bias is None and out is None and out_dtype is a.dtype:
            return a @ b.T
        return reference.finish(fp32_product(a, b), bias, out, accumulate, out_dtype)


def fp32_product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] @ b [N, K].T in FP32, without rounding the sums on the way."""
    if a.is_cuda and a.dtype is not torch.float32 and 0 not in (*a.shape, b.shape[0]):
        return torch.mm(a, b.T, out_dtype=torch.float32)
    return a.to(torch.float32) @ b.to(torch.float32).T  # torch has no CPU kernel for out_dtype


def decoded_mm(
    a: QTensor, b: QTensor, bias: Tensor | None, out: Tensor | None, accumulate: bool, out_dtype: torch.dtype
) -> Tensor:
    """As Backend.scaled_mm, by matrix units for BF16: an FP8 number is exactly a BF16 number.

    With pow2 scales so is the decoded operand, and one product does; with fp32 scales there is one per block of K,
    promoted as the FP8 GEMMs promote theirs.
    """
    with torch.autocast(a.qdata.device.type, enabled=False):
        if exact_in_bf16(a) and exact_in_bf16(b):
            left, right = reference.dequantize(a, torch.bfloat16), reference.dequantize(b, torch.bfloat16)
            return mm(left, right, bias, out, accumulate, out_dtype)
        left, right = a.qdata.to(torch.bfloat16), b.qdata.to(torch.bfloat16)
        return reference.finish(sum_of_blocks(a, b, left, right, fp32_product), bias, out, accumulate, out_dtype)


def exact_in_bf16(q: QTensor) -> bool:
    """Whether every decoded value is a BF16 number far from under- and overflow; false if a scale is NaN or unknown."""
    if q.spec.scale != "pow2":
        return False
    if q.scale_inv.numel() == 0:
        return True
    if q.scale_inv.is_cuda and torch.cuda.is_current_stream_capturing():
        return False  # a captured graph cannot wait for the answer
    low, high = torch.aminmax(q.scale_inv)
    return bool((low >= SCALE_RANGE[0]) & (high <= SCALE_RANGE[1]))


def sum_of_blocks(
    a: QTensor, b: QTensor, left: Tensor, right: Tensor, product: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """FP32 [M, N]: per block of K a product of codes, scaled and added in FP32.

    Args:
        a, b: [M, K] and [N, K], for their scales.
        left, right: values of their codes, in a dtype that product takes.
        product: of [M, k] and [N, k], in FP32.
    """
    acc = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float32, device=left.device)
    step_a, step_b = a.spec.block_shape(*a.shape)[1], b.spec.block_shape(*b.shape)[1]
    scale_a, scale_b = _scale_of_rows(a), _scale_of_rows(b)
    for start, stop in reference.contraction_blocks(a, b):
        partial = product(left[:, start:stop], right[:, start:stop])
        acc.addcmul_(partial, scale_a[:, start // step_a, None] * scale_b[None, :, start // step_b])
    return acc


def cublas_mm(
    a: QTensor, b: QTensor, bias: Tensor | None, out: Tensor | None, accumulate: bool, out_dtype: torch.dtype
) -> Tensor:
    """As Backend.scaled_mm for two tensorwise or two rowwise operands, by cuBLASLt through torch.

    FP32 results are the product of the codes, scaled afterwards: cuBLASLt's rowwise kernels write BF16 only.
    """
    (M, K), N, scale = a.shape, b.shape[0], (a.scale_inv, b.scale_inv)
    if 0 in (M, N, K):
        return reference.finish(torch.zeros(M, N, device=a.qdata.device), bias, out, accumulate, out_dtype)
    depth = round_up(K, MULTIPLE)
    left, right = dense_codes(a, M, depth), dense_codes(b, round_up(N, MULTIPLE), depth)
    if bias is None and out is None and out_dtype is torch.bfloat16:
        if a.spec.block == "row":
            scale = (scale[0], F.pad(scale[1], (0, 0, 0, right.shape[0] - N), value=1.0).T.contiguous())
        return torch._scaled_mm(left, right.T, *scale, out_dtype=out_dtype, use_fast_accum=False)[:, :N]
    one = torch.ones((), device=left.device)
    codes = torch._scaled_mm(left, right.T, one, one, out_dtype=torch.float32, use_fast_accum=False)[:, :N]
    return reference.finish(codes * (scale[0] * scale[1].T), bias, out, accumulate, out_dtype)


def dense_codes(q: QTensor, rows: int, cols: int) -> Tensor:
    """Codes as a contiguous matrix [rows, cols], zero beyond the operand; a copy if needed."""
    if q.shape == (rows, cols):
        return q.qdata.contiguous()
    codes = F.pad(q.qdata.view(torch.uint8), (0, cols - q.shape[1], 0, rows - q.shape[0]))
    return codes.view(q.qdata.dtype)


def round_up(size: int, multiple: int) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple


def _scale_of_rows(q: QTensor) -> Tensor:
    """scale_inv with one row per row of the matrix, [rows, ceil(cols/block_cols)]."""
    return q.scale_inv.repeat_interleave(q.spec.block_shape(*q.shape)[0], dim=0)[: q.shape[0]]
