"""RMSNorm whose result leaves as FP8 copies, alone or behind the residual stream's sum; see fused.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fp8train.backends.producers import norm_gradients, row_rstd
from fp8train.nn.fused import (
    Fused,
    Fusion,
    input_operands,
    input_specs,
    refusal,
    taking_over,
    trains,
    unwritten,
    watched,
)
from fp8train.nn.fused_layouts import NormLayout
from fp8train.nn.inputs import QuantizedInput
from fp8train.nn.linear import HIGH, Float8Linear
from fp8train.nn.operands import OPS, as_matrix
from fp8train.quant.formats import QuantSpec

Made = Tensor | tuple[list[Tensor], QuantSpec, QuantSpec | None]  # y itself, or its copies and what they are


@dataclass(frozen=True, slots=True)
class NormFusion(Fusion):
    """See Fusion.

    Args:
        readers: the linears that read its result; nothing else does.
        through: the modules that its result passes on the way to them.
        eps: added to the mean square.
        rounds_early: the plain forward rounds to x's dtype before it multiplies by the weight, so that only an FP32 x
            gives the same numbers here.
    """

    readers: tuple[Float8Linear, ...]
    through: tuple[nn.Module, ...]
    eps: float
    rounds_early: bool


class FusedRMSNorm(Fused):
    """An RMSNorm that hands its result to linears as FP8 copies; made by `fused_norm`."""

    fusion: NormFusion
    weight: nn.Parameter

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor | QuantizedInput:
        """Normalise the last dimension.

        Args:
            x: [..., size], bf16 or fp32.
            dtype: dtype of the result; None is x's own.

        Returns:
            QuantizedInput: FP8 copies for the readers; a Tensor where they do not permit, or hooks look.
        """
        if not self._serves(x, dtype):
            return self.fusion.plain.forward(self, x, *(() if dtype is None else (dtype,)))
        return self._normed(x, x.dtype if dtype is None else dtype)

    def _serves(self, x: Tensor, dtype: torch.dtype | None) -> bool:
        dtypes = x.dtype in HIGH and (dtype is None or dtype in HIGH) and self.weight.dtype is torch.float32
        fits = dtypes and x.dim() > 0 and not (self.fusion.rounds_early and x.dtype is not torch.float32)
        return fits and refusal(self.fusion.readers) is None

    def _normed(self, x: Tensor, dtype: torch.dtype) -> Tensor | QuantizedInput:
        backend, matrix = self._backend(), as_matrix(x.detach())
        if torch.compiler.is_compiling():  # traced, the formula is fused with the sum before it
            rstd = row_rstd(matrix, self.fusion.eps)
        else:
            rstd = OPS.rstd(matrix, self.fusion.eps, backend)
        made = self._made(matrix, rstd, dtype)
        y = _RMSNorm.apply(x, self.weight, rstd, dtype, _written(made, x), backend)
        return self._handed(y, made)

    def _made(self, x: Tensor, rstd: Tensor, dtype: torch.dtype) -> Made:
        """The norm of x [M, K], in FP8 unless hooks look."""
        readers, weight = self.fusion.readers, self.weight.detach()
        if watched((self, *readers, *self.fusion.through)):
            return OPS.rms_norm(x, weight, rstd, dtype, self._backend())
        row, col = input_specs(readers[0].plan.precision, trains(readers))
        return OPS.rmsnorm_quantize(x, weight, rstd, dtype, row, col, self._backend()), row, col

    def _handed(self, y: Tensor, made: Made) -> Tensor | QuantizedInput:
        """What the readers take, given y as autograd sees it."""
        if isinstance(made, Tensor):
            return y
        return QuantizedInput(y, *input_operands(*made, self.fusion.readers[0].plan.precision))

    def _backend(self) -> str:
        return self.fusion.readers[0].plan.backend

    def extra_repr(self) -> str:
        return f"{self.fusion.plain.extra_repr(self)}, fused into {len(self.fusion.readers)} linears"


class FusedAddRMSNorm(FusedRMSNorm):
    """The same of an AddRMSNorm: the sum and what the norm needs of it from one read; in backward one write."""

    def forward(  # type: ignore[override]
        self, x: Tensor, branch: Tensor | None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor | QuantizedInput]:
        """Add and normalise the last dimension.

        Args:
            x: [..., size], bf16 or fp32.
            branch: of the same shape, bf16 or fp32; None: there is nothing to add.
            dtype: dtype of the norm; None is x's own.

        Returns:
            (x + branch in the dtype of x, its norm as FusedRMSNorm gives it).
        """
        fits = branch is None or (branch.dtype in HIGH and branch.shape == x.shape)
        if not fits or not self._serves(x, dtype):
            return self.fusion.plain.forward(self, x, branch, *(() if dtype is None else (dtype,)))
        dtype = x.dtype if dtype is None else dtype
        if torch.compiler.is_compiling():
            total = x if branch is None else (x + branch).to(x.dtype)
            return total, self._normed(total, dtype)
        matrix, backend = as_matrix(x.detach()), self._backend()
        if branch is None:
            rstd = OPS.rstd(matrix, self.fusion.eps, backend)
        else:
            matrix, rstd = OPS.add_rstd(matrix, as_matrix(branch.detach()), self.fusion.eps, backend)
        made = self._made(matrix, rstd, dtype)
        written = None if branch is None else matrix.view(x.shape)
        total, y = _AddRMSNorm.apply(x, branch, self.weight, written, rstd, dtype, _written(made, x), backend)
        return total, self._handed(y, made)


class _RMSNorm(torch.autograd.Function):
    """Connects the normalised x, which is computed already, with x and the weight; y: None if it is in FP8 only."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, rstd: Tensor, dtype: torch.dtype, y: Tensor | None, backend: str
    ) -> Tensor:
        ctx.save_for_backward(x, weight, rstd)
        ctx.backend = backend
        return unwritten(x, dtype) if y is None else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        inputs = as_matrix(dy), as_matrix(x), weight, rstd
        if torch.compiler.is_compiling():  # traced, the formula is fused with what is around it
            dx, dweight = norm_gradients(*inputs)
        else:
            dx, dweight = OPS.rms_norm_backward(*inputs, None, None, ctx.backend)
        return dx.view(x.shape), dweight, None, None, None, None


