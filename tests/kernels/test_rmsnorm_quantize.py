"""RMSNorm fused with the quantiser: the unfused path's bits, and torch's numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton: pip install fp8train[triton]")
from fp8train.backends.producers import row_rstd  # noqa: E402
from fp8train.kernels.rmsnorm_quantize import rmsnorm, rmsnorm_quantize  # noqa: E402
from fp8train.models.norm import RMSNorm  # noqa: E402
from fp8train.quant.formats import E4M3, E5M2, QuantSpec  # noqa: E402
from fp8train.quant.qtensor import QTensor  # noqa: E402
from fp8train.quant.reference import quantize  # noqa: E402
from tests.kernels.products import DEVICE, has_remedy  # noqa: E402
from tests.quant.specs import same_codes  # noqa: E402
from tests.shapes import matrix  # noqa: E402

EPS = 1e-5
SHAPES = {"tile": (128, 128), "tiles": (256, 384), "ragged": (131, 50), "small": (5, 3), "no-rows": (0, 40)}
shapes = pytest.mark.parametrize("shape", list(SHAPES.values()), ids=list(SHAPES))
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
VARIANTS = {"pow2": (E4M3, "pow2", "pow2"), "fp32": (E4M3, "fp32", "fp32"), "e5m2-mixed": (E5M2, "fp32", "pow2")}


def inputs(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight = 1 + 0.5 * torch.randn(shape[1], generator=torch.Generator().manual_seed(1))
    return matrix(*shape, dtype=dtype).to(DEVICE), weight.to(DEVICE)


def run(x: Tensor, weight: Tensor, variant: str = "pow2", **more: object) -> tuple[Tensor, ...]:
    fmt, row, col = VARIANTS[variant]
    formats = {"fp8_dtype": fmt.dtype, "pow2": row == "pow2", "col_pow2": col == "pow2"}
    return rmsnorm_quantize(x, weight, row_rstd(x, EPS), **formats, **more)  # type: ignore[arg-type, return-value]


def products(x: Tensor, rstd: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """What torch's rms_norm multiplies, from a given rstd."""
    return ((x.float() * rstd[:, None]) * weight).to(dtype)


def assert_copies_of(copies: tuple[Tensor, ...], y: Tensor, variant: str = "pow2") -> None:
    fmt, row, col = VARIANTS[variant]
    row_spec, col_spec = QuantSpec(fmt, (1, 128), row), QuantSpec(fmt, (1, 128), col)  # type: ignore[arg-type]
    assert same_codes(QTensor(copies[0], copies[1], row_spec), quantize(y, row_spec))
    assert same_codes(QTensor(copies[2], copies[3], col_spec), quantize(y, col_spec, transpose=True))


@shapes
@dtypes
def test_copies_are_those_of_the_unfused_path(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = inputs(shape, dtype)
    y = rmsnorm(x, weight, row_rstd(x, EPS))
    assert torch.equal(y, products(x, row_rstd(x, EPS), weight, torch.bfloat16))
    assert_copies_of(run(x, weight), y)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_formats_and_scales_are_those_asked_for(variant: str) -> None:
    x, weight = inputs((20, 140), torch.bfloat16)
    assert_copies_of(run(x, weight, variant), rmsnorm(x, weight, row_rstd(x, EPS)), variant)


def test_fp32_activations_are_quantised_from_fp32() -> None:
    x, weight = inputs((20, 140), torch.float32)
    copies = run(x, weight, out_dtype=torch.float32)
    assert_copies_of(copies, products(x, row_rstd(x, EPS), weight, torch.float32))


def test_the_row_copy_can_be_had_alone() -> None:
    x, weight = inputs((20, 140), torch.bfloat16)
    q, s, qt, st = run(x, weight, columns=False)
    both = run(x, weight)
    assert qt is None and st is None
    assert torch.equal(q.view(torch.uint8), both[0].view(torch.uint8)) and torch.equal(s, both[1])


@dtypes
def test_numbers_are_the_models_norm(dtype: torch.dtype) -> None:
    x, weight = inputs((140, 240), dtype)
    norm = RMSNorm(240, EPS, device=DEVICE)
    with torch.no_grad():
        norm.weight.copy_(weight)
        theirs = norm(x, torch.bfloat16)
    mine = rmsnorm(x, weight, row_rstd(x, EPS))
    if DEVICE == "cpu":
        assert torch.equal(mine, theirs)
    # on a GPU 12 ulp of FP32 in either rstd fall across the middle of two BF16 numbers: 2 * 24 * 2^-24 / 2^-8 of them
    assert (mine != theirs).float().mean() <= 8e-4
    torch.testing.assert_close(mine.float(), theirs.float(), rtol=2.0**-7, atol=0.0)


@dtypes
@pytest.mark.parametrize("shape", [(60, 160), (256, 144)], ids=["ragged", "whole-tile"])
def test_leading_strides_are_read(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = inputs((shape[0], 208), dtype)
    part, weight = x[1::2, 16 : shape[1]], weight[16 : shape[1]]
    y = rmsnorm(part, weight, row_rstd(part, EPS))
    assert torch.equal(y, rmsnorm(part.contiguous(), weight, row_rstd(part, EPS)))
    assert_copies_of(run(part, weight), y)
    assert_copies_of(run(part, weight, words=False), y)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # of the interpreter
def test_a_row_with_a_non_finite_number_is_nan_and_no_other() -> None:
    x, weight = inputs((6, 300), torch.bfloat16)
    x[2, 290] = float("inf")
    _, s, _, st = run(x, weight)
    assert s.isnan().nonzero().tolist() == [[2, 2]] and st.isnan().nonzero().tolist() == [[290, 0]]


def test_a_row_of_zeros_stays_zero() -> None:
    x, weight = inputs((4, 130), torch.float32)
    x[1] = 0.0
    q, s, _, _ = run(x, weight)
    assert (q[1].float() == 0).all() and (s[1] == 1).all()


def test_no_columns_give_nothing() -> None:
    copies = run(*inputs((3, 0), torch.bfloat16))
    assert copies[0].shape == (3, 0) and copies[2].shape == (0, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4)}, r"x is \[4\]"),
        ({"x": torch.zeros(4, 4, dtype=torch.float16)}, "torch.float16; needs"),
        ({"x": torch.zeros(4, 8)[:, ::2]}, r"x has strides \(8, 2\)"),
        ({"weight": torch.zeros(5)}, r"weight is \[5\] torch.float32, .*; needs \[4\]"),
        ({"weight": torch.zeros(4, dtype=torch.bfloat16)}, "torch.bfloat16, .*; needs"),
        ({"weight": torch.zeros(4, 2)[:, 0]}, r"weight is .* strides \(2,\); needs .* contiguous"),
        ({"rstd": torch.zeros(3)}, r"rstd is \[3\] torch.float32, .*; needs \[4\]"),
        ({"out_dtype": torch.float16}, "out_dtype is torch.float16"),
        ({"fp8_dtype": torch.int8}, "fp8_dtype is torch.int8"),
    ],
    ids=[
        "vector",
        "fp16",
        "column-stride",
        "long-weight",
        "bf16-weight",
        "strided-weight",
        "short-rstd",
        "fp16-out",
        "int8",
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    arguments = {"x": torch.zeros(4, 4), "weight": torch.ones(4), "rstd": torch.ones(4), "pow2": True}
    arguments |= {"fp8_dtype": torch.float8_e4m3fn} | change
    with pytest.raises(ValueError, match=f"rmsnorm_quantize: .*{message}") as refused:
        rmsnorm_quantize(**arguments)  # type: ignore[arg-type]
    assert has_remedy(refused)
