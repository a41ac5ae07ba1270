"""Shapes that tests of quantisers and GEMMs share, chosen around the 128-wide blocks; small, for the CPU suite."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

MATRICES = {
    "one-block": (128, 128),
    "many-blocks": (256, 384),
    "ragged": (303, 300),
    "below-a-block": (7, 33),
    "one-over": (129, 257),
    "no-rows": (0, 128),
    "no-columns": (128, 0),
    "one-row": (1, 300),
    "one-column": (300, 1),
    "tall": (1024, 16),
    "flat": (16, 1024),
    "layer": (256, 688),
}
"""[M, K] of one operand."""

GEMMS = {
    "one-block": (128, 128, 128),
    "many-blocks": (256, 384, 256),
    "ragged": (303, 300, 257),
    "below-a-block": (7, 5, 33),
    "no-rows": (0, 128, 128),
    "no-outputs": (128, 0, 128),
    "no-contraction": (128, 128, 0),
    "one-row": (1, 256, 300),
    "tall": (1024, 16, 128),
    "flat": (16, 1024, 128),
    "deep": (32, 48, 1024),
    "layer": (256, 688, 256),
}
"""M, N, K of y[M,N] = x[M,K] w[N,K]^T."""

matrices = pytest.mark.parametrize(("rows", "cols"), list(MATRICES.values()), ids=list(MATRICES))
gemms = pytest.mark.parametrize(("M", "N", "K"), list(GEMMS.values()), ids=list(GEMMS))
layouts = pytest.mark.parametrize("layout", ["row-major", "column-major"])


def matrix(
    rows: int, cols: int, *, seed: int = 0, dtype: torch.dtype = torch.float32, layout: str = "row-major"
) -> Tensor:
    """N(0, 1) numbers [rows, cols]; rows differ in magnitude by up to 2^16, so that a wrong block's scale shows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator) * 2.0 ** torch.randint(-8, 9, (rows, 1), generator=generator)
    x = x.to(dtype)
    return x if layout == "row-major" else x.T.contiguous().T
