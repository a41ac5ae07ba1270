"""The operators torch.ops.fp8train.*: schemas, fakes, compilation and counting.

torch.library.opcheck compares an operator's arguments before and after with allclose, which has no kernel for float8:
its "test_schema" is left out for operators with FP8 inputs; what it would find, an undeclared write, is tested below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fp8train.backends import ops
from fp8train.backends.coverage import COUNTS, GemmCount
from fp8train.quant import reference
from fp8train.quant.formats import QuantSpec
from tests.quant.specs import SPECS
from tests.shapes import matrix

OPS = torch.ops.fp8train
BACKEND = "cpu"
FP8_CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
X, W = "e4m3 1x128 pow2", "e4m3 128x128 pow2"


def quantised(rows: int, cols: int, spec: str, seed: int = 0) -> tuple[Tensor, Tensor, str]:
    q = reference.quantize(matrix(rows, cols, seed=seed), QuantSpec.parse(spec))
    return q.qdata, q.scale_inv, spec


def calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """One call of every operator."""
    a, b = quantised(33, 300, X, 1), quantised(40, 300, W, 2)
    high = matrix(33, 300, dtype=torch.bfloat16), matrix(40, 300, dtype=torch.bfloat16)
    gemm = (BACKEND, 7, "fprop")
    return {
        "quantize": (OPS.quantize.default, (matrix(33, 300), X, False, BACKEND)),
        "quantize-transposed": (OPS.quantize.default, (matrix(33, 300), X, True, BACKEND)),
        "quantize_dual": (OPS.quantize_dual.default, (matrix(33, 300), X, X, BACKEND)),
        "requantize": (OPS.requantize.default, (*a, X, BACKEND)),
        "transpose_codes": (OPS.transpose_codes.default, (*b, a[0], BACKEND)),
        "dequantize": (OPS.dequantize.default, (*a, torch.bfloat16, BACKEND)),
        "noisy": (OPS.noisy.default, (matrix(33, 300), 0.0265, torch.bfloat16)),
        "scaled_mm": (OPS.scaled_mm.default, (*a, *b, torch.ones(40), torch.bfloat16, *gemm)),
        "scaled_mm_add_": (OPS.scaled_mm_add_.default, (torch.ones(33, 40), *a, *b, *gemm)),
        "mm": (OPS.mm.default, (*high, None, torch.float32, *gemm)),
        "mm_add_": (OPS.mm_add_.default, (torch.ones(33, 40), *high, *gemm)),
    }


CALLS = calls()
every_op = pytest.mark.parametrize("name", list(CALLS))


def test_every_operator_is_called_here() -> None:
    assert {name.split("-")[0] for name in CALLS} == {name for name in vars(ops.OPS) if name in vars(ops)}


@every_op
@pytest.mark.uninitialized_memory  # opcheck turns deterministic algorithms off and on itself
def test_opcheck_accepts_schema_fake_and_compilation(name: str) -> None:
    op, arguments = CALLS[name]
    fp8 = any(isinstance(value, Tensor) and value.dtype.itemsize == 1 for value in arguments)
    checks = FP8_CHECKS if fp8 else ("test_schema", *FP8_CHECKS)
    torch.library.opcheck(op, arguments, test_utils=checks)


def test_results_are_contiguous_as_fakes_promise() -> None:
    turned = matrix(300, 33).t()
    assert OPS.noisy(turned, 0.0265, torch.float32).is_contiguous() and not turned.is_contiguous()


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch has no _scaled_mm for CPUs before 2.13")
def test_part_of_a_padded_product_is_contiguous() -> None:
    tensorwise = quantised(33, 300, "e4m3 tensor fp32"), quantised(37, 300, "e4m3 tensor fp32")
    for dtype in (torch.bfloat16, torch.float32):  # cuBLASLt's product of 37 padded rows has 48 columns
        y = OPS.scaled_mm(*tensorwise[0], *tensorwise[1], None, dtype, "cublaslt", 7, "fprop")
        assert y.shape == (33, 37) and y.is_contiguous()


@every_op
def test_only_the_declared_argument_is_written(name: str) -> None:
    op, arguments = CALLS[name]
    arguments = tuple(value.clone() if isinstance(value, Tensor) else value for value in arguments)
    before = [value.clone() if isinstance(value, Tensor) else value for value in arguments]
    op(*arguments)
    for declared, value, kept in zip(op._schema.arguments, arguments, before, strict=True):
        if isinstance(value, Tensor):
            unchanged = torch.equal(as_bytes(value), as_bytes(kept))
            written = declared.alias_info is not None and declared.alias_info.is_write
            assert unchanged != written, declared.name


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("sizes", [(33, 300), (0, 128), (128, 0), (1, 1)], ids=str)
def test_fake_has_shapes_dtypes_and_strides_of_the_result(text: str, sizes: tuple[int, int]) -> None:
    for transpose in (False, True):
        real = OPS.quantize(matrix(*sizes), text, transpose, BACKEND)
        meta = OPS.quantize(torch.empty(*sizes, device="meta"), text, transpose, BACKEND)
        with FakeTensorMode():
            fake = OPS.quantize(torch.empty(*sizes), text, transpose, BACKEND)
        for made, *others in zip(real, meta, fake, strict=True):
            for other in others:
                assert layout(other) == layout(made)


def test_meta_tensors_pass_through_a_whole_product() -> None:
    a = OPS.quantize(torch.empty(33, 300, device="meta"), X, False, BACKEND)
    b = OPS.quantize(torch.empty(40, 300, device="meta"), W, False, BACKEND)
    y = OPS.scaled_mm(*a, X, *b, W, None, torch.bfloat16, BACKEND, 0, "fprop")
    assert y.shape == (33, 40) and y.dtype is torch.bfloat16 and y.is_meta


COMPILED: dict[str, Callable[..., Any]] = {
    "quantize": lambda x, w: OPS.quantize(x * 2, X, True, BACKEND)[1],
    "quantize_dual": lambda x, w: OPS.quantize_dual(x * 2, X, X, BACKEND)[3],
    "scaled_mm": lambda x, w: OPS.scaled_mm(
        *OPS.quantize(x * 2, X, False, BACKEND), X, *OPS.quantize(w, W, False, BACKEND), W,
        None, torch.float32, BACKEND, 0, "fprop",
    ),
    "mm": lambda x, w: OPS.mm(x * 2, w, None, torch.float32, BACKEND, 0, "fprop") + 1,
}  # fmt: skip


@pytest.mark.parametrize("name", list(COMPILED))
def test_compiled_operator_equals_the_eager_one(name: str) -> None:
    x, w = matrix(33, 300), matrix(40, 300, seed=1)
    compiled = torch.compile(COMPILED[name], backend="aot_eager", fullgraph=True, dynamic=False)
    assert torch.equal(compiled(x, w), COMPILED[name](x, w))


def test_gemms_count_tokens_for_their_site_and_quantisers_count_nothing() -> None:
    COUNTS.reset()
    a, b = quantised(33, 300, X, 1), quantised(40, 300, W, 2)
    high = matrix(33, 300), matrix(40, 300)
    OPS.quantize(high[0], X, False, BACKEND)
    OPS.scaled_mm(*a, *b, None, torch.float32, BACKEND, 5, "fprop")
    OPS.scaled_mm_add_(torch.zeros(33, 40), *a, *b, BACKEND, 5, "wgrad")  # dy.T [N, M] and x.T [K, M]: tokens are M
    OPS.mm(*high, None, torch.float32, BACKEND, 6, "dgrad")
    OPS.mm_add_(torch.zeros(33, 40), *high, BACKEND, 6, "wgrad")
    OPS.scaled_mm(*a, *b, None, torch.float32, BACKEND, 0, "fprop")
    assert COUNTS.snapshot() == {
        5: {"fprop": GemmCount(1, 0, 33, 0), "wgrad": GemmCount(1, 0, 300, 0)},
        6: {"dgrad": GemmCount(0, 1, 0, 33), "wgrad": GemmCount(0, 1, 0, 300)},
    }
    COUNTS.reset()


def test_requantised_copy_is_the_decoded_row_copy_quantised_along_columns() -> None:
    for kind in ("pow2", "fp32"):
        spec = QuantSpec.parse("e4m3 1x128", kind)
        q = reference.quantize(matrix(300, 140), spec)
        made, scale = OPS.requantize(q.qdata, q.scale_inv, str(spec), str(spec), BACKEND)
        expected = reference.quantize(q.dequantize(), spec, transpose=True)
        assert torch.equal(as_bytes(made), as_bytes(expected.qdata)) and torch.equal(scale, expected.scale_inv)


@pytest.mark.parametrize("backend", ["cpu", "cpu_torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32], ids=str)
def test_quantisers_refuse_a_dtype_that_they_would_misread(backend: str, dtype: torch.dtype) -> None:
    x = torch.ones(4, 4, dtype=dtype)
    with pytest.raises(ValueError, match="quantize: x is"):
        OPS.quantize(x, X, False, backend)
    with pytest.raises(ValueError, match="quantize: x is"):
        OPS.quantize_dual(x, X, X, backend)


def layout(x: Tensor) -> tuple[Any, ...]:
    """Shape, dtype, and the strides that matter."""
    pairs = zip(x.shape, x.stride(), strict=True)
    return (
        x.shape,
        x.dtype,
        [stride for size, stride in pairs if size > 1 and x.numel()],
    )


def as_bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)
