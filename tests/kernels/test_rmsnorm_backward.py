"""The backward of RMSNorm: the formula in FP64, whatever the shapes, dtypes and strides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton: pip install fp8train[triton]")
from fp8train.kernels.rmsnorm_backward import WIDEST, rmsnorm_backward  # noqa: E402
from tests.kernels.products import DEVICE, has_remedy  # noqa: E402
from tests.shapes import matrix  # noqa: E402

SHAPES = [(128, 128), (131, 50), (5, 3), (40, 1), (1, 4096), (13, 1100)]
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])


def inputs(rows: int, cols: int, dy_dtype: torch.dtype, x_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of x of different magnitude, so that rstd matters."""
    dy, x = matrix(rows, cols, seed=1).to(DEVICE, dy_dtype), matrix(rows, cols, seed=2).to(DEVICE, x_dtype)
    weight = torch.linspace(0.5, 1.5, cols, device=DEVICE)
    return dy, x, weight, (x.double().square().mean(1) + 1e-5).rsqrt().float()


def assert_gradients(
    made: tuple[Tensor, Tensor, Tensor | None],
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    dtotal: Tensor | None = None,
) -> None:
    """Each number within the roundings of its own sum."""
    (rows, cols), (dx, dweight, _) = x.shape, made
    assert dx.dtype is x.dtype and dx.is_contiguous() and dx.shape == x.shape
    assert dweight.dtype is torch.float32 and dweight.shape == (cols,)
    g, wide, r = dy.double() * weight, x.double(), rstd.double()[:, None]
    mean, size = (g * wide).mean(1, keepdim=True), (g * wide).abs().mean(1, keepdim=True)
    place = 2.0**-8 if dx.dtype is torch.bfloat16 else 2.0**-24
    # in FP32: sums of `cols` terms in lanes and pairs, at most `cols` roundings, and twelve single ones
    limit = (cols + 12) * 2.0**-24 * ((g * r).abs() + wide.abs() * r**3 * size)
    exact = g * r - wide * r**3 * mean
    if dx.dtype is torch.bfloat16:
        limit = limit + place * (exact.abs() + limit)
    if dtotal is not None:
        exact = exact + dtotal.double()
        limit = limit + place * (exact.abs() + limit)
    assert bool(((dx.double() - exact).abs() <= limit).all())
    terms = dy.double() * wide * r
    assert bool(((dweight.double() - terms.sum(0)).abs() <= (rows + 4) * 2.0**-24 * terms.abs().sum(0)).all())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dy_dtype", [torch.bfloat16, torch.float32], ids=["dy-bf16", "dy-fp32"])
@dtypes
def test_gradients_are_the_formulas(shape: tuple[int, int], dy_dtype: torch.dtype, dtype: torch.dtype) -> None:
    arguments = inputs(*shape, dy_dtype, dtype)
    assert_gradients(rmsnorm_backward(*arguments), *arguments)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("branch_dtype", [torch.bfloat16, torch.float32, None], ids=["bf16", "fp32", "none"])
@dtypes
def test_the_streams_own_gradient_is_added(
    shape: tuple[int, int], branch_dtype: torch.dtype | None, dtype: torch.dtype
) -> None:
    arguments = inputs(*shape, torch.bfloat16, dtype)
    dtotal = matrix(*shape, seed=3).to(DEVICE, dtype)
    made = rmsnorm_backward(*arguments, dtotal=dtotal, branch_dtype=branch_dtype)
    assert_gradients(made, *arguments, dtotal)
    assert made[2] is None if branch_dtype is None else torch.equal(made[2], made[0].to(branch_dtype))
    if DEVICE == "cpu":  # on a GPU the sums of two compiled kernels may differ in a last place
        alone = rmsnorm_backward(*arguments)
        assert torch.equal(made[0], alone[0] + dtotal) and torch.equal(made[1], alone[1])


def test_the_gradient_of_a_branch_can_be_had_without_one_of_the_stream() -> None:
    arguments = inputs(20, 64, torch.bfloat16, torch.float32)
    made = rmsnorm_backward(*arguments, branch_dtype=torch.bfloat16)
    assert_gradients(made, *arguments)
    assert torch.equal(made[2], made[0].bfloat16())


