"""Remedies for outliers in the SwiGLU product, the input of a down projection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fp8train.nn.linear import Float8Linear

MAX_EXPONENT = 24  # a channel is scaled by at most 2^24 either way, so that no product leaves the range of FP32


@dataclass(frozen=True, slots=True)
class InputRemedy:
    """What a linear does to its input before it is rounded.

    Args:
        clamp: largest magnitude; None: as it is.
        smooth: gate and up projection whose product the input is; None: no scaling of channels.
    """

    clamp: float | None = None
    smooth: tuple[Float8Linear, Float8Linear] | None = None


def channel_scale(gate: Tensor, up: Tensor) -> Tensor:
    """Powers of two that bring the channels of silu(gate x) * (up x) to alike size.

    A function of the weights alone, so that ranks, micro-batches and resumed runs agree.

    Args:
        gate, up: weights [intermediate, hidden] fp32.

    Returns:
        Tensor: [intermediate] fp32; 1 for a channel whose size is 0 or not finite.

    Source: Smooth-SwiGLU (arXiv:2409.12517) 4.4, with the channel's size from the weights in place of its amax.
    """
    return scale_of_size(channel_size(gate, up))


def channel_size(gate: Tensor, up: Tensor) -> Tensor:
    """Size [rows] fp64 of the channels of silu(gate x) * (up x), each of its own two rows alone.

    For x of independent normal components the product of two of its projections g, u with correlation r has
    size^2 = |g|^2 |u|^2 (1 + 2 r^2): channels grow where the two rows grow and align.

    Args:
        gate, up: the same rows of both weights, [rows, hidden] fp32.
    """
    gate, up = gate.detach().double(), up.detach().double()
    norms = gate.square().sum(1) * up.square().sum(1)
    return (norms + 2 * (gate * up).sum(1).square()).sqrt()


def scale_of_size(size: Tensor) -> Tensor:
    """channel_scale [intermediate] fp32 of all channels' sizes: 2^-round_down(log2(size / median size))."""
    usable = size.isfinite() & (size > 0)
    middle = size.sort().values[size.numel() // 2]
    relative = torch.where(usable & (middle > 0) & middle.isfinite(), size / middle, torch.ones_like(size))
    exponent = torch.frexp(relative).exponent - 1  # relative = mantissa * 2^exponent with 1 <= mantissa < 2
    return torch.ldexp(torch.ones_like(size), -exponent.clamp(-MAX_EXPONENT, MAX_EXPONENT)).float()


def fold_channel_scale(gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """(up, down) with the scale moved into them: the same function, exactly, without a scale at run time.

    Args:
        gate, up: [intermediate, hidden] fp32.
        down: [hidden, intermediate] fp32.
    """
    scale = channel_scale(gate, up)
    return up * scale[:, None], down / scale
