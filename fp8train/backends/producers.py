"""What stands between GEMMs: the residual stream's sum, RMSNorm, SwiGLU, with the quantiser behind them; RoPE.

The arithmetic of the plain modules, bit for bit on the CPU: products in FP32, silu(gate) and the gradients rounded to
the dtype of gate. Every backend inherits it; one whose kernels quantise what they compute says so with `fuses`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8train.backends.interface import Backend, Copies
from fp8train.quant.formats import QuantSpec
from fp8train.quant.qtensor import QTensor


class Producers:
    """What a backend inherits: each product is computed, written, and read again by the backend's own quantiser."""

    emulates = False
    decoded: tuple[str, ...] = ()

    @property
    def refused(self) -> list[str]:
        """See Backend."""
        return []

    def fuses(self, row: QuantSpec, col: QuantSpec | None) -> bool:
        """See Backend."""
        return False

    def transpose_codes(self, q: QTensor) -> QTensor:
        """See Backend."""
        return q.transpose()

    def counters(self, x: Tensor, spec: QuantSpec) -> Tensor | None:
        """See Backend; most quantisers do not count."""
        return None

    def rstd(self, x: Tensor, eps: float) -> Tensor:
        """See Backend."""
        return row_rstd(x, eps)

    def add_rstd(self, x: Tensor, branch: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See Backend."""
        total = (x + branch).to(x.dtype)
        return total, row_rstd(total, eps)

    def rms_norm(self, x: Tensor, weight: Tensor, rstd: Tensor, dtype: torch.dtype) -> Tensor:
        """See Backend."""
        return (x.float() * rstd[:, None] * weight).to(dtype)

    def rms_norm_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dtotal: Tensor | None, branch: torch.dtype | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See Backend; on CUDA by torch's own kernel of the same formula."""
        if dy.device.type != "cuda":
            dx, dweight = norm_gradients(dy, x, weight, rstd)
        else:
            wide = (dy.float(), x.float(), list(weight.shape), rstd.unsqueeze(-1), weight)
            dx, dweight = torch.ops.aten._fused_rms_norm_backward(*wide, [True, True])
        dx = dx.to(x.dtype) if dtotal is None else dx.to(x.dtype) + dtotal
        return dx, dweight, None if branch is None else dx.to(branch)

    def has_rope(self) -> bool:
        """See Backend."""
        return False

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, inverse: bool) -> Tensor:
        """See Backend."""
        return rotated(x, cos, sin, dtype, inverse)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """See Backend."""
        return F.silu(gate) * up

    def swiglu_backward(self, dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """See Backend."""
        return torch.ops.aten.silu_backward(dh * up, gate), dh * F.silu(gate)

    def rmsnorm_quantize(
        self: Backend,
        x: Tensor,
        weight: Tensor,
        rstd: Tensor,
        dtype: torch.dtype,
        row: QuantSpec,
        col: QuantSpec | None,
    ) -> Copies:
        """See Backend."""
        return _copies(self, self.rms_norm(x, weight, rstd, dtype), row, col)

    def swiglu_quantize(self: Backend, gate: Tensor, up: Tensor, row: QuantSpec, col: QuantSpec | None) -> Copies:
        """See Backend."""
        return _copies(self, self.swiglu(gate, up), row, col)

    def swiglu_backward_quantize(
        self: Backend, dh: Tensor, gate: Tensor, up: Tensor, row: QuantSpec, col: QuantSpec | None, h: QuantSpec | None
    ) -> tuple[Copies, Copies, QTensor | None]:
        """See Backend."""
        dgate, dup = self.swiglu_backward(dh, gate, up)
        h_t = None if h is None else self.quantize(self.swiglu(gate, up), h, True)
        return _copies(self, dgate, row, col), _copies(self, dup, row, col), h_t


def _copies(backend: Backend, x: Tensor, row: QuantSpec, col: QuantSpec | None) -> Copies:
    return (backend.quantize(x, row, False), None) if col is None else backend.quantize_dual(x, row, col)


def row_rstd(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) of each row in FP32, with the roundings of F.rms_norm on the CPU: [..., K] -> [...]."""
    return torch.rsqrt(x.float().square().mean(-1) + eps)


def norm_gradients(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of RMSNorm in FP32, with the roundings of autograd through F.rms_norm on the CPU.

    g = dy * weight; dx = g * rstd - x * rstd^3 * mean(g * x); dweight = sum over rows of dy * x * rstd.

    Args:
        dy, x: [M, K] bf16 or fp32.
        weight: [K] fp32.
        rstd: [M] fp32, as row_rstd gives it.

    Returns:
        (dx [M, K] in x's dtype, dweight [K] fp32).
    """
    wide, dy, rstd = x.float(), dy.float(), rstd.unsqueeze(-1)
    g = dy * weight
    dmean = (g * wide).sum(-1, keepdim=True) * -0.5 * rstd.pow(3) / x.shape[-1]
    return (g * rstd + dmean * (2 * wide)).to(x.dtype), (dy * (wide * rstd)).sum(0)


def rows_dense(x: Tensor) -> Tensor:
    """x, copied if elements of a row are not neighbours: what kernels read."""
    return x if x.stride(-1) == 1 or x.numel() == 0 else x.contiguous()


def rotated(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, inverse: bool) -> Tensor:
    """Rotary embedding with the roundings of the plain module: channel i is rotated with channel i + head_dim / 2.

    first' = first * cos - second * sin; second' = second * cos + first * sin, in FP32, rounded once to dtype.

    Args:
        x: [B, heads, T, head_dim] bf16 or fp32.
        cos, sin: [T, head_dim / 2] fp32.
        dtype: of the result.
        inverse: with sin negated: the gradient, with the roundings of autograd.

    Returns:
        Tensor: [B, heads, T, head_dim], a view of contiguous memory [B, T, heads, head_dim].
    """
    first, second = x.transpose(1, 2).float().chunk(2, dim=-1)
    cos, sin = cos[:, None], -sin[:, None] if inverse else sin[:, None]
    out = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return out.to(dtype).contiguous().transpose(1, 2)
