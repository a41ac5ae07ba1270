"""Rounding of matrices whose rows are spread over ranks: each rank its own rows, with the codes of the whole matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fp8train.backends import get_backend
from fp8train.quant.formats import QuantSpec
from fp8train.quant.reference import encode, from_blocks, to_blocks
from fp8train.quant.scaling import amax_bits, scale_inv_from_amax


@dataclass(frozen=True, kw_only=True, slots=True)
class SpreadRows:
    """What one rank has of a matrix [N, K]: `rows` [n, K] fp32 from row `start` on; n may be 0.

    each: rows of every rank but the last ones, which may have fewer.
    divisor: [K] fp32 by which the columns are divided before they are rounded; None: they are not.
    """

    rows: Tensor
    start: int
    each: int
    shape: tuple[int, int]
    spec: QuantSpec
    backend: str
    divisor: Tensor | None = None

    @property
    def shares_blocks(self) -> bool:
        """Whether there are blocks with rows of several ranks; the same on every rank."""
        return self.each < self.shape[0] and self.each % self._height != 0

    def begin(self) -> tuple[Tensor, Tensor]:
        """(codes, bits), as far as this rank can tell: int32 bits of scale_inv [row blocks, column blocks], or of amax
        where ranks share blocks and codes are still to be made; 0 for blocks of which it has no row.
        """
        bits = torch.zeros(self.spec.scale_shape(*self.shape), dtype=torch.int32, device=self.rows.device)
        if self.rows.numel() == 0:
            return self.rows.to(self.spec.format.dtype), bits
        codes = self.rows
        if self.shares_blocks:
            own = amax_bits(self._blocks()[0], dim=(-3, -1))
        else:
            q, _ = get_backend(self.backend).quantize_square(self._divided(), self.spec, None, False)
            codes, own = q.qdata.contiguous(), q.scale_inv.view(torch.int32)
        bits[self._first : self._first + own.shape[0]] = own
        return codes, bits

    def encoded(self, scale_inv: Tensor) -> Tensor:
        """Codes [n, K] of these rows, as reference.quantize makes them, with the scales of the whole matrix."""
        blocks, sizes = self._blocks()
        own = scale_inv[self._first : self._first + blocks.shape[0], None, :, None]
        codes = encode(blocks * (torch.ones_like(own) / own), self.spec)
        codes = torch.where(own.isnan(), torch.full_like(codes, self.spec.format.nan_code), codes)
        return from_blocks(codes, sizes)[self._above :].view(self.spec.format.dtype)

    def _blocks(self) -> tuple[Tensor, tuple[int, int]]:
        """to_blocks in the grid of the whole matrix; zeros stand for the rows that other ranks have of the first."""
        return to_blocks(F.pad(self._divided(), (0, 0, self._above, 0)), self.spec)

    def _divided(self) -> Tensor:
        return self.rows if self.divisor is None else self.rows / self.divisor

    @property
    def _height(self) -> int:
        return self.spec.block_shape(*self.shape)[0]

    @property
    def _first(self) -> int:
        return self.start // self._height

    @property
    def _above(self) -> int:
        return 0 if self.spec.block == "tensor" else self.start % self._height


@torch.no_grad()
def quantize_spread(matrices: Sequence[SpreadRows], group: dist.ProcessGroup) -> list[tuple[Tensor, Tensor]]:
    """Round matrices whose rows are spread over a group; every rank must call this, with its rows of the same ones.

    Returns:
        list: of each, codes [n, K] of this rank's rows and scale_inv fp32 of the whole matrix, bit for bit those that
        quantize_square gives of it: where ranks share a block, its amax is the largest of theirs, NaN above all.
    """
    if not matrices:
        return []
    begun = [matrix.begin() for matrix in matrices]
    bits = torch.cat([own.flatten() for _, own in begun])
    dist.all_reduce(bits, dist.ReduceOp.MAX, group)
    made = []
    for matrix, (codes, own), every in zip(matrices, begun, bits.split([o.numel() for _, o in begun]), strict=True):
        of_all = every.view_as(own)
        if matrix.shares_blocks:
            scale_inv = scale_inv_from_amax(of_all, matrix.spec.format, matrix.spec.scale)
            made.append((matrix.encoded(scale_inv) if codes.numel() else codes, scale_inv))
        else:
            made.append((codes, of_all.view(torch.float32)))
    return made


def gather_rows(vectors: Sequence[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """The vectors [ranks * n] of which each rank of a group has [n]; every rank must call this, for the same ones."""
    if not vectors:
        return []
    own = torch.cat(list(vectors))
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    of_ranks = [one.split([len(vector) for vector in vectors]) for one in every]
    return [torch.cat(parts) for parts in zip(*of_ranks, strict=True)]
