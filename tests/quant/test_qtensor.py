"""QTensor."""

from __future__ import annotations

import pytest
import torch

from fp8train.quant.formats import QuantSpec
from fp8train.quant.reference import quantize
from tests.quant import oracle
from tests.quant.specs import same_codes, specs
from tests.shapes import matrices, matrix


@specs
@matrices
def test_dequantize_equals_the_exact_product_rounded_once(text: str, rows: int, cols: int) -> None:
    q = quantize(matrix(rows, cols), QuantSpec.parse(text))
    exact = torch.from_numpy(oracle.decoded(q))
    assert torch.equal(q.dequantize(), exact.to(torch.float32))
    # through FP32: with pow2 scales both roundings are exact, with fp32 scales the definition says FP32 first
    assert torch.equal(q.dequantize(torch.bfloat16), exact.to(torch.float32).to(torch.bfloat16))


@pytest.mark.parametrize("text", ["e4m3 128x128 pow2", "e4m3 128x128 fp32", "e4m3 tensor pow2", "e5m2 32x32 pow2"])
@matrices
def test_byte_transpose_of_a_square_block_equals_quantising_the_transpose(text: str, rows: int, cols: int) -> None:
    x = matrix(rows, cols)
    spec = QuantSpec.parse(text)
    turned = quantize(x, spec).transpose()
    assert same_codes(turned, quantize(x.T.contiguous(), spec))
    assert turned.qdata.is_contiguous() and turned.scale_inv.is_contiguous()


@pytest.mark.parametrize("text", ["e4m3 1x128 pow2", "e4m3 row fp32"])
def test_transposing_the_bytes_of_a_row_block_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="QTensor.transpose: block is .*transpose=True"):
        quantize(matrix(8, 8), QuantSpec.parse(text)).transpose()


def test_attributes_name_shape_format_and_block() -> None:
    q = quantize(matrix(3, 200), QuantSpec.parse("e5m2 1x128"))
    assert (tuple(q.shape), q.fmt, q.block) == ((3, 200), "e5m2", (1, 128))
    with pytest.raises(AttributeError):
        q.amax = 1.0  # type: ignore[attr-defined]


@pytest.mark.parametrize("axis", ["row", "column"])
def test_power_of_two_scales_make_a_second_quantisation_lossless(axis: str) -> None:
    # numerics.md 5.2: re-blocked the other way, codes keep their values with pow2 scales; with fp32 ones most change
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    changed = {}
    for kind in ("pow2", "fp32"):
        first = quantize(x, QuantSpec.parse("e4m3 1x128", kind), transpose=axis == "column").dequantize()
        again = quantize(first, QuantSpec.parse("e4m3 1x128", kind), transpose=True).dequantize().T
        changed[kind] = float((again != first).double().mean())
    assert changed["pow2"] < 1e-3 < 0.5 < changed["fp32"]
