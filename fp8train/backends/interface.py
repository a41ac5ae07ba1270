"""What a backend is: quantisers, GEMMs, what feeds a linear, and a probe; and what it does where it has no kernel.

What feeds a linear has the arithmetic of the plain modules, bit for bit on the CPU: products in FP32, silu(gate) and
the gradients rounded to the dtype of gate. It is computed, written, and read again by the backend's own quantiser; a
backend whose kernels quantise what they compute says so with `fuses`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8train.backends import device_gemm
from fp8train.backends.producers import norm_gradients, rotated, row_rstd
from fp8train.quant import reference
from fp8train.quant.formats import LinearPrecision, QuantSpec
from fp8train.quant.qtensor import QTensor

Copies = tuple[QTensor, QTensor | None]  # row copy and, where it is wanted, column copy
Square = tuple[QTensor, QTensor | None]  # of a weight, and where it is wanted of its transpose


class Backend(ABC):
    """Executes quantisers and GEMMs on plain tensors. Holds no state of the model; autograd is nn/'s business."""

    name: str
    note: str  # how it computes, for the log and for `explain`
    decoded: tuple[str, ...] = ()  # GEMMs for which none of its kernels may: BF16 units multiplied decoded numbers
    on_gpus: bool = True  # whether it can compute there
    emulates: bool = False  # FP8 numbers by wider instructions: its losses carry over to a GPU, its speed does not

    @property
    def pads_codes(self) -> bool:
        """Whether its blockwise quantisers return the padded layout of kernels/quantize.py."""
        return False

    @property
    def refused(self) -> list[str]:
        """Kernels that admission refused so far, each with the reason: others took their place."""
        return []

    @abstractmethod
    def unavailable(self, device_type: str) -> str | None:
        """Why this backend cannot run on a device of that type on this machine, or None."""

    def unsupported(self, precision: LinearPrecision) -> str | None:
        """Why it cannot serve a precision, or None."""
        return None

    def expect(self, precisions: Iterable[LinearPrecision]) -> None:
        """Be told what a model will ask for: what must be checked before it may run is checked together."""
        return None

    @abstractmethod
    def quantize(self, x: Tensor, spec: QuantSpec, transpose: bool) -> QTensor:
        """As quant.reference.quantize for a matrix x, bit for bit; `te` but for blocks with NaN, Inf or subnormals."""

    def quantize_dual(self, x: Tensor, row: QuantSpec, col: QuantSpec) -> tuple[QTensor, QTensor]:
        """(quantize(x, row), quantize(x, col, transpose=True)) from one read of x where the specifications allow."""
        return self.quantize(x, row, False), self.quantize(x, col, True)

    def quantize_square(self, x: Tensor, spec: QuantSpec, out: Square | None = None, turned: bool = True) -> Square:
        """(q, q.transpose(), or None unless `turned`) for a transposable spec, from one read of x.

        out: what an earlier call returned; it may be overwritten and returned, or left alone."""
        made = self.quantize(x, spec, False)
        return made, made.transpose() if turned else None

    def transpose_codes(self, q: QTensor) -> QTensor:
        """q.transpose(), in the strides that quantize_square gives it."""
        return q.transpose()

    def counters(self, x: Tensor, spec: QuantSpec) -> Tensor | None:
        """What its quantiser counts while it rounds all of x: int64 [5], bits of the finite amax, elements flushed to
        zero, saturated, not finite, and all elements; None from one that does not count."""
        return None

    def dequantize(self, q: QTensor, dtype: torch.dtype) -> Tensor:
        """As quant.reference.dequantize."""
        return reference.dequantize(q, dtype)

    @abstractmethod
    def scaled_mm(
        self, a: QTensor, b: QTensor, bias: Tensor | None, out: Tensor | None, accumulate: bool, out_dtype: torch.dtype
    ) -> Tensor:
        """As quant.reference.scaled_mm, up to the order of FP32 sums; bias is contiguous."""

    def mm(
        self, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor | None, accumulate: bool, out_dtype: torch.dtype
    ) -> Tensor:
        """a @ b.T of high-precision operands (both bf16 or both fp32), products summed in FP32."""
        return device_gemm.mm(a, b, bias, out, accumulate, out_dtype)

    def fuses(self, row: QuantSpec, col: QuantSpec | None) -> bool:
        """Whether the `*_quantize` below are one kernel each, which never writes what it quantises."""
        return False

    def rstd(self, x: Tensor, eps: float) -> Tensor:
        """1 / sqrt(mean(x^2) + eps) of each row, [M] fp32: producers.row_rstd, up to the order of sums."""
        return row_rstd(x, eps)

    def add_rstd(self, x: Tensor, branch: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(total [M, K] = x + branch in x's dtype, rstd of total), from one read of both."""
        total = (x + branch).to(x.dtype)
        return total, row_rstd(total, eps)

    def rms_norm(self, x: Tensor, weight: Tensor, rstd: Tensor, dtype: torch.dtype) -> Tensor:
        """y [M, K] = x * rstd * weight in FP32, rounded to dtype."""
        return (x.float() * rstd[:, None] * weight).to(dtype)

    def rms_norm_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dtotal: Tensor | None, branch: torch.dtype | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(dx [M, K] in x's dtype, dweight [K], dx in `branch`, if any) of rms_norm, with rstd that of x.

        producers.norm_gradients, up to the order of sums; dtotal [M, K] in x's dtype is added to dx.
        """
        if dy.device.type != "cuda":
            dx, dweight = norm_gradients(dy, x, weight, rstd)
        else:  # torch's own kernel of the same formula
            wide = (dy.float(), x.float(), list(weight.shape), rstd.unsqueeze(-1), weight)
            dx, dweight = torch.ops.aten._fused_rms_norm_backward(*wide, [True, True])
        dx = dx.to(x.dtype) if dtotal is None else dx.to(x.dtype) + dtotal
        return dx, dweight, None if branch is None else dx.to(branch)

    def has_rope(self) -> bool:
        """Whether `rope` is one kernel."""
        return False

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, inverse: bool) -> Tensor:
        """producers.rotated, bit for bit."""
        return rotated(x, cos, sin, dtype, inverse)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """h = silu(gate) * up [M, K]; silu(gate) and h are rounded to the dtype of gate."""
        return F.silu(gate) * up

    def swiglu_backward(self, dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """dgate = dh * up * silu'(gate), dup = dh * silu(gate); they, dh * up and silu(gate) are rounded like gate."""
        return torch.ops.aten.silu_backward(dh * up, gate), dh * F.silu(gate)

    def rmsnorm_quantize(
        self, x: Tensor, weight: Tensor, rstd: Tensor, dtype: torch.dtype, row: QuantSpec, col: QuantSpec | None
    ) -> Copies:
        """Copies of rms_norm's y, bit for bit."""
        return self._copies(self.rms_norm(x, weight, rstd, dtype), row, col)

    def swiglu_quantize(self, gate: Tensor, up: Tensor, row: QuantSpec, col: QuantSpec | None) -> Copies:
        """Copies of swiglu's h, bit for bit."""
        return self._copies(self.swiglu(gate, up), row, col)

    def swiglu_backward_quantize(
        self, dh: Tensor, gate: Tensor, up: Tensor, row: QuantSpec, col: QuantSpec | None, h: QuantSpec | None
    ) -> tuple[Copies, Copies, QTensor | None]:
        """Copies of swiglu_backward's dgate and of its dup, and if `h` is given swiglu's h.T in it, bit for bit."""
        dgate, dup = self.swiglu_backward(dh, gate, up)
        h_t = None if h is None else self.quantize(self.swiglu(gate, up), h, True)
        return self._copies(dgate, row, col), self._copies(dup, row, col), h_t

    def _copies(self, x: Tensor, row: QuantSpec, col: QuantSpec | None) -> Copies:
        return (self.quantize(x, row, False), None) if col is None else self.quantize_dual(x, row, col)
