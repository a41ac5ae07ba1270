"""Refreshed weights of backend triton: quantised into the buffers that hold their codes, interpreted on a CPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from fp8train.nn.weights import OPERANDS
from fp8train.quant.formats import BLOCKWISE
from tests.nn.precisions import made
from tests.nn.test_weights import edit_in_place, is_current


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="interprets kernels")
@pytest.mark.parametrize(("rows", "cols"), [(140, 130), (128, 256)])
def test_kernels_write_the_codes_where_they_are(rows: int, cols: int, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = made(1, rows, cols, BLOCKWISE)
    linear.set_precision(BLOCKWISE, "triton")
    buffers = [getattr(linear, name) for name in OPERANDS[:4]]
    saved = [buffer * torch.ones((), requires_grad=True) for buffer in buffers[1::2]]  # saves it for backward
    monkeypatch.setattr(Tensor, "copy_", lambda *_: pytest.fail("codes were copied"))
    edit_in_place(linear)
    linear.refresh_weight()
    monkeypatch.undo()
    assert is_current(linear)
    assert all(getattr(linear, name) is buffer for name, buffer in zip(OPERANDS, buffers, strict=False))
    for product in saved:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()
