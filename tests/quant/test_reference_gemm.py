"""The definition of the FP8 GEMM, against FP64 on decoded operands and by its properties."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from fp8train.quant import reference
from fp8train.quant.formats import E4M3, QuantSpec
from fp8train.quant.qtensor import QTensor
from fp8train.quant.reference import contraction_blocks, quantize, scaled_mm
from tests.quant import oracle
from tests.shapes import gemms, matrix

PAIRS = {
    "blockwise": ("e4m3 1x128 pow2", "e4m3 128x128 pow2"),
    "blockwise-fp32": ("e4m3 1x128 fp32", "e4m3 128x128 fp32"),
    "wgrad": ("e4m3 1x128 pow2", "e4m3 1x128 pow2"),
    "gradients-in-e5m2": ("e5m2 1x128 fp32", "e4m3 128x128 pow2"),
    "tensorwise": ("e4m3 tensor fp32", "e4m3 tensor fp32"),
    "rowwise": ("e4m3 row fp32", "e4m3 row fp32"),
    "mixed-blocks": ("e4m3 1x32 pow2", "e4m3 row pow2"),
}
pairs = pytest.mark.parametrize(("left", "right"), list(PAIRS.values()), ids=list(PAIRS))


def operands(M: int, N: int, K: int, left: str, right: str) -> tuple[QTensor, QTensor]:
    a, b = matrix(M, K, seed=1), matrix(N, K, seed=2)
    return quantize(a, QuantSpec.parse(left)), quantize(b, QuantSpec.parse(right))


def exact(qa: QTensor, qb: QTensor) -> Tensor:
    """Product of the decoded operands in FP64; sums of K <= 16384 terms are good to 2^-53 * 2^14."""
    return torch.from_numpy(oracle.decoded(qa) @ oracle.decoded(qb).T)


def calc_diff(y: Tensor, expected: Tensor) -> float:
    """1 - 2 <x, y> / (|x|^2 + |y|^2), DeepGEMM's measure: half the squared relative error."""
    y, expected = y.to(torch.float64), expected.to(torch.float64)
    energy = float((y * y + expected * expected).sum())
    return float(((y - expected) ** 2).sum()) / energy if energy else 0.0


@pairs
@gemms
def test_product_equals_fp64_on_the_decoded_operands(M: int, N: int, K: int, left: str, right: str) -> None:
    qa, qb = operands(M, N, K, left, right)
    expected = exact(qa, qb)
    y = scaled_mm(qa, qb, out_dtype=torch.float32)
    assert y.shape == (M, N) and y.dtype is torch.float32
    # 32 blocks of K at most, an FP32 rounding of the partial and one of the sum each: 64 of 2^-24 / sqrt(3) rms, 2.8e-7
    # relative, calc_diff 4e-14; 1e-12 is 5 times that error
    assert calc_diff(y, expected) < 1e-12
    rounded = scaled_mm(qa, qb)
    assert rounded.dtype is torch.bfloat16
    # rounding to 8 bits costs 1.66e-3 relative (rms), calc_diff 1.66e-3^2 / 2 = 1.4e-6; 5e-6 is 2^-8.3, its worst case
    assert calc_diff(rounded, expected) < 5e-6
    assert torch.equal(rounded, y.to(torch.bfloat16))


@pairs
def test_product_of_integers_is_exact(left: str, right: str) -> None:
    # integers of at most three bits are codes of either format under any scale; sums stay below 2^24
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-4, 5, (size, 300), generator=generator).float() for size in (65, 70))
    for x in (a, b):
        x[:, ::16] = 4.0  # every block has the same amax
    specs = (QuantSpec.parse(left.replace("fp32", "pow2")), QuantSpec.parse(right.replace("fp32", "pow2")))
    y = scaled_mm(quantize(a, specs[0]), quantize(b, specs[1]), out_dtype=torch.float32)
    assert torch.equal(y, a @ b.T)


@pairs
@pytest.mark.parametrize("block", range(3))
def test_number_planted_in_one_block_meets_the_scale_of_that_block(left: str, right: str, block: int) -> None:
    # one-hot operands: only a product with both right scales gives the number back
    a, b = torch.zeros(40, 300), torch.zeros(50, 300)
    k = 128 * block + 17
    a[7, k], b[9, k] = 3.0 * 2.0**20, 5.0 * 2.0**-9
    for x in (a, b):  # other blocks have other scales
        x[:, (k + 128) % 300] = 1.0
    a[:, (k + 128) % 300] = 0.0
    a[7, (k + 128) % 300] = 2.0
    y = scaled_mm(quantize(a, QuantSpec.parse(left)), quantize(b, QuantSpec.parse(right)), out_dtype=torch.float32)
    expected = exact(quantize(a, QuantSpec.parse(left)), quantize(b, QuantSpec.parse(right)))
    assert torch.allclose(y.double(), expected, rtol=2.0**-22, atol=0)  # two products, two sums
    assert y[7, 9] != 0 and y.count_nonzero() == expected.count_nonzero()


