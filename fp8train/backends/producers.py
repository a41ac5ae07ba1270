"""Formulas of RMSNorm and of the rotary embedding, with the roundings of the plain modules on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor


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
