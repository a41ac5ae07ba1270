"""Backend `reference`: runs the definition itself, on any device. Slow; for tests and for doubt."""

from __future__ import annotations

import torch
from torch import Tensor

from fp8train.backends.interface import Backend
from fp8train.quant import reference
from fp8train.quant.formats import QuantSpec
from fp8train.quant.qtensor import QTensor


class ReferenceBackend(Backend):
    """The definition of quant/reference.py as a backend."""

    name = "reference"
    note = "the definition, FP64 partial sums; slow"
    emulates = True

    def unavailable(self, device_type: str) -> str | None:
        """None: it runs everywhere."""
        return None

    def quantize(self, x: Tensor, spec: QuantSpec, transpose: bool) -> QTensor:
        """See Backend."""
        return reference.quantize(x, spec, transpose=transpose)

    def scaled_mm(
        self, a: QTensor, b: QTensor, bias: Tensor | None, out: Tensor | None, accumulate: bool, out_dtype: torch.dtype
    ) -> Tensor:
        """See Backend."""
        return reference.scaled_mm(a, b, bias=bias, out=out, accumulate=accumulate, out_dtype=out_dtype)

    def mm(
        self, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor | None, accumulate: bool, out_dtype: torch.dtype
    ) -> Tensor:
        """See Backend; here the product is formed in FP64 and rounded to FP32 once."""
        acc = (a.to(torch.float64) @ b.to(torch.float64).T).to(torch.float32)
        return reference.finish(acc, bias, out, accumulate, out_dtype)
