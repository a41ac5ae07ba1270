"""GEMM operands: FP8 codes with scales, or a high-precision matrix, as plain tensors that torch.compile can trace.

Everything here calls the operators of backends/ops.py, so that eager and compiled runs execute the same code; the two
that every FP8 linear calls most go to the implementation without a detour where nothing watches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fp8train.backends.ops import OPS, quantize_dual, scaled_mm, unwatched
from fp8train.quant.formats import QuantSpec


class Operand(NamedTuple):
    """A K-major matrix [rows, cols] of one GEMM: FP8 if spec is set, otherwise `data` itself in bf16 or fp32.

    Operators take its fields in this order.
    """

    data: Tensor
    scale_inv: Tensor | None = None
    spec: QuantSpec | None = None

    def tensors(self) -> tuple[Tensor, Tensor | None]:
        """What autograd saves."""
        return self.data, self.scale_inv


class LaterOperand(NamedTuple):
    """An operand that backward makes when it needs it: make(*kept, after).

    make: `after` is a tensor of backward, if any.
    kept: what autograd saves for it in forward.
    """

    make: Callable[[Tensor | None, Tensor | None, Tensor | None], Operand]
    kept: tuple[Tensor | None, Tensor | None] = (None, None)

    def tensors(self) -> tuple[Tensor | None, Tensor | None]:
        """What autograd saves."""
        return self.kept

    def now(self) -> Operand:
        """The operand, made outside of backward."""
        return self.make(*self.kept, None)


_TRANSFORMS = torch._C._are_functorch_transforms_active


def refuse_transforms() -> None:
    """Raise RuntimeError inside torch.func.grad, vmap and their like, which cannot look into the kernels."""
    if _TRANSFORMS():
        raise RuntimeError(
            "Float8Linear: a transform of torch.func (grad, vmap, jvp ...) is active; needs autograd, .backward() or "
            "torch.autograd.grad. Keep nn.Linear where such transforms are wanted."
        )


def as_matrix(x: Tensor) -> Tensor:
    """x [..., K] as [M, K]; any size may be 0."""
    if x.dim() == 2:
        return x
    return x.flatten(0, -2) if x.dim() > 2 else x.unsqueeze(0)


def quantized(
    x: Tensor, spec: QuantSpec | None, high: torch.dtype, transpose: bool, backend: str, noise: float = 0.0
) -> Operand:
    """x [M, K] (or x.T if `transpose`) as an operand: rounded to `spec`, or where that is None `high`, with noise."""
    if spec is None:
        cast = OPS.noisy(x, noise, high) if noise else x.to(high)
        return Operand(cast.t() if transpose else cast)
    data, scale_inv = OPS.quantize(x, spec, transpose, backend)
    return Operand(data, scale_inv, spec)


def quantized_both(
    x: Tensor, row: QuantSpec | None, col: QuantSpec | None, high: torch.dtype, backend: str, noise: float = 0.0
) -> tuple[Operand, Operand]:
    """Row operand of x [M, K] and column operand of x.T [K, M], from one read of x where the two are of a kind."""
    if row is None and col is None:
        cast = quantized(x, None, high, False, backend, noise)
        return cast, Operand(cast.data.t())
    if row is None or col is None:
        return quantized(x, row, high, False, backend, noise), quantized(x, col, high, True, backend, noise)
    q, scale, qt, scale_t = (quantize_dual if unwatched(x) else OPS.quantize_dual)(x, row, col, backend)
    return Operand(q, scale, row), Operand(qt, scale_t, col)


def requantized(row: Operand, col: QuantSpec, backend: str) -> Operand:
    """The column operand made from the FP8 row copy: exact with pow2 scales, one more rounding with fp32 ones."""
    data, scale_inv = OPS.requantize(row.data, row.scale_inv, row.spec, col, backend)
    return Operand(data, scale_inv, col)


def transposed(
    data: Tensor | None, scale_inv: Tensor | None, after: Tensor | None, *, spec: QuantSpec, backend: str
) -> Operand:
    """The operand x.T [K, N] made from the codes of x [N, K]; see LaterOperand."""
    data_t, scale_inv_t = OPS.transpose_codes(data, scale_inv, spec, after, backend)
    return Operand(data_t, scale_inv_t, spec)


def gemm(
    left: Operand,
    right: Operand,
    *,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    high: torch.dtype,
    backend: str,
    site: int,
    name: str,
) -> Tensor:
    """left [M, K] @ right [N, K].T in FP8 if both operands are, otherwise in `high` with FP32 sums."""
    if left.spec is not None and right.spec is not None:
        run: Callable[..., Tensor] = scaled_mm if unwatched(left.data) else OPS.scaled_mm
        return run(*left, *right, bias, out_dtype, backend, site, name)
    return OPS.mm(widened(left, high, backend), widened(right, high, backend), bias, out_dtype, backend, site, name)


def gemm_add_(
    out: Tensor, left: Operand, right: Operand, *, high: torch.dtype, backend: str, site: int, name: str
) -> None:
    """out [M, N] fp32 += left @ right.T, accumulated by the GEMM."""
    if left.spec is not None and right.spec is not None:
        OPS.scaled_mm_add_(out, *left, *right, backend, site, name)
        return
    OPS.mm_add_(out, widened(left, high, backend), widened(right, high, backend), backend, site, name)


def widened(operand: Operand, high: torch.dtype, backend: str) -> Tensor:
    """The operand in high precision: an FP8 one is decoded, as a GEMM with a single FP8 operand needs it."""
    if operand.spec is None:
        return operand.data
    return OPS.dequantize(operand.data, operand.scale_inv, operand.spec, high, backend)