def test_nan_block_makes_the_rows_that_read_it_nan_and_no_other() -> None:
    a, b = matrix(20, 300, seed=1), matrix(140, 300, seed=2)
    a[3, 290], b[130, 5] = float("nan"), float("inf")
    y = scaled_mm(
        quantize(a, QuantSpec.parse("e4m3 1x128")),
        quantize(b, QuantSpec.parse("e4m3 128x128")),
        out_dtype=torch.float32,
    )
    expected = torch.zeros(20, 140, dtype=torch.bool)
    expected[3] = True
    expected[:, 128:] = True  # the block that holds row 130 of b
    assert torch.equal(y.isnan(), expected)


@pytest.mark.parametrize("kind", ["pow2", "fp32"])
@pytest.mark.parametrize(("up", "down"), [(100, -100), (-100, 100), (100, 10), (-60, -20)], ids=str)
def test_extreme_scales_neither_overflow_nor_vanish_on_the_way(kind: str, up: int, down: int) -> None:
    a, b = torch.randn(16, 256, generator=torch.Generator().manual_seed(0)), matrix(24, 256) * 2.0**-8
    left, right = QuantSpec.parse("e4m3 1x128", kind), QuantSpec.parse("e4m3 128x128", kind)
    plain = scaled_mm(quantize(a, left), quantize(b, right), out_dtype=torch.float32)
    y = scaled_mm(quantize(a * 2.0**up, left), quantize(b * 2.0**down, right), out_dtype=torch.float32)
    assert torch.equal(y, plain * 2.0**up * 2.0**down)  # every step scales by a power of two, in range


@pytest.mark.parametrize("K", [1024, 4096, 16384])
@pytest.mark.parametrize("kind", ["pow2", "fp32"])
def test_sum_of_positive_products_has_no_bias_however_long(K: int, kind: str) -> None:
    # numerics.md 1.2: accumulation in 14 bits without promotion biases this by 1.3 % at K = 1024 and 6.6 % at 4096
    generator = torch.Generator().manual_seed(K)
    a, b = torch.rand(16, K, generator=generator), torch.rand(16, K, generator=generator)
    qa, qb = quantize(a, QuantSpec.parse("e4m3 1x128", kind)), quantize(b, QuantSpec.parse("e4m3 128x128", kind))
    expected = exact(qa, qb)
    bias = (scaled_mm(qa, qb, out_dtype=torch.float32).double() - expected).mean() / expected.mean()
    assert abs(float(bias)) < 1e-3


def test_bias_is_added_before_rounding() -> None:
    qa, qb = operands(33, 40, 300, *PAIRS["blockwise"])
    bias = torch.randn(40, generator=torch.Generator().manual_seed(3)) * 100
    plain = scaled_mm(qa, qb, out_dtype=torch.float32)
    assert torch.equal(scaled_mm(qa, qb, bias=bias, out_dtype=torch.float32), plain + bias)
    assert torch.equal(scaled_mm(qa, qb, bias=bias), (plain + bias).to(torch.bfloat16))


def test_out_is_written_or_added_to_in_place() -> None:
    qa, qb = operands(33, 40, 300, *PAIRS["wgrad"])
    y = scaled_mm(qa, qb, out_dtype=torch.float32)
    out = torch.full((33, 40), float("nan"))
    assert scaled_mm(qa, qb, out=out) is out and torch.equal(out, y)
    before = matrix(33, 40, seed=5)
    out = before.clone()
    assert scaled_mm(qa, qb, out=out, accumulate=True) is out and torch.equal(out, before + y)
    low = torch.zeros(33, 40, dtype=torch.bfloat16)
    assert torch.equal(scaled_mm(qa, qb, out=low), y.to(torch.bfloat16))


def test_accumulating_one_on_256_gives_257() -> None:
    # in BF16 256 + 1 is 256
    spec = QuantSpec.parse("e4m3 1x128")
    a, b = torch.zeros(1, 128), torch.zeros(1, 128)
    a[0, 0] = b[0, 0] = 1.0
    out = torch.full((1, 1), 256.0)
    scaled_mm(quantize(a, spec), quantize(b, spec), out=out, accumulate=True)
    assert out.item() == 257.0


