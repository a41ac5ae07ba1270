"""What a fused kernel computes is compared with the definition, not with itself; its faults are named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton: pip install fp8train[triton]")
from fp8train.backends.code_checks import check_codes  # noqa: E402
from fp8train.backends.kernel_codes import kernel  # noqa: E402
from fp8train.backends.producer_checks import PRODUCERS, check_producer  # noqa: E402
from tests.hardware import devices  # noqa: E402

CPU = torch.device("cpu")
SHAPE = (77, 131)
PARTS = {"rmsnorm_quantize": ("y",), "swiglu_quantize": ("h",), "swiglu_backward_quantize": ("dgate", "dup")}
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])


@pytest.mark.parametrize("operation", PRODUCERS)
@dtypes
@pytest.mark.parametrize("device", devices())
def test_the_kernels_compute_the_definition(operation: str, dtype: torch.dtype, device: str) -> None:
    for shape in ((256, 384), SHAPE):
        assert check_producer(operation, shape, dtype, torch.device(device)) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels call no Python function")
@pytest.mark.parametrize("factors", [(1.2, 1.0), (1.0, 1.01)], ids=["result", "argument"])
@pytest.mark.parametrize("operation", PRODUCERS[1:])
def test_another_sigmoid_is_refused_where_both_kernels_have_it(
    operation: str, factors: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fused kernel and the plain one agree in every bit, and are wrong."""
    module = kernel(operation)
    right = module.sigmoid
    monkeypatch.setattr(module, "sigmoid", lambda x: right(x * factors[1]) * factors[0])
    assert "differs from the definition for [77, 131] bfloat16" in str(check_codes(operation, "bf16", CPU, (SHAPE,)))


@pytest.mark.parametrize("part", [(operation, part) for operation in PRODUCERS for part in PARTS[operation]], ids=str)
@dtypes
@pytest.mark.parametrize("fault", ["scaled", "one", "nan"])
def test_what_is_off_is_named(
    part: tuple[str, str], dtype: torch.dtype, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation, name = part
    module, function = kernel(operation), operation.removesuffix("_quantize")
    run, number = getattr(module, function), PARTS[operation].index(name)

    def spoilt(*arguments: Any, **options: Any) -> Any:
        made = run(*arguments, **options)
        x: Tensor = made if isinstance(made, Tensor) else made[number]
        if fault == "scaled":
            x.mul_(1.005)  # less than a place of BF16, of most numbers
        else:
            x.view(-1)[70] = float("nan") if fault == "nan" else x.view(-1)[70] * 1.02
        return made

    monkeypatch.setattr(module, function, spoilt)
    assert check_producer(operation, SHAPE, dtype, CPU) == name
