"""The residual stream's sum is torch's, bit for bit; rstd is the formula's in FP64, but for the roundings of a sum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton: pip install fp8train[triton]")
from fp8train.backends.producer_checks import EPS, rstd_is_off  # noqa: E402
from fp8train.kernels.rmsnorm_rstd import COLS, add_rstd, rstd  # noqa: E402
from tests.kernels.products import DEVICE, has_remedy  # noqa: E402
from tests.shapes import matrix  # noqa: E402

SHAPES = [(128, 128), (131, 50), (5, 3), (40, 1), (1, COLS), (6, COLS + 76), (3, 2048)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
BOTH = [torch.bfloat16, torch.float32]
dtypes = pytest.mark.parametrize("dtype", BOTH, ids=["bf16", "fp32"])


@shapes
@dtypes
def test_rstd_is_exact_but_for_the_sum(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = matrix(*shape).to(DEVICE, dtype)
    made = rstd(x, eps=EPS)
    assert made.dtype is torch.float32 and made.shape == shape[:1] and not rstd_is_off(made, x)


@shapes
@dtypes
@pytest.mark.parametrize("branch_dtype", BOTH, ids=["branch-bf16", "branch-fp32"])
def test_the_sum_is_torchs_and_rstd_that_of_the_sum(
    shape: tuple[int, int], dtype: torch.dtype, branch_dtype: torch.dtype
) -> None:
    x, branch = matrix(*shape, seed=1).to(DEVICE, dtype), matrix(*shape, seed=2).to(DEVICE, branch_dtype)
    total, made = add_rstd(x, branch, eps=EPS)
    assert total.dtype is dtype and total.is_contiguous() and torch.equal(total, (x + branch).to(dtype))
    assert not rstd_is_off(made, total)


def test_squares_are_those_of_the_rounded_sum() -> None:
    """1 + 2^-8 rounds to 1 in BF16; a row of them has the root of 1."""
    x, branch = torch.ones(4, 64, dtype=torch.bfloat16, device=DEVICE), torch.full((4, 64), 2.0**-8, device=DEVICE)
    total, made = add_rstd(x, branch, eps=0.0)
    assert torch.equal(total, x) and torch.equal(made, torch.ones(4, device=DEVICE))


@dtypes
def test_leading_strides_are_read(dtype: torch.dtype) -> None:
    x, branch = matrix(60, 200, seed=1).to(DEVICE, dtype), matrix(60, 400, seed=2).to(DEVICE, torch.bfloat16)
    part, other = x[1::2, 16:160], branch[::2, 40:184]
    made, wanted = add_rstd(part, other, eps=EPS), add_rstd(part.contiguous(), other.contiguous(), eps=EPS)
    assert torch.equal(made[0], wanted[0]) and not rstd_is_off(made[1], wanted[0])
    assert not rstd_is_off(rstd(part, eps=EPS), part)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # of the interpreter
def test_a_row_that_is_not_finite_strikes_no_other() -> None:
    x = matrix(6, 300).to(DEVICE, torch.bfloat16)
    x[2, 290], x[4, 7] = float("inf"), float("nan")
    made = rstd(x, eps=EPS)
    assert made[2] == 0 and made[4].isnan() and made[[0, 1, 3, 5]].isfinite().all()


def test_a_row_of_zeros_has_the_root_of_eps() -> None:
    made = rstd(torch.zeros(3, 130, device=DEVICE), eps=EPS)
    assert made.tolist() == pytest.approx([EPS**-0.5] * 3, rel=2.0**-22)


@pytest.mark.parametrize("shape", [(0, 40), (3, 0), (0, 0)], ids=str)
def test_no_rows_and_no_columns(shape: tuple[int, int]) -> None:
    x = torch.zeros(shape, device=DEVICE)
    total, made = add_rstd(x, x.bfloat16(), eps=EPS)
    assert total.shape == shape and made.shape == shape[:1] and made.isnan().all()  # the mean of no numbers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4)}, r"x is \[4\]"),
        ({"branch": torch.zeros(4, 4, dtype=torch.float16)}, "branch is .* torch.float16; needs"),
        ({"branch": torch.zeros(4, 5)}, r"branch is \[4, 5\]; needs \[4, 4\], the shape of x"),
        ({"x": torch.zeros(4, 8)[:, ::2]}, r"x has strides \(8, 2\)"),
        ({"branch": torch.zeros(4, 8)[:, ::2]}, r"branch has strides \(8, 2\)"),
    ],
    ids=["vector", "fp16", "shape", "column-stride", "branch-stride"],
)
def test_what_does_not_fit_is_refused(change: dict[str, Tensor], message: str) -> None:
    arguments = {"x": torch.zeros(4, 4), "branch": torch.zeros(4, 4)} | change
    with pytest.raises(ValueError, match=f"add_rstd: .*{message}") as refused:
        add_rstd(**arguments, eps=EPS)
    assert has_remedy(refused)