@dtypes
def test_leading_strides_are_read(dtype: torch.dtype) -> None:
    dy, x, weight, rstd = inputs(60, 200, torch.bfloat16, dtype)
    part = dy[1::2, 16:160], x[::2, 40:184], weight[:144], rstd[::2].contiguous()
    whole = tuple(tensor.contiguous() for tensor in part)
    dtotal = x[1::2, 8:152]
    for more in ({}, {"dtotal": dtotal}):
        made = rmsnorm_backward(*part, **more)
        dense = {name: tensor.contiguous() for name, tensor in more.items()}
        assert all(map(torch.equal, made[:2], rmsnorm_backward(*whole, **dense)[:2]))
        assert_gradients(made, *part, **more)


def test_a_gradient_that_is_one_number_for_all_rows_is_read_by_its_stride() -> None:
    dy, x, weight, rstd = inputs(20, 64, torch.bfloat16, torch.float32)
    assert_gradients(rmsnorm_backward(dy[:1].expand(20, 64), x, weight, rstd), dy[:1].expand(20, 64), x, weight, rstd)


def test_a_row_that_is_nan_makes_its_dx_and_every_dweight_nan_and_no_other_row() -> None:
    dy, x, weight, rstd = inputs(20, 64, torch.bfloat16, torch.float32)
    rstd[3] = float("nan")
    dx, dweight, _ = rmsnorm_backward(dy, x, weight, rstd)
    assert dx[3].isnan().all() and dweight.isnan().all() and not dx[[0, 1, 2, 4, 19]].isnan().any()


@pytest.mark.parametrize("shape", [(0, 40), (3, 0), (0, 0)], ids=str)
def test_no_rows_and_no_columns(shape: tuple[int, int]) -> None:
    arguments = inputs(*shape, torch.bfloat16, torch.float32)
    dx, dweight, dbranch = rmsnorm_backward(*arguments, branch_dtype=torch.bfloat16)
    assert dx.shape == dbranch.shape == shape and torch.equal(dweight, torch.zeros(shape[1], device=DEVICE))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4)}, r"x is \[4\]"),
        ({"dy": torch.zeros(4, 4, dtype=torch.float16)}, "dy is .* torch.float16; needs"),
        ({"dy": torch.zeros(4, 5)}, r"dy is \[4, 5\]; needs \[4, 4\], the shape of x"),
        ({"x": torch.zeros(4, 8)[:, ::2]}, r"x has strides \(8, 2\)"),
        ({"weight": torch.zeros(5)}, r"weight is \[5\] torch.float32, .*needs \[4\]"),
        ({"rstd": torch.zeros(4, dtype=torch.bfloat16)}, r"rstd is \[4\] torch.bfloat16, .*needs \[4\] torch.float32"),
        ({"rstd": torch.zeros(8)[::2]}, r"rstd is .* strides \(2,\); needs \[4\] torch.float32, contiguous"),
        ({"dtotal": torch.zeros(4, 5)}, r"dtotal is \[4, 5\]; needs \[4, 4\], the shape of x"),
        ({"dtotal": torch.zeros(4, 4).bfloat16()}, "dtotal is torch.bfloat16; needs torch.float32, the dtype of x"),
        ({"branch_dtype": torch.float16}, "branch_dtype is torch.float16; needs torch.bfloat16, torch.float32 or None"),
        ({"x": torch.zeros(1, WIDEST + 1), "dy": torch.zeros(1, WIDEST + 1)}, "needs at most 8192 columns"),
    ],
    ids=[
        "vector",
        "fp16",
        "shape",
        "column-stride",
        "long-weight",
        "bf16-rstd",
        "strided-rstd",
        "long-dtotal",
        "bf16-dtotal",
        "fp16-branch",
        "wide",
    ],  # fmt: skip
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    arguments = {"dy": torch.zeros(4, 4), "x": torch.zeros(4, 4), "weight": torch.ones(4), "rstd": torch.ones(4)}
    with pytest.raises(ValueError, match=f"rmsnorm_backward: .*{message}") as refused:
        rmsnorm_backward(**(arguments | change))
    assert has_remedy(refused)