class _AddRMSNorm(torch.autograd.Function):
    """Connects total = x + branch and the normalised total, both computed already, with x, branch and the weight.

    total: None if there is no branch: then it is x. y: None if it is in FP8 only.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, weight: Tensor, total: Tensor | None, rstd: Tensor,
        dtype: torch.dtype, y: Tensor | None, backend: str,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        total = x if total is None else total
        ctx.save_for_backward(total, weight, rstd)
        ctx.set_materialize_grads(False)
        ctx.branch = None if branch is None else branch.dtype
        ctx.backend = backend
        return total, unwritten(x, dtype) if y is None else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        if dy is None:
            dbranch = None if dtotal is None or ctx.branch is None else dtotal.to(ctx.branch)
            return dtotal, dbranch, *([None] * 6)
        residual = None if dtotal is None else as_matrix(dtotal)
        cast = None if ctx.branch is x.dtype else ctx.branch
        inputs = as_matrix(dy), as_matrix(x), weight, rstd, residual, cast
        dx, dweight, *apart = OPS.rms_norm_backward(*inputs, ctx.backend)
        dbranch = None if ctx.branch is None else apart[0] if apart else dx
        return dx.view(x.shape), None if dbranch is None else dbranch.view(x.shape), dweight, *([None] * 5)


def fused_norm(
    norm: nn.Module, readers: Sequence[Float8Linear], through: Iterable[nn.Module], layout: NormLayout
) -> FusedRMSNorm:
    """A FusedRMSNorm, or FusedAddRMSNorm, with the parameters, hooks and attributes of `norm`; see NormFusion."""
    fused = taking_over(FusedAddRMSNorm if layout.adds else FusedRMSNorm, norm)
    eps = getattr(norm, layout.eps)
    fused.fusion = NormFusion(type(norm), tuple(readers), tuple(through), eps, layout.rounds_early)
    return fused


def _written(made: Made, x: Tensor) -> Tensor | None:
    return made.view(x.shape) if isinstance(made, Tensor) else None
