"""Unbiased noise in place of rounding: what a placebo run puts on its GEMM operands."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

TABLE_SIZE = 2**20
HASHED_COLUMNS = 32
_ODD = 0x9E3779B1 - 2**32  # as int32; Source: Knuth, multiplicative hashing


def noisy(x: Tensor, rms: float, dtype: torch.dtype) -> Tensor:
    """x (1 + rms sqrt(3) u), u uniform in [-1, 1]: relative error of mean 0 and root mean square `rms` in each element.

    The u of a row are a stretch of one fixed table, whose place is a hash of the row's own bits. So the noise needs no
    state: the same x gets the same noise, in recomputation, after a resume and for every reader of a tensor, and that
    of a token does not depend on how a batch is cut; rounding to FP8 is a function of x in the same way.

    Args:
        x: [M, K] bf16 or fp32.
        rms: relative, such as 0.0265.
        dtype: of the result, torch.bfloat16 or torch.float32.
    """
    if x.numel() == 0:
        return x.to(dtype)
    noise = _table(rms, x.shape[1], str(x.device)).index_select(0, _places(x))
    if x.dtype is not dtype or dtype is not torch.bfloat16:
        x, noise = x.to(torch.float32), noise.to(torch.float32)
    return torch.addcmul(x, x, noise).to(dtype)  # in bf16 rounded once, at the end: three passes over two bytes


def _places(x: Tensor) -> Tensor:
    """Where in the table the noise of each row of x begins: int64 [M]."""
    few = x[:, :: max(1, x.shape[1] // HASHED_COLUMNS)].contiguous()
    bits = few.view(torch.int16 if x.dtype is torch.bfloat16 else torch.int32).to(torch.int32)
    odd = torch.arange(1, 2 * bits.shape[1], 2, dtype=torch.int32, device=x.device).mul_(_ODD)
    mixed = (bits ^ (bits >> 15)).mul_(odd).sum(1, dtype=torch.int32)
    mixed.bitwise_xor_(mixed >> 15).mul_(_ODD)
    return (mixed >> 8).to(torch.int64).remainder_(TABLE_SIZE)


@functools.lru_cache(maxsize=8)
def _table(rms: float, width: int, device: str) -> Tensor:
    """Every stretch of the table rms sqrt(3) u as a row: bf16 [TABLE_SIZE, width], a view of so many numbers in all."""
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(TABLE_SIZE + width - 1, generator=generator, dtype=torch.float64).mul_(2).sub_(1)
    return u.mul_(rms * math.sqrt(3.0)).to(torch.bfloat16).to(device).unfold(0, width, 1)
