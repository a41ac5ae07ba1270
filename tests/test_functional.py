"""fp8train.quantize and fp8train.scaled_mm, as a user calls them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fp8train
from fp8train.errors import BackendError
from fp8train.quant import reference
from fp8train.quant.formats import QuantSpec
from tests.quant.specs import SPECS, same_codes
from tests.shapes import matrix

BACKENDS = ("auto", "cpu", "cpu_torch", "reference")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("text", SPECS)
def test_quantize_gives_the_codes_of_the_definition_on_every_backend(text: str, backend: str) -> None:
    spec = QuantSpec.parse(text)
    options: dict[str, Any] = {"block": spec.block, "fmt": spec.format.name, "scale": spec.scale, "backend": backend}
    x = matrix(150, 300, dtype=torch.bfloat16)
    for transpose in (False, True):
        q = fp8train.quantize(x, transpose=transpose, **options)
        assert isinstance(q, fp8train.QTensor) and q.spec == spec
        assert same_codes(q, reference.quantize(x, spec, transpose=transpose))


def test_defaults_are_the_activations_of_the_blockwise_recipe() -> None:
    assert fp8train.quantize(matrix(5, 300)).spec == QuantSpec.parse("e4m3 1x128 pow2")


@pytest.mark.parametrize("backend", BACKENDS)
def test_scaled_mm_multiplies_what_quantize_made(backend: str) -> None:
    a, b = matrix(33, 300, seed=1), matrix(40, 300, seed=2)
    qa, qb = fp8train.quantize(a), fp8train.quantize(b, block=(128, 128))
    expected = reference.scaled_mm(qa, qb, out_dtype=torch.float32)
    y = fp8train.scaled_mm(qa, qb, out_dtype=torch.float32, backend=backend)
    # both add 300 exact products in FP32: 300 * 2^-24 * 2 of sum |a b| at worst
    assert bool(((y - expected).abs() <= 600 * 2.0**-24 * (qa.dequantize().abs() @ qb.dequantize().abs().T)).all())
    assert fp8train.scaled_mm(qa, qb, backend=backend).dtype is torch.bfloat16


def test_bias_out_and_accumulate() -> None:
    qa, qb = fp8train.quantize(matrix(33, 300)), fp8train.quantize(matrix(40, 300), block=(128, 128))
    bias = torch.linspace(-1, 1, 40)
    y = fp8train.scaled_mm(qa, qb, out_dtype=torch.float32)
    assert torch.equal(fp8train.scaled_mm(qa, qb, bias=bias, out_dtype=torch.float32), y + bias)
    out = torch.full((33, 40), float("nan"))
    assert fp8train.scaled_mm(qa, qb, bias=bias, out=out) is out and torch.equal(out, y + bias)
    assert torch.equal(fp8train.scaled_mm(qa, qb, out=out, accumulate=True), y + bias + y)
    low = torch.zeros(33, 40, dtype=torch.bfloat16)
    assert torch.equal(fp8train.scaled_mm(qa, qb, bias=bias, out=low), (y + bias).to(torch.bfloat16))


def test_error_of_a_product_is_that_of_two_roundings() -> None:
    a, b = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)), torch.randn(128, 512)
    y = fp8train.scaled_mm(fp8train.quantize(a), fp8train.quantize(b, block=(128, 128)), out_dtype=torch.float32)
    # 2.65 % an operand (numerics.md 5.2), sqrt(2) of it for both: 3.75 %
    assert 0.030 < float((y - a @ b.T).norm() / (a @ b.T).norm()) < 0.045


def test_meta_tensors_are_laid_out_without_data() -> None:
    # the backend's C code would read from address 0
    q = fp8train.quantize(torch.empty(300, 200, device="meta"), transpose=True)
    assert q.shape == (200, 300) and q.scale_inv.shape == (200, 3) and q.qdata.is_meta
    assert fp8train.scaled_mm(q, q).shape == (200, 200)


def test_no_gradient_is_recorded() -> None:
    x = matrix(5, 300).requires_grad_(True)
    q = fp8train.quantize(x)
    assert not q.scale_inv.requires_grad and not q.dequantize().requires_grad
    assert torch.equal(q.dequantize(), reference.quantize(x.detach(), q.spec).dequantize())


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.zeros(4), {}, r"x is \[4\] .*needs a matrix"),
        (torch.zeros(2, 3, 4), {}, r"x is \[2, 3, 4\]; needs a matrix"),
        (torch.zeros(3, 4, dtype=torch.float16), {}, "torch.float16; needs"),
        (torch.zeros(3, 4, dtype=torch.float64), {}, "torch.float64; needs"),
        (torch.zeros(3, 4), {"fmt": "int8"}, "fmt is 'int8'; needs one of e4m3, e5m2"),
        (torch.zeros(3, 4), {"block": "col"}, "block is 'col'; needs"),
        (torch.zeros(3, 4), {"block": (0, 128)}, r"block is \(0, 128\); needs"),
        (torch.zeros(3, 4), {"block": 128}, "block is 128; needs"),
        (torch.zeros(3, 4), {"scale": "floor"}, "scale is 'floor'; needs"),
    ],
    ids=["vector", "3-D", "fp16", "fp64", "fmt", "block-name", "block-size", "block-number", "scale"],
)
def test_argument_of_quantize_that_does_not_fit_is_refused(x: Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fp8train.quantize(x, **options)


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(BackendError, match="needs one of"):
        fp8train.quantize(matrix(3, 4), backend="triton9")


def test_arguments_of_scaled_mm_that_do_not_fit_are_refused() -> None:
    qa, qb = fp8train.quantize(matrix(33, 300)), fp8train.quantize(matrix(40, 300))
    for options, message in (
        ({"out_dtype": torch.float16}, "out_dtype is"),
        ({"bias": torch.zeros(41)}, "bias is"),
        ({"accumulate": True}, "accumulate needs"),
        ({"out": torch.zeros(40, 33)}, "out is"),
    ):
        with pytest.raises(ValueError, match=message):
            fp8train.scaled_mm(qa, qb, **options)
    with pytest.raises(ValueError, match="same K"):
        fp8train.scaled_mm(qa, fp8train.quantize(matrix(40, 299)))
    wrong = fp8train.QTensor(qa.qdata, qa.scale_inv[:5], qa.spec)  # C code would read past its end
    with pytest.raises(ValueError, match=r"scale_inv is \[5, 3\]; needs \[33, 3\]"):
        fp8train.scaled_mm(wrong, qb)
