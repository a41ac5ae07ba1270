"""Specifications that tests of quantisers share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp8train.quant.qtensor import QTensor

SPECS = (
    "e4m3 tensor pow2",
    "e4m3 tensor fp32",
    "e4m3 row pow2",
    "e4m3 row fp32",
    "e4m3 1x128 pow2",
    "e4m3 1x128 fp32",
    "e4m3 1x32 pow2",
    "e4m3 128x128 pow2",
    "e4m3 128x128 fp32",
    "e4m3 4x16 pow2",
    "e5m2 1x128 pow2",
    "e5m2 128x128 fp32",
)
specs = pytest.mark.parametrize("text", SPECS, ids=lambda text: text.replace(" ", "-"))


def same_codes(left: QTensor, right: QTensor) -> bool:
    """Whether codes and scales agree bit for bit, NaN included."""
    codes = left.shape == right.shape and torch.equal(left.qdata.view(torch.uint8), right.qdata.view(torch.uint8))
    return codes and same_bits(left.scale_inv, right.scale_inv)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two FP32 tensors agree bit for bit; a NaN equals any NaN."""
    if left.shape != right.shape or left.dtype != torch.float32 or right.dtype != torch.float32:
        return False
    nan = left.isnan()
    return torch.equal(nan, right.isnan()) and torch.equal(left.masked_fill(nan, 0), right.masked_fill(nan, 0))


def every_bf16(arrangement: str) -> Tensor:
    """All 65,536 BF16 numbers: "alone" [65536, 1], "in-order", or "shuffled": mixed, NaN and Inf last."""
    numbers = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    if arrangement == "alone":
        return numbers.reshape(-1, 1)
    if arrangement == "in-order":  # a block of 128 is one exponent
        return numbers.reshape(512, 128)
    finite = numbers.to(torch.float32).isfinite()
    mixed = numbers[finite][torch.randperm(int(finite.sum()), generator=torch.Generator().manual_seed(0))]
    return torch.cat([mixed, numbers[~finite]]).reshape(512, 128)


arrangements = pytest.mark.parametrize("arrangement", ["alone", "in-order", "shuffled"])
