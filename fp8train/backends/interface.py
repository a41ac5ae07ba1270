"""What a backend is: quantisers, GEMMs, what feeds a linear, and a probe."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fp8train.quant.formats import LinearPrecision, QuantSpec
from fp8train.quant.qtensor import QTensor

Copies = tuple[QTensor, QTensor | None]  # row copy and, where it is wanted, column copy
Square = tuple[QTensor, QTensor | None]  # of a weight, and where it is wanted of its transpose


class Backend(Protocol):
    """Executes quantisers and GEMMs on plain tensors. Holds no state of the model; autograd is nn/'s business."""

    name: str
    note: str  # how it computes, for the log and for `explain`
    decoded: tuple[str, ...] = ()  # GEMMs for which none of its kernels may: BF16 units multiplied decoded numbers
    emulates: bool = False  # FP8 numbers by wider instructions: its losses carry over to a GPU, its speed does not

    @property
    def refused(self) -> list[str]:
        """Kernels that admission refused so far, each with the reason: others took their place."""

    def unavailable(self, device_type: str) -> str | None:
        """Why this backend cannot run on a device of that type on this machine, or None."""

    def unsupported(self, precision: LinearPrecision) -> str | None:
        """Why it cannot serve a precision, or None."""

    def quantize(self, x: Tensor, spec: QuantSpec, transpose: bool) -> QTensor:
        """As quant.reference.quantize for a matrix x, bit for bit; `te` but for blocks with NaN, Inf or subnormals."""

    def quantize_dual(self, x: Tensor, row: QuantSpec, col: QuantSpec) -> tuple[QTensor, QTensor]:
        """(quantize(x, row), quantize(x, col, transpose=True)) from one read of x where the specifications allow."""

    def quantize_square(self, x: Tensor, spec: QuantSpec, out: Square | None = None, turned: bool = True) -> Square:
        """(q, q.transpose(), or None unless `turned`) for a transposable spec, from one read of x.

        out: what an earlier call returned; it may be overwritten and returned, or left alone."""

    def transpose_codes(self, q: QTensor) -> QTensor:
        """q.transpose(), in the strides that quantize_square gives it."""

    def counters(self, x: Tensor, spec: QuantSpec) -> Tensor | None:
        """What its quantiser counts while it rounds all of x: int64 [5], bits of the finite amax, elements flushed to
        zero, saturated, not finite, and all elements; None from one that does not count."""

    def dequantize(self, q: QTensor, dtype: torch.dtype) -> Tensor:
        """As quant.reference.dequantize."""

    def scaled_mm(
        self, a: QTensor, b: QTensor, bias: Tensor | None, out: Tensor | None, accumulate: bool, out_dtype: torch.dtype
    ) -> Tensor:
        """As quant.reference.scaled_mm, up to the order of FP32 sums; bias is contiguous."""

    def mm(
        self, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor | None, accumulate: bool, out_dtype: torch.dtype
    ) -> Tensor:
        """a @ b.T of high-precision operands (both bf16 or both fp32), products summed in FP32."""

    def fuses(self, row: QuantSpec, col: QuantSpec | None) -> bool:
        """Whether the `*_quantize` below are one kernel each, which never writes what it quantises."""

    def rstd(self, x: Tensor, eps: float) -> Tensor:
        """1 / sqrt(mean(x^2) + eps) of each row, [M] fp32: producers.row_rstd, up to the order of sums."""

    def add_rstd(self, x: Tensor, branch: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(total [M, K] = x + branch in x's dtype, rstd of total), from one read of both."""

    def rms_norm(self, x: Tensor, weight: Tensor, rstd: Tensor, dtype: torch.dtype) -> Tensor:
        """y [M, K] = x * rstd * weight in FP32, rounded to dtype."""

    def rms_norm_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dtotal: Tensor | None, branch: torch.dtype | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(dx [M, K] in x's dtype, dweight [K], dx in `branch`, if any) of rms_norm, with rstd that of x.

        producers.norm_gradients, up to the order of sums; dtotal [M, K] in x's dtype is added to dx.
        """

    def has_rope(self) -> bool:
        """Whether `rope` is one kernel."""

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, inverse: bool) -> Tensor:
        """producers.rotated, bit for bit."""

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """h = silu(gate) * up [M, K]; silu(gate) and h are rounded to the dtype of gate."""

    def swiglu_backward(self, dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """dgate = dh * up * silu'(gate), dup = dh * silu(gate); they, dh * up and silu(gate) are rounded like gate."""

    def rmsnorm_quantize(
        self, x: Tensor, weight: Tensor, rstd: Tensor, dtype: torch.dtype, row: QuantSpec, col: QuantSpec | None
    ) -> Copies:
        """Copies of rms_norm's y, bit for bit."""

    def swiglu_quantize(self, gate: Tensor, up: Tensor, row: QuantSpec, col: QuantSpec | None) -> Copies:
        """Copies of swiglu's h, bit for bit."""

    def swiglu_backward_quantize(
        self, dh: Tensor, gate: Tensor, up: Tensor, row: QuantSpec, col: QuantSpec | None, h: QuantSpec | None
    ) -> tuple[Copies, Copies, QTensor | None]:
        """Copies of swiglu_backward's dgate and of its dup, and if `h` is given swiglu's h.T in it, bit for bit."""
