"""QTensor: FP8 codes and the scales that decode them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fp8train.quant.formats import Block, QuantSpec


@dataclass(slots=True, eq=False)  # not frozen: eight are made per linear and step, and frozen ones take 1 us each
class QTensor:
    """A matrix in FP8: x ~ qdata * scale_inv, one scale per block.

    Args:
        qdata: [..., M, K] float8, K-major.
        scale_inv: [..., ceil(M/rows), ceil(K/cols)] fp32; logical shape, any strides.
        spec: format, block and kind of scale.
    """

    qdata: Tensor
    scale_inv: Tensor
    spec: QuantSpec

    @property
    def shape(self) -> torch.Size:
        """[..., M, K]."""
        return self.qdata.shape

    @property
    def fmt(self) -> str:
        """Name of the element format."""
        return self.spec.format.name

    @property
    def block(self) -> Block:
        """The block that shares a scale."""
        return self.spec.block

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Decode to `dtype` [..., M, K]; magnitudes saturate at its largest finite number, a NaN block is NaN."""
        from fp8train.quant.reference import dequantize

        return dequantize(self, dtype)

    def same_bits(self, other: QTensor) -> bool:
        """Whether codes and scales are equal, bit for bit, on whatever devices they are; any NaN equals any other."""
        codes = (q.qdata.contiguous().view(torch.uint8).cpu() for q in (self, other))
        nans = [q.scale_inv.cpu().isnan() for q in (self, other)]
        scales = (q.scale_inv.cpu().masked_fill(nan, 0) for q, nan in zip((self, other), nans, strict=True))
        return torch.equal(*codes) and torch.equal(*nans) and torch.equal(*scales)

    def transpose(self) -> QTensor:
        """The same codes for x.T, K-major again (a byte transpose).

        Raises:
            ValueError: the block is not the same both ways round, so x.T has other codes.
        """
        if not self.spec.transposable:
            raise ValueError(
                f"QTensor.transpose: block is {self.block}; needs 'tensor' or a square block. "
                "Quantize with transpose=True instead."
            )
        # not .contiguous(): of a single row it is the same memory, which an operator must not return
        fmt = torch.contiguous_format
        qdata = self.qdata.transpose(-2, -1).clone(memory_format=fmt)
        return QTensor(qdata, self.scale_inv.transpose(-2, -1).clone(memory_format=fmt), self.spec)
