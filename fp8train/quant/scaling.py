"""From the largest magnitude of a block to the scale that decodes it."""

from __future__ import annotations

import torch
from torch import Tensor

from fp8train.quant.formats import Format, ScaleKind

MIN_SCALE_INV = 2.0**-126  # a subnormal scale would be flushed to zero on some devices, and 1/0 is Inf
INF_BITS = 0x7F800000
_MANTISSA_MASK = 0x7FFFFF


def amax_bits(x: Tensor, dim: int | tuple[int, ...], keepdim: bool = False) -> Tensor:
    """Bit pattern of max |x| over `dim`, as int32. As integers, because a floating-point maximum may drop a NaN.

    Args:
        x: any shape, fp32.
    """
    return torch.amax(x.view(torch.int32) & 0x7FFFFFFF, dim=dim, keepdim=keepdim)


def scale_inv_from_amax(bits: Tensor, fmt: Format, kind: ScaleKind) -> Tensor:
    """scale_inv = amax / fmt.max, rounded up to 2^k for "pow2"; at least 2^-126; 1 for amax 0; NaN for a NaN or Inf.

    Args:
        bits: int32, bit patterns of the blocks' amax (>= 0).
        fmt: element format.
        kind: "pow2" or "fp32".

    Returns:
        Tensor: fp32, same shape.

    Source: DeepSeek-V3 (arXiv:2412.19437) 3.3; rounding up as the MXFP8 recipes (arXiv:2506.08027) find necessary.
    """
    amax = bits.view(torch.float32)
    # tensor by tensor: dividing by a Python number multiplies by its reciprocal on some devices, one ulp off
    scale_inv = amax / torch.full_like(amax, fmt.max)
    if kind == "pow2":
        # on the exponent bits: log2 is wrong for most values one ulp above a power of two
        scale_inv = ((scale_inv.view(torch.int32) + _MANTISSA_MASK) & INF_BITS).view(torch.float32)
    scale_inv = scale_inv.clamp_min(MIN_SCALE_INV)
    scale_inv = torch.where(bits == 0, torch.ones_like(scale_inv), scale_inv)
    return torch.where(bits >= INF_BITS, torch.full_like(scale_inv, float("nan")), scale_inv)
