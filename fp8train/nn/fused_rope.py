"""A rotary embedding by a backend's kernel; see fused.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fp8train.nn.fused import Fused, Fusion, taking_over
from fp8train.nn.linear import HIGH
from fp8train.nn.operands import OPS


@dataclass(frozen=True, slots=True)
class RopeFusion(Fusion):
    """See Fusion; and the backend that rotates."""

    backend: str


class FusedRope(Fused):
    """A rotary embedding by a backend's kernel, but in compiled runs, where inductor fuses it; made by `fused_rope`.

    torch.func does not know it: fused=never.
    """

    fusion: RopeFusion

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
        """Rotate x [B, heads, T, head_dim] by the angles of its positions, dense cos and sin [T, head_dim / 2] fp32."""
        if torch.compiler.is_compiling() or x.dtype not in HIGH or dtype not in HIGH:
            return self.fusion.plain.forward(self, x, cos, sin, dtype)
        return _Rotation.apply(x, cos, sin, dtype, False, self.fusion.backend)

    def extra_repr(self) -> str:
        return f"backend={self.fusion.backend}"


class _Rotation(torch.autograd.Function):
    """RoPE, which keeps no x: its gradient is the rotation back, whose own is the rotation."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, inverse: bool, backend: str
    ) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.x_dtype, ctx.inverse, ctx.backend = x.dtype, inverse, backend
        return OPS.rope(x, cos, sin, dtype, inverse, backend)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = _Rotation.apply(dy, *ctx.saved_tensors, ctx.x_dtype, not ctx.inverse, ctx.backend)
        return dx, None, None, None, None, None


def fused_rope(rope: nn.Module, backend: str) -> FusedRope:
    """A FusedRope with the hooks and attributes of `rope`; see RopeFusion."""
    fused = taking_over(FusedRope, rope)
    fused.fusion = RopeFusion(type(rope), backend)
    return fused
