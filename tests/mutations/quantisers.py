"""Quantisers with a fault, in place of the CPU backend's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fp8train.backends.cpu import CpuBackend
from fp8train.quant import reference
from fp8train.quant.formats import QuantSpec
from fp8train.quant.qtensor import QTensor
from fp8train.quant.scaling import scale_inv_from_amax

Quantiser = Callable[[Tensor, QuantSpec], QTensor]
ScaleRule = Callable[[Tensor, QuantSpec], Tensor]


def install(patch: pytest.MonkeyPatch, quantise: Quantiser) -> None:
    """Every way of quantising on the CPU goes through `quantise`, which sees the matrix as it is to be stored."""

    def one(self: CpuBackend, x: Tensor, spec: QuantSpec, transpose: bool) -> QTensor:
        return quantise(x.T.contiguous() if transpose else x, spec)

    def dual(self: CpuBackend, x: Tensor, row: QuantSpec, col: QuantSpec) -> tuple[QTensor, QTensor]:
        return one(self, x, row, False), one(self, x, col, True)

    def square(self: CpuBackend, x: Tensor, spec: QuantSpec, out: object = None) -> tuple[QTensor, QTensor]:
        return one(self, x, spec, False), one(self, x, spec, True)

    patch.setattr(CpuBackend, "quantize", one)
    patch.setattr(CpuBackend, "quantize_dual", dual)
    patch.setattr(CpuBackend, "quantize_square", square)


def with_scales(rule: ScaleRule) -> Quantiser:
    """The definition with other scales: rule(amax of the blocks, spec) gives scale_inv."""

    def quantise(x: Tensor, spec: QuantSpec) -> QTensor:
        blocks, sizes = reference.to_blocks(x.float(), spec)
        scale_inv = rule(blocks.abs().amax((-3, -1), keepdim=True), spec)
        codes = reference.encode(blocks / scale_inv, spec)
        qdata = reference.from_blocks(codes, sizes).contiguous().view(spec.format.dtype)
        return QTensor(qdata, scale_inv.squeeze(-1).squeeze(-2).contiguous(), spec)

    return quantise


def defined_scale(amax: Tensor, spec: QuantSpec) -> Tensor:
    """The scale of the definition."""
    return scale_inv_from_amax(amax.view(torch.int32), spec.format, spec.scale)


def floor_rounded(amax: Tensor, spec: QuantSpec) -> Tensor:
    """Power of two rounded down: the largest elements saturate."""
    return torch.exp2(torch.floor(torch.log2((amax / spec.format.max).clamp_min(2.0**-126))))


def floored_amax(amax: Tensor, spec: QuantSpec) -> Tensor:
    """No amax below 1e-4."""
    return defined_scale(amax.clamp_min(1e-4), spec)


def maximum_of_240(amax: Tensor, spec: QuantSpec) -> Tensor:
    """E4M3 of another maximum, 240: half of the range unused."""
    return torch.exp2(torch.ceil(torch.log2((amax / 240.0).clamp_min(2.0**-126))))


def fp16_scale(amax: Tensor, spec: QuantSpec) -> Tensor:
    """Scales stored as FP16: small ones become 0."""
    return defined_scale(amax, spec).half().float()


def laundering(x: Tensor, spec: QuantSpec) -> QTensor:
    """NaN and Inf become plausible numbers."""
    return reference.quantize(torch.nan_to_num(x.float()), spec)


def padded_with_garbage(x: Tensor, spec: QuantSpec) -> QTensor:
    """A ragged matrix is padded to whole blocks of 128 with memory that nobody wrote: here, ones."""
    rows, cols = x.shape
    padded = torch.nn.functional.pad(x.float(), (0, -cols % 128, 0, -rows % 128), value=1.0)
    made = reference.quantize(padded, spec)
    scale_rows, scale_cols = spec.scale_shape(rows, cols)
    return QTensor(made.qdata[:rows, :cols].contiguous(), made.scale_inv[:scale_rows, :scale_cols].contiguous(), spec)


def transposed_scales(x: Tensor, spec: QuantSpec) -> QTensor:
    """Scales in the memory order of the transposed matrix."""
    made = reference.quantize(x, spec)
    return QTensor(made.qdata, made.scale_inv.T.contiguous().view(made.scale_inv.shape), spec)
