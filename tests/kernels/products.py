"""What tests of the GEMM kernels share: operands, drawn shapes, and the bound that a product must keep."""

from __future__ import annotations

import random
import re

import pytest
import torch
from torch import Tensor

from fp8train.quant.formats import QuantSpec
from fp8train.quant.qtensor import QTensor
from fp8train.quant.reference import quantize
from tests.quant.test_reference_gemm import calc_diff
from tests.shapes import matrix

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# interpreted: sums of at most 128 + K/128 FP32 roundings, 1e-7 squared. On a GPU the tensor core keeps 14 bits of an
# addend: in the model of backends/hopper.py 69 products of MANY numbers and more have 1.3e-8 at most; 571 smaller ones,
# in which one row may count for all, 1.7e-7 (tests/backends/test_hopper.py). BF16 output: 1.4e-6 from rounding, of at
# most 2^-8 each.
FP32_CALC_DIFF, TENSOR_CORE_CALC_DIFF, FEW_CALC_DIFF = 1e-12, 1e-7, 2.5e-7
MANY = 4096
BF16_CALC_DIFF = 5e-6
FEW = 64  # of fewer numbers than this calc_diff is no mean: one alone may round by 2^-8, 7.6e-6; each has its own bound


def quantized(rows: int, cols: int, spec: str, seed: int) -> QTensor:
    """Codes of a matrix whose rows differ in magnitude, on the device under test."""
    q = quantize(matrix(rows, cols, seed=seed), QuantSpec.parse(spec))
    return QTensor(q.qdata.to(DEVICE), q.scale_inv.to(DEVICE), q.spec)


def padded_rows(x: Tensor, multiple: int) -> Tensor:
    """The same matrix with its rows at multiples of `multiple` elements."""
    wide = torch.empty(x.shape[0], -(-x.shape[1] // multiple) * multiple, dtype=torch.uint8, device=x.device).view(
        x.dtype
    )
    view = wide[:, : x.shape[1]]
    view.view(torch.uint8).copy_(x.view(torch.uint8))
    return view


def m_contiguous(scale: Tensor) -> Tensor:
    """The same scales [M, K/128] with M contiguous and padded, as the quantisers write them."""
    rows = -(-(scale.shape[0] + 255) // 16) * 16
    wide = torch.full((scale.shape[1], rows), float("nan"), device=scale.device)
    wide[:, : scale.shape[0]] = scale.T
    return wide.T[: scale.shape[0]]


def has_remedy(refused: pytest.ExceptionInfo[ValueError]) -> bool:
    """Whether a refusal says what it got, what it needs, and what to do."""
    return re.fullmatch(r"\w+: .+; needs .+\. [A-Z].+\.", str(refused.value)) is not None


def drawn_shapes(count: int, seed: int) -> list[tuple[int, int, int]]:
    """M, N, K: mostly within a tile, some over several tiles, sizes around the edges of blocks among them."""
    draw = random.Random(seed)
    edges = [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129]

    def size(limit: int) -> int:
        if draw.random() < 0.3:
            return draw.choice(edges)
        return draw.randint(1, limit if draw.random() < 0.2 else 40)

    return [(size(200), size(200), draw.choice([draw.randint(1, 300), *edges])) for _ in range(count)]


def assert_product(
    y: Tensor,
    a: QTensor,
    b: QTensor,
    plus: Tensor | None = None,
    what: object = None,
    *,
    tensor_core: bool = DEVICE == "cuda",
) -> None:
    """y is a @ b.T (+ plus) as FP64 has it: in the whole, and each element within the bound of its own sum.

    tensor_core: the sums are those of a GPU, or of its model.
    """
    left, right = a.dequantize().double(), b.dequantize().double()
    expected, size = left @ right.T, left.abs() @ right.abs().T
    if plus is not None:
        expected, size = expected + plus.double(), size + plus.double().abs()
    low = y.dtype is torch.bfloat16
    exact = FP32_CALC_DIFF if not tensor_core else TENSOR_CORE_CALC_DIFF if y.numel() >= MANY else FEW_CALC_DIFF
    limit = BF16_CALC_DIFF if low else exact
    if y.numel() >= FEW:
        assert calc_diff(y.cpu(), expected.cpu()) < limit, what
    # worst case: 128 roundings of 2^-24 within a block, one per block, some in the epilogue; BF16 output 2^-9
    bound = (130 + a.shape[1] / 128 + 4) * 2.0**-24 * size + (2.0**-8 * expected.abs() if low else 0)
    if tensor_core:
        bound = bound + _cuts(left.abs(), right.abs())
    assert bool(((y.double() - expected).abs() <= bound).all()), what


def _cuts(left: Tensor, right: Tensor) -> Tensor:
    """What Hopper's tensor core may lose at most: 33 addends of each step lose less than 2^-13 of the largest each."""
    lost = torch.zeros(left.shape[0], right.shape[0], dtype=left.dtype, device=left.device)
    for block in range(0, left.shape[1], 128):
        acc = torch.zeros_like(lost)
        for start in range(block, min(block + 128, left.shape[1]), 32):
            stop = min(start + 32, block + 128)
            products = left[:, None, start:stop] * right[None, :, start:stop]
            lost += 33 * 2.0**-13 * torch.maximum(products.amax(-1), acc)
            acc += products.sum(-1)
    return lost


def planted(M: int, N: int, K: int, at: int, b_rows: int) -> tuple[QTensor, QTensor, Tensor]:
    """a and b with one 1.0 per block of 128 rows, all in column `at`; every scale a power of two of its own.

    Returns:
        a, b and their product, in which each number names the row, the column and the block of K that it came from.
    """
    spec_a, spec_b = QuantSpec.parse("e4m3 1x128"), QuantSpec.parse(f"e4m3 {b_rows}x128")
    made = []
    for rows, spec, first in ((M, spec_a, -20), (N, spec_b, 3)):
        codes = torch.zeros(rows, K)
        codes[5::128, at] = 1.0
        shape = spec.scale_shape(rows, K)
        exponents = (torch.arange(shape[0])[:, None] * 5 + torch.arange(shape[1])[None, :] * 3) % 37 + first
        scales = torch.exp2(exponents.float())
        made.append(QTensor(codes.to(torch.float8_e4m3fn).to(DEVICE), scales.to(DEVICE), spec))
    expected = made[0].dequantize() @ made[1].dequantize().T
    return made[0], made[1], expected
