"""Sums of positive products, which the tensor core cuts to 14 bits: promoted every 128, they lose as much at any K."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton: pip install fp8train[triton]")
from fp8train.backends.hopper import HopperBackend  # noqa: E402
from fp8train.kernels import gemm, gemm_wgrad  # noqa: E402
from fp8train.quant.formats import QuantSpec  # noqa: E402
from fp8train.quant.qtensor import QTensor  # noqa: E402
from fp8train.quant.reference import quantize  # noqa: E402
from tests.hardware import requires_gpu  # noqa: E402
from tests.kernels.products import DEVICE, m_contiguous  # noqa: E402

LARGEST = 1e-3
# Between two K. In the model of backends/hopper.py the bias is -5.0e-4, with a standard deviation of 2e-6 (128 rows) to
# 5e-6 (32 rows) at K = 1024 from one draw to the next, less at a larger K; the K / 128 <= 128 roundings of the FP32 sum
# add 2^-24 each at most, together 8e-6. Without promotion it is 1.5 % at K = 1024 and 7.5 % at 4096.
DRIFT = 2e-5
ROW = "e4m3 1x128"
ENTRIES = [(module, name) for module in (gemm, gemm_wgrad) for name in module.CONFIGS]
Multiply = Callable[[QTensor, QTensor], Tensor]


def biases(multiply: Multiply, left: str, right: str, rows: int, lengths: tuple[int, ...]) -> list[float]:
    """Mean relative error of the sums over each K of products of numbers uniform in [0, 1)."""
    found = []
    for K in lengths:
        draw = torch.Generator().manual_seed(K)
        a, b = (quantize(torch.rand(rows, K, generator=draw), QuantSpec.parse(spec)) for spec in (left, right))
        a, b = (QTensor(q.qdata.to(DEVICE), m_contiguous(q.scale_inv.to(DEVICE)), q.spec) for q in (a, b))
        exact = a.dequantize().double() @ b.dequantize().double().T
        found.append(float((multiply(a, b).double() / exact - 1).mean()))
    return found


def is_promoted(found: list[float]) -> bool:
    return max(map(abs, found)) < LARGEST and max(found) - min(found) < DRIFT


@requires_gpu(sm=90)
@pytest.mark.parametrize(("module", "config"), ENTRIES, ids=lambda x: getattr(x, "__name__", x))
def test_every_entry_loses_under_a_thousandth_and_as_much_at_any_length(module: Any, config: str) -> None:
    run: Any = gemm.gemm if module is gemm else gemm_wgrad.gemm_wgrad
    options = {"config": config} | ({"out_dtype": torch.float32} if module is gemm else {})

    def multiply(a: QTensor, b: QTensor) -> Tensor:
        reason = module.refusal(config, a.qdata, b.qdata, b.scale_inv)
        if reason is not None and torch.cuda.get_device_capability() != (9, 0):
            pytest.skip(reason)
        return run(a.qdata, b.qdata, a.scale_inv, b.scale_inv, **options)

    found = biases(multiply, ROW, "e4m3 128x128" if module is gemm else ROW, 256, (1024, 4096, 16384))
    assert is_promoted(found), found


@pytest.mark.skipif(DEVICE == "cuda", reason="the model of the tensor core runs on a CPU")
@pytest.mark.parametrize(("promote", "good"), [(128, True), (256, False), (None, False)])
def test_the_bounds_tell_promoted_sums_from_others(promote: int | None, good: bool) -> None:
    """Rows with one scale each: the model promotes at every block of scales, too."""

    def multiply(a: QTensor, b: QTensor) -> Tensor:
        return HopperBackend(14, promote).scaled_mm(a, b, None, None, False, torch.float32)

    found = biases(multiply, "e4m3 row fp32", "e4m3 row fp32", 32, (1024, 4096))
    assert is_promoted(found) is good, found
