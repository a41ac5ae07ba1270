"""Dimensions that 32 bits cannot count are refused by every kernel; shown on the meta device, which has no memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton: pip install fp8train[triton]")
from fp8train.kernels import (  # noqa: E402
    gemm,
    gemm_wgrad,
    quantize,
    quantize_weight,
    rmsnorm_backward,
    rmsnorm_quantize,
    rmsnorm_rstd,
    rope,
    swiglu_backward_quantize,
    swiglu_quantize,
)
from fp8train.kernels.gemm_tile import tile_of  # noqa: E402
from fp8train.kernels.launch import SIZE_LIMIT  # noqa: E402
from fp8train.kernels.tile_launch import check_matrix  # noqa: E402

MESSAGE = r"needs .*below 2\^31 - 4096.* Split "
FORMAT: dict[str, Any] = {"fp8_dtype": torch.float8_e4m3fn, "pow2": True}
CALLS = {
    "quantize_rows": lambda x: quantize.quantize_rows(x, **FORMAT),
    "quantize_columns": lambda x: quantize.quantize_columns(x, **FORMAT),
    "quantize_dual": lambda x: quantize.quantize_dual(x, **FORMAT),
    "quantize_weight": lambda x: quantize_weight.quantize_weight(x, **FORMAT),
    "rstd": lambda x: rmsnorm_rstd.rstd(x, eps=1e-5),
    "add_rstd": lambda x: rmsnorm_rstd.add_rstd(x, x, eps=1e-5),
    "rmsnorm": lambda x: rmsnorm_quantize.rmsnorm(x, x[0].float(), x[:, 0].float()),
    "rmsnorm_quantize": lambda x: rmsnorm_quantize.rmsnorm_quantize(x, x[0].float(), x[:, 0].float(), **FORMAT),
    "rmsnorm_backward": lambda x: rmsnorm_backward.rmsnorm_backward(x, x, x[0].float(), x[:, 0].float()),
    "rope": lambda x: rope.rope(x[None, None], x, x, out_dtype=x.dtype),
    "swiglu": lambda x: swiglu_quantize.swiglu(x, x),
    "swiglu_quantize": lambda x: swiglu_quantize.swiglu_quantize(x, x, **FORMAT),
    "swiglu_backward": lambda x: swiglu_backward_quantize.swiglu_backward(x, x, x),
    "swiglu_backward_quantize": lambda x: swiglu_backward_quantize.swiglu_backward_quantize(x, x, x, **FORMAT),
}
gemms = pytest.mark.parametrize("module", [gemm, gemm_wgrad], ids=["gemm", "gemm_wgrad"])
dimensions = pytest.mark.parametrize("dimension", range(3), ids=["M", "N", "K"])


@pytest.mark.parametrize("name", list(CALLS))
@pytest.mark.parametrize("shape", [(SIZE_LIMIT, 2), (2, SIZE_LIMIT)], ids=["rows", "columns"])
def test_a_matrix_of_too_many_rows_or_columns_is_refused(name: str, shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"^{name}: .*{MESSAGE}"):
        CALLS[name](torch.empty(shape, dtype=torch.bfloat16, device="meta"))


def operands(module: Any, dimension: int, size: int) -> tuple[Tensor, ...]:
    """a, b and their scales, with that size for M, N or K and 16 for the others."""
    M, N, K = (size if dimension == number else 16 for number in range(3))
    shapes = (M, K), (N, K), (M, -(-K // 128)), (-(-N // module.GEMM.b_rows), -(-K // 128))
    dtypes = (torch.float8_e4m3fn, torch.float8_e4m3fn, torch.float32, torch.float32)
    return tuple(torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in zip(shapes, dtypes, strict=True))


@gemms
@dimensions
def test_a_product_of_too_large_a_dimension_is_refused(module: Any, dimension: int) -> None:
    run = gemm.gemm if module is gemm else gemm_wgrad.gemm_wgrad
    for size in (SIZE_LIMIT, 2**31):
        with pytest.raises(ValueError, match=f"^{module.GEMM.name}: M, N, K are .*{MESSAGE}"):
            run(*operands(module, dimension, size))


@gemms
@dimensions
def test_the_largest_dimensions_are_not_refused(module: Any, dimension: int) -> None:
    module.GEMM._check(*operands(module, dimension, SIZE_LIMIT - 1), None, None, torch.float32)
    for shape in ((SIZE_LIMIT - 1, 2), (2, SIZE_LIMIT - 1)):
        check_matrix("any", "x", torch.empty(shape, device="meta"))


@gemms
def test_every_tile_of_the_largest_product_ends_where_32_bits_count(module: Any) -> None:
    for name, entry in module.CONFIGS.items():
        for size in tile_of(entry):
            assert -(-(SIZE_LIMIT - 1) // size) * size < 2**31, name


def test_loops_over_the_largest_matrix_step_no_further_than_32_bits_count() -> None:
    assert SIZE_LIMIT - 1 + rmsnorm_rstd.COLS < 2**31
    programs = rmsnorm_backward._tile(1)[2] * 256  # of a GPU with more multiprocessors than any has
    assert SIZE_LIMIT - 1 + programs < 2**31
