"""Rows of a matrix on several ranks are rounded as those of the whole one, bit for bit."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from fp8train.nn.spread_rows import SpreadRows, quantize_spread
from fp8train.quant.formats import QuantSpec
from fp8train.quant.reference import quantize
from tests.distributed.ranks import run_ranks

RANKS = 3
SHAPES = ((384, 256), (256, 130), (300, 200), (259, 128), (128, 64), (5, 40), (2, 3), (900, 7), (1, 129))
SPECS = ("e4m3 128x128 pow2", "e4m3 128x128 fp32", "e5m2 128x128 pow2", "e4m3 tensor fp32", "e4m3 32x32 pow2")


def _matrix(n: int, k: int) -> torch.Tensor:
    """Each block of another magnitude, with a zero, a subnormal, a NaN and an Inf somewhere."""
    generator = torch.Generator().manual_seed(n * 1000 + k)
    x = torch.randn(n, k, generator=generator)
    x *= 2.0 ** torch.randint(-140, 120, (-(-n // 32), 1), generator=generator).repeat_interleave(32, 0)[:n]
    if n > 200:
        x[n // 3, 0], x[130, k - 1] = float("nan"), float("-inf")
        x[140:200] = 0.0
    return x


def _on_ranks(world):
    import torch.distributed as dist

    found = {}
    for spec, divided in product(map(QuantSpec.parse, SPECS), (False, True)):
        wholes = [_matrix(*shape) for shape in SHAPES]
        divisors = [2.0 ** (torch.arange(shape[1]) % 5) if divided else None for shape in SHAPES]
        pieces = []
        for whole, divisor in zip(wholes, divisors, strict=True):
            n, each = len(whole), len(torch.chunk(whole, world.world_size)[0])
            start = min(world.rank * each, n)
            pieces.append(
                SpreadRows(
                    rows=whole[start : start + each],
                    start=start,
                    each=each,
                    shape=tuple(whole.shape),
                    spec=spec,
                    backend="cpu",
                    divisor=divisor,
                )  # fmt: skip
            )
        made = quantize_spread(pieces, dist.group.WORLD)
        for piece, whole, (codes, scale_inv) in zip(pieces, wholes, made, strict=True):
            want = quantize(whole if piece.divisor is None else whole / piece.divisor, spec)
            rows = want.qdata[piece.start : piece.start + piece.each]
            same_codes = codes.dtype is rows.dtype and torch.equal(codes.view(torch.uint8), rows.view(torch.uint8))
            same_scales = torch.equal(scale_inv.view(torch.int32), want.scale_inv.view(torch.int32))
            found[str(spec), divided, piece.shape] = same_codes, same_scales, piece.shares_blocks, len(codes)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(_on_ranks, RANKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("divided", [False, True], ids=["", "divided"])
def test_codes_and_scales_are_those_of_the_whole_matrix(ranks, divided, spec, shape):
    of_ranks = [result[str(QuantSpec.parse(spec)), divided, shape] for result in ranks]
    assert all(same_codes and same_scales for same_codes, same_scales, _, _ in of_ranks)
    assert sum(rows for *_, rows in of_ranks) == shape[0]


def test_both_ways_were_gone(ranks):
    """Blocks that ranks share and blocks that they do not; ranks with rows and without."""
    assert {shares for *_, shares, _ in ranks[0].values()} == {True, False}
    assert {rows > 0 for *_, rows in ranks[2].values()} == {True, False}
