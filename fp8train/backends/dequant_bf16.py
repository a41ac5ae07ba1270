"""Backend `dequant_bf16`: FP8's numbers without FP8's speed, for GPUs that have no FP8 units, and for any device.

Operands are rounded to FP8 as the recipe says, decoded, and multiplied in BF16 with FP32 sums, which is exact for FP8
codes: a recipe trains on an A100 as on an H100, up to the order of the sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8train.backends import device_gemm
from fp8train.backends.interface import Backend
from fp8train.quant import reference
from fp8train.quant.formats import QuantSpec
from fp8train.quant.qtensor import QTensor


class DequantBackend(Backend):
    """Quantises by the definition, multiplies in BF16."""

    name = "dequant_bf16"
    note = "FP8 numbers, decoded and multiplied in BF16: nothing is faster than BF16"
    emulates = True

    def unavailable(self, device_type: str) -> str | None:
        """See Backend."""
        if device_type == "cuda" and not torch.cuda.is_available():
            return f"torch {torch.__version__} finds no CUDA GPU"
        return None

    def quantize(self, x: Tensor, spec: QuantSpec, transpose: bool) -> QTensor:
        """See Backend."""
        return reference.quantize(x, spec, transpose=transpose)

    def scaled_mm(
        self, a: QTensor, b: QTensor, bias: Tensor | None, out: Tensor | None, accumulate: bool, out_dtype: torch.dtype
    ) -> Tensor:
        """See Backend."""
        return device_gemm.decoded_mm(a, b, bias, out, accumulate, out_dtype)
