"""The Triton backend on the kernels themselves, interpreted where there is no GPU; and through the operators."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="needs Triton: pip install fp8train[triton]")
from fp8train.backends import get_backend  # noqa: E402
from fp8train.backends import ops as _ops  # noqa: E402, F401  registers torch.ops.fp8train
from fp8train.quant import reference  # noqa: E402
from fp8train.quant.formats import QuantSpec  # noqa: E402
from tests.backends.test_gpu_backends import assert_products  # noqa: E402
from tests.hardware import requires_gpu  # noqa: E402
from tests.kernels.products import DEVICE, assert_product, quantized  # noqa: E402
from tests.quant.specs import SPECS, same_codes  # noqa: E402
from tests.shapes import matrix  # noqa: E402

TRITON = get_backend("triton")


@pytest.mark.skipif(
    DEVICE != "cpu", reason="the products' tolerances are those of the interpreter; the kernels' own tests ran"
)
@pytest.mark.parametrize("right", ["e4m3 128x128", "e4m3 1x128", "e4m3 1x32"])
@pytest.mark.parametrize(("M", "N", "K"), [(64, 48, 144), (33, 50, 300), (0, 5, 128), (5, 6, 0)])
def test_products_with_every_output(M: int, N: int, K: int, right: str) -> None:
    assert_products(TRITON, M, N, K, "e4m3 1x128", right)


@pytest.mark.parametrize(("text", "layout"), [(text, "row-major") for text in SPECS] + [(SPECS[4], "column-major")])
def test_codes_of_every_granularity_equal_the_reference(text: str, layout: str) -> None:
    spec = QuantSpec.parse(text)
    x = matrix(140, 270, layout=layout)
    for transpose in (False, True):
        made = TRITON.quantize(x.to(DEVICE), spec, transpose)
        assert same_codes(_to_cpu(made), reference.quantize(x, spec, transpose=transpose))
    made, turned = TRITON.quantize_dual(x.to(DEVICE), spec, spec)
    assert same_codes(_to_cpu(made), reference.quantize(x, spec))
    assert same_codes(_to_cpu(turned), reference.quantize(x, spec, transpose=True))
    if spec.transposable:
        made, turned = TRITON.quantize_square(x.to(DEVICE), spec)
        assert same_codes(_to_cpu(turned), _to_cpu(made).transpose())


def _to_cpu(q: reference.QTensor) -> reference.QTensor:
    return reference.QTensor(q.qdata.cpu(), q.scale_inv.cpu(), q.spec)


def test_operators_reach_the_kernels() -> None:
    row, square = "e4m3 1x128 pow2", "e4m3 128x128 pow2"
    a, b = quantized(33, 144, row, 1), quantized(40, 144, square, 2)
    operands = (a.qdata, a.scale_inv, row, b.qdata, b.scale_inv, square)
    y = torch.ops.fp8train.scaled_mm(*operands, None, torch.float32, "triton", 0, "fprop")
    assert_product(y, a, b)
    c = quantized(40, 144, row, 3)
    out = torch.ones(33, 40, device=DEVICE)
    torch.ops.fp8train.scaled_mm_add_(out, *operands[:3], c.qdata, c.scale_inv, row, "triton", 0, "wgrad")
    assert_product(out, a, c, torch.ones(33, 40, device=DEVICE))


@pytest.mark.parametrize(("rows", "cols"), [(128, 128), (140, 270), (33, 16), (1, 300)])
@pytest.mark.parametrize("text", ["e4m3 1x128 pow2", "e4m3 128x128 pow2", "e4m3 row fp32"])
def test_fakes_promise_the_strides_that_the_kernels_return(text: str, rows: int, cols: int) -> None:
    x = matrix(rows, cols).to(DEVICE)
    for op, arguments in (
        (torch.ops.fp8train.quantize, (text, False, "triton")),
        (torch.ops.fp8train.quantize, (text, True, "triton")),
        (torch.ops.fp8train.quantize_dual, (text, text, "triton")),
    ):
        made = op(x, *arguments)
        with FakeTensorMode() as mode:
            promised = op(mode.from_tensor(x), *arguments)
        for real, fake in zip(made, promised, strict=True):
            assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


@requires_gpu(sm=90)
@pytest.mark.parametrize("K", [1024, 4096, 16384])
def test_sums_of_positive_products_are_promoted(K: int) -> None:
    """On a GPU: unpromoted, the tensor core's 14 bits lose more the longer the sum; the interpreter cannot show it."""
    for right in ("e4m3 128x128", "e4m3 1x128"):
        a, b = (
            reference.quantize(matrix(256, K, seed=s).abs(), QuantSpec.parse(t))
            for s, t in ((1, "e4m3 1x128"), (2, right))
        )
        a, b = (reference.QTensor(q.qdata.to(DEVICE), q.scale_inv.to(DEVICE), q.spec) for q in (a, b))
        expected = a.dequantize().double() @ b.dequantize().double().T
        y = TRITON.scaled_mm(a, b, None, None, False, torch.float32)
        assert abs(float((y.double() / expected - 1).mean())) < 1e-3
