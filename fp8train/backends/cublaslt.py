"""Backend `cublaslt`: NVIDIA's FP8 GEMMs, through torch; an alternative to our kernels, and their yardstick.

Tensorwise and rowwise on sm_89 and newer; blockwise on Hopper with CUDA 12.9 or newer and torch 2.10 or newer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8train.backends import device_gemm
from fp8train.backends.device_gemm import MULTIPLE, dense_codes, round_up
from fp8train.backends.machine import BLOCKWISE_PAIRS, WHOLE_PAIRS, major_minor, no_gpu, not_served
from fp8train.backends.vendor import VendorBackend, blocks_first, rows_first
from fp8train.quant import reference
from fp8train.quant.formats import LinearPrecision
from fp8train.quant.qtensor import QTensor

CUDA_WITH_BLOCKS = (12, 9)


class CublasltBackend(VendorBackend):
    """FP8 GEMMs of cuBLASLt."""

    name = "cublaslt"
    note = "cuBLASLt's FP8 GEMMs"

    def unavailable(self, device_type: str) -> str | None:
        """See Backend."""
        return no_gpu(device_type)

    def unsupported(self, precision: LinearPrecision) -> str | None:
        """See Backend."""
        refusal = _blockwise_refusal()
        reason = not_served(precision, WHOLE_PAIRS if refusal else WHOLE_PAIRS | BLOCKWISE_PAIRS, mixed=False)
        blocks = [gemm.left.block for gemm in precision.gemms.values() if gemm.left is not None]
        return f"{reason}; blockwise: {refusal}" if reason and refusal and (1, 128) in blocks else reason

    def scaled_mm(
        self, a: QTensor, b: QTensor, bias: Tensor | None, out: Tensor | None, accumulate: bool, out_dtype: torch.dtype
    ) -> Tensor:
        """See Backend."""
        pair = (a.spec.block, b.spec.block)
        if pair in WHOLE_PAIRS:
            return device_gemm.cublas_mm(a, b, bias, out, accumulate, out_dtype)
        if pair not in BLOCKWISE_PAIRS or 0 in (*a.shape, b.shape[0]):
            return device_gemm.decoded_mm(a, b, bias, out, accumulate, out_dtype)
        direct = bias is None and out is None
        product = blockwise_mm(a, b, out_dtype if direct else torch.float32)
        return product if direct else reference.finish(product, bias, out, accumulate, out_dtype)


def blockwise_mm(a: QTensor, b: QTensor, out_dtype: torch.dtype) -> Tensor:
    """a [M, K] @ b [N, K].T in blocks of 1x128 by 128x128 or 1x128.

    cuBLASLt reads scales in fixed layouts and sees no stride: 1x128 [M, K/128] with strides (1, M), M a multiple of
    4; 128x128 [K/128 padded to a multiple of 4, N/128] with K contiguous (pytorch/pytorch#166752).
    """
    (M, K), N = a.shape, b.shape[0]
    square = b.spec.block == (128, 128)
    rows, cols, depth = (round_up(size, MULTIPLE) for size in (M, N, K))
    kinds = F.ScalingType
    return F.scaled_mm(
        dense_codes(a, rows, depth),
        dense_codes(b, cols, depth).T,
        rows_first(a.scale_inv, rows),
        kinds.BlockWise1x128,
        blocks_first(b.scale_inv).T if square else rows_first(b.scale_inv, cols),
        kinds.BlockWise128x128 if square else kinds.BlockWise1x128,
        output_dtype=out_dtype,
    )[:M, :N]


def _blockwise_refusal() -> str | None:
    """Why cuBLASLt cannot multiply blockwise operands here, or None."""
    if major_minor(torch.version.cuda) < CUDA_WITH_BLOCKS:
        return f"torch {torch.__version__} is built for CUDA {torch.version.cuda}; needs 12.9 or newer"
    if not hasattr(F, "ScalingType"):
        return f"torch {torch.__version__} has no torch.nn.functional.scaled_mm; needs 2.10 or newer"
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
        return f"{torch.cuda.get_device_name()} is not a Hopper GPU (sm_90)"
    return None
