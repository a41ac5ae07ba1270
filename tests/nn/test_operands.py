"""Operands of one GEMM: FP8, or high precision."""

from __future__ import annotations

import pytest
import torch

from fp8train.nn.operands import Operand, as_matrix, gemm, gemm_add_, quantized, quantized_both, requantized, widened
from fp8train.quant import reference
from fp8train.quant.formats import QuantSpec
from tests.nn.precisions import normal
from tests.quant.test_reference_gemm import calc_diff

X, W = QuantSpec.parse("e4m3 1x128"), QuantSpec.parse("e4m3 128x128")
PLAIN = {"high": torch.bfloat16, "backend": "cpu", "site": 0, "name": "fprop"}


@pytest.mark.parametrize("lead", [(), (0,), (5,), (2, 3), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("K", [0, 7])
def test_any_leading_shape_becomes_a_matrix(lead: tuple[int, ...], K: int) -> None:
    x = normal(*lead, K)
    rows = 1
    for size in lead:
        rows *= size
    assert as_matrix(x).shape == (rows, K) and torch.equal(as_matrix(x).flatten(), x.flatten())


@pytest.mark.parametrize("high", [torch.bfloat16, torch.float32], ids=str)
def test_operand_without_a_specification_is_cast_only(high: torch.dtype) -> None:
    x = normal(6, 130)
    for transpose in (False, True):
        operand = quantized(x, None, high, transpose, "cpu")
        assert operand.spec is None and operand.scale_inv is None
        assert torch.equal(operand.data, (x.T if transpose else x).to(high))


def test_both_operands_are_those_made_one_by_one() -> None:
    x = normal(150, 130)
    for row, col in ((X, X), (X, None), (None, X), (None, None)):
        for made, alone in zip(
            quantized_both(x, row, col, torch.bfloat16, "cpu"),
            (quantized(x, row, torch.bfloat16, False, "cpu"), quantized(x, col, torch.bfloat16, True, "cpu")),
            strict=True,
        ):
            assert made.spec == alone.spec and torch.equal(made.data.float(), alone.data.float())
            assert (made.scale_inv is None) == (alone.scale_inv is None)
            assert made.scale_inv is None or torch.equal(made.scale_inv, alone.scale_inv)


@pytest.mark.parametrize("left", [X, None], ids=["fp8", "high"])
@pytest.mark.parametrize("right", [W, None], ids=["fp8", "high"])
def test_gemm_of_any_mixture_is_the_product_of_what_the_operands_decode_to(
    left: QuantSpec | None, right: QuantSpec | None
) -> None:
    a = quantized(normal(33, 130), left, torch.bfloat16, False, "cpu")
    b = quantized(normal(40, 130, seed=1), right, torch.bfloat16, False, "cpu")
    expected = widened(a, torch.float32, "cpu").double() @ widened(b, torch.float32, "cpu").double().T
    y = gemm(a, b, bias=None, out_dtype=torch.float32, **PLAIN)
    assert calc_diff(y, expected) < 1e-12  # 130 FP32 additions
    out = torch.ones(33, 40)
    gemm_add_(out, a, b, **PLAIN)
    assert torch.equal(out, 1 + y)


def test_requantised_operand_has_the_codes_of_the_decoded_rows() -> None:
    row = quantized(normal(150, 130), X, torch.bfloat16, False, "cpu")
    col = requantized(row, X, "cpu")
    expected = reference.quantize(widened(row, torch.float32, "cpu"), X, transpose=True)
    assert isinstance(col, Operand) and torch.equal(col.data.view(torch.uint8), expected.qdata.view(torch.uint8))
    assert torch.equal(col.scale_inv, expected.scale_inv)
