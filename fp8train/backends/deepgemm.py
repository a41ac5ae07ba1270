"""Backend `deepgemm`: DeepSeek's FP8 GEMMs for Hopper (package deep_gemm, 2.0 or newer) behind our quantisers."""

from __future__ import annotations

import torch
from torch import Tensor

from fp8train.backends import device_gemm
from fp8train.backends.device_gemm import MULTIPLE, dense_codes, round_up
from fp8train.backends.machine import BLOCKWISE_PAIRS, no_gpu
from fp8train.backends.vendor import VendorBackend, imported, required, rows_first
from fp8train.quant import reference
from fp8train.quant.qtensor import QTensor


class DeepGemmBackend(VendorBackend):
    """FP8 GEMMs of DeepGEMM."""

    name = "deepgemm"
    note = "DeepGEMM's FP8 GEMMs"

    def unavailable(self, device_type: str) -> str | None:
        """See Backend."""
        if reason := no_gpu(device_type, (9, 0)):
            return reason
        module = imported("deep_gemm")
        if isinstance(module, str):
            return f"{module}; build github.com/deepseek-ai/DeepGEMM"
        if not hasattr(module, "fp8_gemm_nt"):
            return "this deep_gemm has no fp8_gemm_nt; needs DeepGEMM 2.0 or newer"
        return None

    def scaled_mm(
        self, a: QTensor, b: QTensor, bias: Tensor | None, out: Tensor | None, accumulate: bool, out_dtype: torch.dtype
    ) -> Tensor:
        """See Backend."""
        (M, K), N = a.shape, b.shape[0]
        if (a.spec.block, b.spec.block) not in BLOCKWISE_PAIRS or 0 in (M, N, K):
            return device_gemm.decoded_mm(a, b, bias, out, accumulate, out_dtype)
        # its 1x128 by 128x128 writes BF16, its 1x128 by 1x128 adds to FP32
        direct = bias is None and not accumulate and (out_dtype if out is None else out.dtype) is torch.bfloat16
        square = direct and b.spec.block == (128, 128)
        rows, cols, depth = round_up(M, 4), round_up(N, MULTIPLE), round_up(K, MULTIPLE)
        left = (dense_codes(a, rows, depth), rows_first(a.scale_inv, rows))
        scale_b = b.scale_inv if b.spec.block == (1, 128) or square else b.scale_inv.repeat_interleave(128, 0)[:N]
        scale = scale_b.contiguous() if square else rows_first(scale_b, cols)
        right = (dense_codes(b, cols, depth), scale)
        product = torch.zeros(rows, cols, dtype=torch.bfloat16 if square else torch.float32, device=left[0].device)
        recipe = (1, 128, 128) if square else (1, 1, 128)
        multiply = required("deep_gemm").fp8_gemm_nt
        multiply(left, right, product, c=None if square else product, recipe=recipe, disable_ue8m0_cast=True)
        return reference.finish(product[:M, :N], bias, out, accumulate, out_dtype)
