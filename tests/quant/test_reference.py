"""The definition of quantize and dequantize, against an oracle of its own and by its properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fp8train.quant.formats import E4M3, E5M2, Format, QuantSpec
from fp8train.quant.qtensor import QTensor
from fp8train.quant.reference import dequantize, encode, quantize
from tests.quant import oracle
from tests.quant.specs import arrangements, every_bf16, same_bits, same_codes, specs
from tests.shapes import matrices, matrix

formats = pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
kinds = pytest.mark.parametrize("kind", ["pow2", "fp32"])
FLT_MAX = torch.finfo(torch.float32).max


def codes(q: QTensor) -> Tensor:
    return q.qdata.view(torch.uint8)


def assert_equals_oracle(x: Tensor, spec: QuantSpec) -> None:
    q = quantize(x, spec)
    expected, scale = oracle.quantize(x, spec.format.name, spec.block_shape(*x.shape), spec.scale)
    assert np.array_equal(codes(q).numpy(), expected)
    assert same_bits(q.scale_inv, torch.from_numpy(scale))


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (2.0**-10, 0x00),
        (2.0**-10 * 1.0000001, 0x01),
        (2.0**-9, 0x01),
        (2.0**-6, 0x08),
        (17.0, 0x58),
        (18.0, 0x59),
        (19.0, 0x5A),
        (448.0, 0x7E),
        (464.0, 0x7E),
        (465.0, 0x7E),
        (-1e30, 0xFE),
        (-0.0, 0x80),
        (float("nan"), 0x7F),
        (float("inf"), 0x7E),
    ],
    ids=str,
)
def test_golden_codes_of_e4m3(value: float, code: int) -> None:
    assert encode(torch.tensor([value]), QuantSpec(E4M3, (1, 128))).item() == code


@formats
def test_rounding_is_to_nearest_even_on_every_midpoint_and_one_ulp_beside_it(fmt: Format) -> None:
    table = oracle.MAGNITUDES[fmt.name]
    middle = torch.from_numpy(np.concatenate([(table[1:] + table[:-1]) / 2, table])).to(torch.float32)
    values = torch.cat([middle, torch.nextafter(middle, torch.tensor(0.0)), torch.nextafter(middle, torch.tensor(1e9))])
    values = torch.cat([values, -values])
    made = encode(values, QuantSpec(fmt, (1, 128)))
    assert np.array_equal(made.numpy(), oracle.codes_of(values.numpy(), fmt.name))


@specs
@matrices
def test_codes_and_scales_equal_the_oracle(text: str, rows: int, cols: int) -> None:
    spec = QuantSpec.parse(text)
    for dtype in (torch.bfloat16, torch.float32):
        assert_equals_oracle(matrix(rows, cols, dtype=dtype), spec)


@formats
@kinds
@arrangements
def test_every_bf16_number_equals_the_oracle(fmt: Format, kind: str, arrangement: str) -> None:
    x = every_bf16(arrangement)
    q = quantize(x, QuantSpec(fmt, (1, 128), kind))  # type: ignore[arg-type]
    expected, scale = oracle.quantize_blocks(x.to(torch.float32).numpy(), fmt.name, kind)
    assert np.array_equal(codes(q).numpy(), expected)
    assert same_bits(q.scale_inv[:, 0], torch.from_numpy(scale))


@formats
def test_fp32_scale_gives_amax_the_largest_code_and_keeps_codes_when_repeated(fmt: Format) -> None:
    spec = QuantSpec(fmt, (1, 128), "fp32")
    x = matrix(256, 384)
    q = quantize(x, spec)
    at_amax = torch.gather(codes(q).view(256, 3, 128), 2, x.view(256, 3, 128).abs().argmax(-1, keepdim=True))
    largest = int(torch.tensor(fmt.max).to(fmt.dtype).view(torch.uint8))
    assert bool(((at_amax & 0x7F) == largest).all())
    assert torch.equal(codes(quantize(q.dequantize(), spec)), codes(q))


@formats
def test_power_of_two_scale_uses_the_upper_binade_and_keeps_values_when_repeated(fmt: Format) -> None:
    spec = QuantSpec(fmt, (1, 128), "pow2")
    x = matrix(256, 384)
    q = quantize(x, spec)
    largest = q.qdata.to(torch.float32).abs().view(256, 3, 128).amax(-1)
    assert bool((largest >= fmt.max / 2).all()) and bool((largest <= fmt.max).all())
    assert torch.equal(quantize(q.dequantize(), spec).dequantize(), q.dequantize())


@formats
def test_power_of_two_scale_never_saturates(fmt: Format) -> None:
    x = random_bits(4096, 128)
    q = quantize(x, QuantSpec(fmt, (1, 128), "pow2"))
    excess = x.to(torch.float64).abs().amax(1, keepdim=True) / q.scale_inv.to(torch.float64)
    assert bool((excess <= fmt.max).all())


@specs
def test_dequantised_value_is_within_half_a_step_of_the_input(text: str) -> None:
    spec = QuantSpec.parse(text)
    x = matrix(303, 300)
    step = 2.0 ** -(spec.format.mantissa_bits + 1)  # relative, for normal codes
    q = quantize(x, spec)
    scale = torch.from_numpy(np.abs(oracle.decoded(QTensor(torch.ones_like(x).to(q.qdata.dtype), q.scale_inv, spec))))
    bound = torch.maximum(step * x.abs(), oracle.MAGNITUDES[spec.format.name][1] / 2 * scale)
    # x * (1 / scale_inv) * scale_inv is off by three FP32 roundings, 1.5 * 2^-23 relative
    assert bool(((q.dequantize() - x).abs() <= bound + 2.0**-22 * x.abs()).all())


@specs
def test_zero_block_gets_scale_one_and_zero_codes_that_keep_their_sign(text: str) -> None:
    x = torch.zeros(256, 256)
    x[0, 0] = -0.0
    q = quantize(x, QuantSpec.parse(text))
    assert bool((q.scale_inv == 1).all())
    assert codes(q)[0, 0] == 0x80 and int(codes(q).count_nonzero()) == 1


@specs
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=["nan", "inf", "-inf"])
def test_non_finite_element_makes_its_block_nan_and_touches_no_other(text: str, value: float) -> None:
    spec = QuantSpec.parse(text)
    x = matrix(256, 256)
    clean = quantize(x, spec)
    x[130, 200] = value
    q = quantize(x, spec)
    rows, cols = spec.block_shape(256, 256)
    struck = torch.zeros(256, 256, dtype=torch.bool)
    struck[130 // rows * rows : (130 // rows + 1) * rows, 200 // cols * cols : (200 // cols + 1) * cols] = True
    assert bool((codes(q)[struck] == 0x7F).all()) and bool(q.dequantize()[struck].isnan().all())
    assert torch.equal(codes(q)[~struck], codes(clean)[~struck])
    assert q.scale_inv.isnan().nonzero().tolist() == [[130 // rows, 200 // cols]]
    assert torch.equal(q.dequantize()[~struck], clean.dequantize()[~struck])


@formats
@kinds
def test_subnormal_block_stays_finite_and_equals_the_oracle(fmt: Format, kind: str) -> None:
    x = matrix(64, 256) * 2.0**-130
    x[::7] = 2.0**-149
    assert 0 < x.abs().max() < 2.0**-110 and bool((x != 0).any())
    spec = QuantSpec(fmt, (1, 128), kind)  # type: ignore[arg-type]
    assert_equals_oracle(x, spec)
    assert bool(quantize(x, spec).dequantize().isfinite().all())


@formats
@kinds
@pytest.mark.parametrize("exponent", [-100, -40, -1, 1, 40, 100])
def test_scaling_by_a_power_of_two_changes_scales_only(fmt: Format, kind: str, exponent: int) -> None:
    # DESIGN 2: as long as max * 2^-126 <= 2^k amax <= 2^127 and no element is subnormal; here 1, elements >= 2^-9
    x = torch.rand(64, 256, generator=torch.Generator().manual_seed(0)).clamp_min(2.0**-9)
    x[:, ::128] = 1.0
    spec = QuantSpec(fmt, (1, 128), kind)  # type: ignore[arg-type]
    q, scaled = quantize(x, spec), quantize(x * 2.0**exponent, spec)
    assert torch.equal(codes(q), codes(scaled))
    assert torch.equal(q.scale_inv * 2.0**exponent, scaled.scale_inv)


@formats
@kinds
@pytest.mark.parametrize("exponent", [-148, -126, -117, -103, 127], ids=str)
def test_at_the_ends_of_the_range_values_stay_finite_and_the_scale_normal(
    fmt: Format, kind: str, exponent: int
) -> None:
    x = (1 + torch.rand(8, 128, generator=torch.Generator().manual_seed(0))).clamp_max(1.99) * 2.0**exponent
    q = quantize(x, QuantSpec(fmt, (1, 128), kind))  # type: ignore[arg-type]
    assert bool((q.scale_inv >= 2.0**-126).all()) and bool(q.scale_inv.isfinite().all())
    assert bool(q.dequantize().isfinite().all())


@specs
def test_largest_finite_number_is_decoded_to_a_finite_one(text: str) -> None:
    x = torch.full((128, 128), FLT_MAX)
    for dtype in (torch.float32, torch.bfloat16):
        value = quantize(x, QuantSpec.parse(text)).dequantize(dtype)
        assert value.dtype is dtype and bool(value.isfinite().all())
        assert value.max() > FLT_MAX / 1.1


@specs
@pytest.mark.parametrize(("rows", "cols"), [(303, 300), (1, 1), (130, 5), (5, 130)], ids=str)
def test_ragged_matrix_equals_the_cropped_zero_padded_one(text: str, rows: int, cols: int) -> None:
    spec = QuantSpec.parse(text)
    x = matrix(rows, cols)
    padded = torch.zeros(rows + 128 - rows % 128, cols + 128 - cols % 128)
    padded[:rows, :cols] = x
    q, whole = quantize(x, spec), quantize(padded, spec)
    assert torch.equal(codes(q), codes(whole)[:rows, :cols])
    assert torch.equal(q.scale_inv, whole.scale_inv[: q.scale_inv.shape[0], : q.scale_inv.shape[1]])


@specs
@matrices
def test_transpose_quantises_the_transposed_matrix(text: str, rows: int, cols: int) -> None:
    spec = QuantSpec.parse(text)
    x = matrix(rows, cols)
    made, expected = quantize(x, spec, transpose=True), quantize(x.T.contiguous(), spec)
    assert made.shape == (cols, rows) and made.qdata.is_contiguous() and same_codes(made, expected)


@specs
def test_stack_of_matrices_is_quantised_matrix_by_matrix(text: str) -> None:
    spec = QuantSpec.parse(text)
    x = torch.stack([matrix(130, 200, seed=seed) * 10**seed for seed in range(3)])
    for transpose in (False, True):
        whole = quantize(x, spec, transpose=transpose)
        for i in range(3):
            one = quantize(x[i], spec, transpose=transpose)
            assert same_codes(one, QTensor(whole.qdata[i], whole.scale_inv[i], spec))
            assert torch.equal(dequantize(whole)[i], dequantize(one))


@specs
def test_magnitude_planted_in_one_block_changes_that_block_only(text: str) -> None:
    spec = QuantSpec.parse(text)
    x = torch.ones(256, 256)
    base = quantize(x, spec)
    x[130, 200] = 1000.0
    q = quantize(x, spec)
    rows, cols = spec.block_shape(256, 256)
    assert (q.scale_inv != base.scale_inv).nonzero().tolist() == [[130 // rows, 200 // cols]]
    changed = (codes(q) != codes(base)).nonzero()
    block = torch.tensor([rows, cols])
    assert bool(((changed // block) == torch.tensor([130, 200]) // block).all())
    assert len(changed) >= rows * cols - 1  # the planted element may have the code that the largest had before


@kinds
def test_rows_of_very_different_magnitude_need_blocks_along_the_row(kind: str) -> None:
    # numerics.md 5.2: rows imbalanced by a lognormal with sigma 2; the overall error of 128x128 blocks hides it
    generator = torch.Generator().manual_seed(0)
    dy = torch.randn(512, 512, generator=generator) * torch.exp(2 * torch.randn(512, 1, generator=generator))

    def errors(block: tuple[int, int]) -> tuple[float, float]:
        error = quantize(dy, QuantSpec(E4M3, block, kind)).dequantize() - dy  # type: ignore[arg-type]
        return float((error.norm(dim=1) / dy.norm(dim=1)).max()), float(error.norm() / dy.norm())

    worst_row, _ = errors((1, 128))
    worst_row_square, overall_square = errors((128, 128))
    assert worst_row < 0.04
    assert worst_row_square > 0.10 and overall_square < 0.04


@specs
def test_quantize_leaves_its_input_alone(text: str) -> None:
    x = matrix(130, 130)
    kept = x.clone()
    quantize(x, QuantSpec.parse(text), transpose=True)
    assert torch.equal(x, kept)


@pytest.mark.parametrize(
    "x",
    [torch.zeros(4), torch.zeros(4, 4, dtype=torch.float16), torch.zeros(4, 4, dtype=torch.int32), torch.tensor(1.0)],
    ids=["vector", "fp16", "int32", "scalar"],
)
def test_input_that_is_no_matrix_in_bf16_or_fp32_is_refused(x: Tensor) -> None:
    with pytest.raises(ValueError, match="quantize: x is .*needs a matrix"):
        quantize(x, QuantSpec(E4M3, (1, 128)))


def random_bits(rows: int, cols: int) -> Tensor:
    """Finite FP32 numbers, each row within 2^20 of an exponent of its own, from subnormal to 2^127."""
    generator = torch.Generator().manual_seed(2)
    exponent = torch.randint(-149, 127, (rows, 1), generator=generator).to(torch.float64)
    spread = torch.randint(-20, 1, (rows, cols), generator=generator).to(torch.float64)
    mantissa = 1 + torch.rand(rows, cols, generator=generator, dtype=torch.float64) * (1 - 2.0**-24)
    return (mantissa * 2 ** (exponent + spread)).to(torch.float32)
