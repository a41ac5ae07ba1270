"""What a backend is: four plain functions and a probe."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fp8train.quant.formats import LinearPrecision, QuantSpec
from fp8train.quant.qtensor import QTensor


class Backend(Protocol):
    """Executes quantisers and GEMMs on plain tensors. Holds no state of the model; autograd is nn/'s business."""

    name: str
    note: str  # how it computes, for the log and for `explain`

    def unavailable(self, device_type: str) -> str | None:
        """Why this backend cannot run on a device of that type on this machine, or None."""

    def unsupported(self, precision: LinearPrecision) -> str | None:
        """Why it cannot serve a precision, or None."""

    def quantize(self, x: Tensor, spec: QuantSpec, transpose: bool) -> QTensor:
        """As quant.reference.quantize for a matrix x, bit for bit."""

    def quantize_dual(self, x: Tensor, row: QuantSpec, col: QuantSpec) -> tuple[QTensor, QTensor]:
        """(quantize(x, row), quantize(x, col, transpose=True)) from one read of x where the specifications allow."""

    def quantize_square(self, x: Tensor, spec: QuantSpec) -> tuple[QTensor, QTensor]:
        """(q, q.transpose()) for a transposable spec, from one read of x."""

    def dequantize(self, q: QTensor, dtype: torch.dtype) -> Tensor:
        """As quant.reference.dequantize."""

    def scaled_mm(
        self, a: QTensor, b: QTensor, bias: Tensor | None, out: Tensor | None, accumulate: bool, out_dtype: torch.dtype
    ) -> Tensor:
        """As quant.reference.scaled_mm, up to the order of FP32 sums."""

    def mm(
        self, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor | None, accumulate: bool, out_dtype: torch.dtype
    ) -> Tensor:
        """a @ b.T of high-precision operands (both bf16 or both fp32), products summed in FP32."""
