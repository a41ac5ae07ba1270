"""From amax to scale_inv."""

from __future__ import annotations

import struct

import pytest
import torch
from torch import Tensor

from fp8train.quant.formats import E4M3, E5M2, Format
from fp8train.quant.scaling import amax_bits, scale_inv_from_amax
from tests.quant.oracle import scales_of

formats = pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
kinds = pytest.mark.parametrize("kind", ["pow2", "fp32"])


def scale_bits(amax: float, fmt: Format, kind: str) -> int:
    bits = torch.tensor([amax], dtype=torch.float32).view(torch.int32)
    return int(scale_inv_from_amax(bits, fmt, kind).view(torch.int32))  # type: ignore[arg-type]


# reference/numerics.md 5.1: amax, bits of the FP32 scale, biased exponent of the power of two above it
GOLDEN = [
    (1.0, 0x3B124925, 119),
    (3.1, 0x3BE2BE2B, 120),
    (448.0, 0x3F800000, 127),
    (449.0, 0x3F804925, 128),
    (896.0, 0x40000000, 128),
    (1e-4, 0x346FACAD, 105),
    (1e-30, 0x0939706E, 19),
]


@pytest.mark.parametrize(("amax", "fp32", "exponent"), GOLDEN, ids=lambda value: str(value))
def test_golden_scales_of_e4m3(amax: float, fp32: int, exponent: int) -> None:
    assert scale_bits(amax, E4M3, "fp32") == fp32
    assert scale_bits(amax, E4M3, "pow2") == exponent << 23


@formats
@kinds
def test_scale_of_every_bf16_magnitude_equals_the_oracle(fmt: Format, kind: str) -> None:
    bits = torch.arange(0x8000, dtype=torch.int32) << 16
    scale = scale_inv_from_amax(bits, fmt, kind)  # type: ignore[arg-type]
    expected = torch.from_numpy(scales_of(bits.view(torch.float32).numpy(), fmt.name, kind))
    assert torch.equal(scale.isnan(), expected.isnan())
    assert torch.equal(scale.nan_to_num(-1).view(torch.int32), expected.nan_to_num(-1).view(torch.int32))


@formats
@kinds
def test_scale_one_ulp_around_every_edge_equals_the_oracle(fmt: Format, kind: str) -> None:
    # ceil(log2) in FP32 is wrong for most values one ulp above a power of two; edges are max * 2^k
    edges = torch.tensor([fmt.max * 2.0**k for k in range(-150, 128) if 2.0**-149 <= fmt.max * 2.0**k < 2.0**128])
    bits = edges.to(torch.float32).view(torch.int32)
    bits = torch.cat([bits - 1, bits, bits + 1])
    scale = scale_inv_from_amax(bits, fmt, kind)  # type: ignore[arg-type]
    expected = torch.from_numpy(scales_of(bits.view(torch.float32).numpy(), fmt.name, kind))
    assert torch.equal(scale.view(torch.int32), expected.view(torch.int32))


@formats
def test_power_of_two_scale_is_the_smallest_that_does_not_saturate(fmt: Format) -> None:
    amax = random_magnitudes()
    scale = scale_inv_from_amax(amax.view(torch.int32), fmt, "pow2").to(torch.float64)
    # max is 1.75 * 2^n: the quotient of the next FP32 number is 1.14 half ulps above 2^k, so rounding hides no excess
    assert bool((amax.to(torch.float64) <= fmt.max * scale).all())
    smaller = (amax.to(torch.float64) > fmt.max * scale / 2) | (scale == 2.0**-126)
    assert bool(smaller.all())
    assert bool((torch.frexp(scale).mantissa == 0.5).all())


@formats
@kinds
@pytest.mark.parametrize("amax", [2.0**-149, 2.0**-126, 1e-36], ids=["smallest", "smallest-normal", "tiny"])
def test_scale_is_never_subnormal(fmt: Format, kind: str, amax: float) -> None:
    assert scale_bits(amax, fmt, kind) == struct.unpack("<i", struct.pack("<f", 2.0**-126))[0]


@formats
@kinds
def test_zero_block_gets_scale_one(fmt: Format, kind: str) -> None:
    assert scale_bits(0.0, fmt, kind) == 0x3F800000


@formats
@kinds
@pytest.mark.parametrize("bits", [0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF], ids=hex)
def test_infinite_or_nan_amax_gives_a_nan_scale(fmt: Format, kind: str, bits: int) -> None:
    # 0x7FFFFFFF is the one that rounding up by the mantissa mask would turn into a plausible number
    scale = scale_inv_from_amax(torch.tensor([bits], dtype=torch.int32), fmt, kind)  # type: ignore[arg-type]
    assert bool(scale.isnan().all())


def test_amax_propagates_a_nan_of_either_sign_and_any_payload() -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    for row, bits in enumerate([0x7FC00000, -0x400000, 0x7F800001]):
        x.view(torch.int32)[row, row] = bits
    assert (amax_bits(x, dim=1) > 0x7F800000).tolist() == [True, True, True, False]
    assert amax_bits(x[3:], dim=1).view(torch.float32).item() == x[3].abs().max().item()


def random_magnitudes() -> Tensor:
    """Positive finite FP32 numbers whose bit patterns are uniform: all exponents, subnormals included."""
    bits = torch.randint(1, 0x7F800000, (20000,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    return bits.view(torch.float32)