def test_empty_contraction_gives_zero_plus_bias() -> None:
    qa, qb = operands(5, 6, 0, *PAIRS["blockwise"])
    assert torch.equal(scaled_mm(qa, qb, bias=torch.ones(6), out_dtype=torch.float32), torch.ones(5, 6))


def test_spans_end_where_either_operand_changes_its_scale() -> None:
    qa, qb = operands(4, 5, 300, "e4m3 1x128 pow2", "e4m3 1x96 pow2")
    assert contraction_blocks(qa, qb) == [(0, 96), (96, 128), (128, 192), (192, 256), (256, 288), (288, 300)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qb": (40, 299)}, "same K"),
        ({"bias": torch.zeros(33)}, "bias is"),
        ({"out": torch.zeros(40, 33)}, "out is"),
        ({"out": torch.zeros(33, 40, dtype=torch.float16)}, "out is"),
        ({"accumulate": True}, "accumulate needs"),
        ({"accumulate": True, "out": torch.zeros(33, 40, dtype=torch.bfloat16)}, "accumulate needs"),
        ({"out_dtype": torch.float16}, "out_dtype is"),
    ],
    ids=["other-K", "bias", "out-shape", "out-dtype", "accumulate-nothing", "accumulate-bf16", "out_dtype"],
)
def test_arguments_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    qa, qb = operands(33, 40, 300, *PAIRS["blockwise"])
    if "qb" in change:
        qb = quantize(matrix(*change.pop("qb")), qb.spec)
    with pytest.raises(ValueError, match=message):
        scaled_mm(qa, qb, **change)


def test_scales_that_do_not_belong_to_the_codes_are_refused() -> None:
    qa, qb = operands(33, 40, 300, *PAIRS["blockwise"])
    with pytest.raises(ValueError, match="scale_inv is"):
        scaled_mm(QTensor(qa.qdata, qa.scale_inv[:, :2], qa.spec), qb)


def test_measure_of_difference_is_half_the_squared_relative_error() -> None:
    x = torch.from_numpy(np.linspace(1, 2, 100))
    assert calc_diff(x * 1.01, x) == pytest.approx(0.5e-4, rel=0.02)


def test_fma_rounds_once() -> None:
    """A sum that FP64 rounds to the middle between two FP32 numbers, from which a second rounding would go astray."""
    scale = 16771426 * 2.0**-67
    found = reference.fma(torch.tensor(524469.0), torch.tensor(scale), torch.tensor(1.0))
    assert float(found) == 1 + 2.0**-23, "the exact sum lies above 1 + 2^-24"
    source = torch.Generator().manual_seed(3)
    x, y, z = (torch.randn(20_000, generator=source) for _ in range(3))
    z = torch.where(
        torch.arange(20_000) % 3 == 0, -(x * y), z * torch.ldexp(torch.ones(()), torch.arange(20_000) % 60 - 30)
    )
    exact = [
        Fraction(a) * Fraction(b) + Fraction(c) for a, b, c in zip(x.tolist(), y.tolist(), z.tolist(), strict=True)
    ]
    error = [abs(Fraction(value) - true) for value, true in zip(reference.fma(x, y, z).tolist(), exact, strict=True)]
    for name in (math.inf, -math.inf):
        near = torch.nextafter(reference.fma(x, y, z), torch.tensor(name)).tolist()
        assert all(own <= abs(Fraction(value) - true) for own, value, true in zip(error, near, exact, strict=True))
    strange = reference.fma(torch.tensor([math.inf, math.nan, 1e38]), torch.tensor([1.0, 1.0, 1e38]), torch.zeros(3))
    assert strange[0] == math.inf and strange[1].isnan() and strange[2] == math.inf


def test_scale_of_a_block_is_the_rounded_product_of_both() -> None:
    """And not their exact product: 7 times that rounds to another number."""
    sa, sb = float.fromhex("0x1.d9c282p+0"), float.fromhex("0x1.a30feap+0")
    spec = QuantSpec(E4M3, (1, 128), "fp32")
    a = QTensor(torch.tensor([[7.0]]).to(torch.float8_e4m3fn), torch.tensor([[sa]]), spec)
    b = QTensor(torch.tensor([[1.0]]).to(torch.float8_e4m3fn), torch.tensor([[sb]]), spec)
    exact = float(torch.tensor(7 * sa * sb, dtype=torch.float64).float())
    found = float(reference.scaled_mm(a, b, out_dtype=torch.float32))
    assert found == float.fromhex("0x1.534afcp+4") != exact == float.fromhex("0x1.534afap+4")
