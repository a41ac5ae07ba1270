"""What backend `triton` says to the launchers of the quantisers, and makes of what they return."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fp8train.backends.interface import Copies
from fp8train.quant import reference
from fp8train.quant.formats import QuantSpec
from fp8train.quant.qtensor import QTensor

ROW, SQUARE = (1, 128), (128, 128)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # what quantisers read, as their variants are called
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@functools.cache
def kernel(name: str) -> ModuleType:
    """A file of kernels/, imported on first use: the package works where there is no Triton."""
    return importlib.import_module(f"fp8train.kernels.{name}")


def codes_like(x: Tensor, spec: QuantSpec, rows: int, cols: int, transposed: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised codes [rows, cols] and scales, in the shapes and strides that the kernels return them in.

    Args:
        x: of the wanted device; may be a fake tensor, and sizes symbolic.
        spec: blocks of 1x128 or 128x128.
        rows, cols: shape of the codes.
        transposed: whether they are a column copy.
    """
    multiple = 128 if transposed else 16
    codes = x.new_empty((rows, -(-cols // multiple) * multiple), dtype=spec.format.dtype)[:, :cols]
    blocks = (-(-rows // spec.block[0]), -(-cols // spec.block[1]))  # type: ignore[operator]
    if spec.block == SQUARE:
        return codes, x.new_empty(blocks, dtype=torch.float32)
    padded = kernel("tile_launch").scale_stride(rows)
    return codes, x.new_empty((blocks[1], padded), dtype=torch.float32).t()[:rows]


def as_defined(x: Tensor, spec: QuantSpec, transposed: bool) -> QTensor:
    """The definition's codes in the strides of the kernels, for a kernel that was refused."""
    made = reference.quantize(x, spec, transpose=transposed and spec.block != SQUARE)
    return padded(made.transpose() if transposed and spec.block == SQUARE else made, transposed)


def padded(q: QTensor, transposed: bool) -> QTensor:
    """The same codes in the strides of the kernels; transposed: of a column copy."""
    codes, scale_inv = codes_like(q.scale_inv, q.spec, q.shape[0], q.shape[1], transposed)
    codes.view(torch.uint8).copy_(q.qdata.view(torch.uint8))
    return QTensor(codes, scale_inv.copy_(q.scale_inv), q.spec)


def tensors_of(copies: Copies) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Codes and scales of both copies, as the launchers return them."""
    row, col = copies
    return row.qdata, row.scale_inv, *((None, None) if col is None else (col.qdata, col.scale_inv))


def format_of(spec: QuantSpec) -> dict[str, Any]:
    """A specification, as the launchers of one copy take it."""
    return {"fp8_dtype": spec.format.dtype, "pow2": spec.scale == "pow2"}


def both_formats(row: QuantSpec, col: QuantSpec | None) -> dict[str, Any]:
    """Those of a row copy and, where it is wanted, of a column copy."""
    return {**format_of(row), "col_pow2": (row if col is None else col).scale == "pow2", "columns": col is not None}


def as_copies(tensors: Sequence[Any], row: QuantSpec, col: QuantSpec | None) -> Copies:
    """What a launcher of both copies returned."""
    q, scale, qt, scale_t = tensors
    return QTensor(q, scale, row), None if col is None else QTensor(qt, scale_t, col)


def dtype_name(x: Tensor) -> str:
    """The variant of a kernel that serves x; of others, whose launcher says what is wrong with x."""
    return _DTYPE_NAMES.get(x.dtype, "fp32")
