"""SwiGLU and its backward, fused with the quantiser: the unfused path's bits, and torch's numbers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton: pip install fp8train[triton]")
from fp8train.backends.producer_checks import swiglu_inputs, swiglu_is_off  # noqa: E402
from fp8train.kernels.quantize import quantize_dual  # noqa: E402
from fp8train.kernels.swiglu_backward_quantize import swiglu_backward, swiglu_backward_quantize  # noqa: E402
from fp8train.kernels.swiglu_quantize import swiglu, swiglu_quantize  # noqa: E402
from fp8train.quant.formats import E4M3, E5M2, Format, QuantSpec  # noqa: E402
from fp8train.quant.qtensor import QTensor  # noqa: E402
from fp8train.quant.reference import quantize  # noqa: E402
from tests.kernels.products import DEVICE, has_remedy  # noqa: E402
from tests.quant.specs import same_codes  # noqa: E402

SHAPES = {
    "one-tile": (128, 128),
    "whole-tiles": (256, 384),
    "ragged": (131, 50),
    "below-a-block": (5, 3),
    "no-rows": (0, 40),
    "no-columns": (9, 0),
}
shapes = pytest.mark.parametrize("shape", list(SHAPES.values()), ids=list(SHAPES))
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
VARIANTS = {"pow2": (E4M3, "pow2", "pow2"), "fp32": (E4M3, "fp32", "fp32"), "e5m2-mixed": (E5M2, "fp32", "pow2")}
variants = pytest.mark.parametrize("variant", list(VARIANTS))


def inputs(shape: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """dh, gate and up."""
    return swiglu_inputs(shape, dtype, DEVICE)


def options(variant: str) -> dict[str, object]:
    fmt, row, col = VARIANTS[variant]
    return {"fp8_dtype": fmt.dtype, "pow2": row == "pow2", "col_pow2": col == "pow2"}


def specs(variant: str) -> tuple[QuantSpec, QuantSpec]:
    fmt, row, col = VARIANTS[variant]
    return QuantSpec(fmt, (1, 128), row), QuantSpec(fmt, (1, 128), col)  # type: ignore[arg-type]


def assert_copies_of(copies: tuple[Tensor | None, ...], x: Tensor, variant: str) -> None:
    """The copies are the definition's for x, and so those of the quantiser's own kernel."""
    row, col = specs(variant)
    q, s, qt, st = copies
    assert same_codes(QTensor(q, s, row), quantize(x, row))  # type: ignore[arg-type]
    assert same_codes(QTensor(qt, st, col), quantize(x, col, transpose=True))  # type: ignore[arg-type]


def h_format(variant: str | None) -> tuple[torch.dtype, bool] | None:
    """Of the column copy of h that a variant has."""
    if variant is None:
        return None
    fmt, _, col = VARIANTS[variant]
    return fmt.dtype, col == "pow2"


def assert_is_h_turned(h_t: tuple[Tensor, Tensor] | None, gate: Tensor, up: Tensor, variant: str | None) -> None:
    """The column copy that backward makes of h is the one that forward made of it, where one was asked for."""
    if variant is None:
        assert h_t is None
        return
    _, _, *wanted = swiglu_quantize(gate, up, **options(variant))  # type: ignore[arg-type]
    assert h_t is not None
    for mine, theirs in zip(h_t, wanted, strict=True):
        assert theirs is not None and (mine.shape, mine.stride()) == (theirs.shape, theirs.stride())
    col = specs(variant)[1]
    assert same_codes(QTensor(*h_t, col), QTensor(*wanted, col))  # type: ignore[arg-type]
    assert same_codes(QTensor(*h_t, col), quantize(swiglu(gate, up), col, transpose=True))


@shapes
@dtypes
def test_copies_are_those_of_the_unfused_path(shape: tuple[int, int], dtype: torch.dtype) -> None:
    _, gate, up = inputs(shape, dtype)
    assert_copies_of(swiglu_quantize(gate, up, **options("pow2")), swiglu(gate, up), "pow2")  # type: ignore[arg-type]


@variants
def test_formats_and_scales_are_those_asked_for(variant: str) -> None:
    dh, gate, up = inputs((20, 140), torch.bfloat16)
    assert_copies_of(swiglu_quantize(gate, up, **options(variant)), swiglu(gate, up), variant)  # type: ignore[arg-type]
    for h_variant in (None, *VARIANTS):
        *halves, h_t = swiglu_backward_quantize(dh, gate, up, h=h_format(h_variant), **options(variant))  # type: ignore[arg-type]
        for copies, gradient in zip(halves, swiglu_backward(dh, gate, up), strict=True):
            assert_copies_of(copies, gradient, variant)
        assert_is_h_turned(h_t, gate, up, h_variant)


@shapes
@dtypes
@pytest.mark.parametrize("h", [None, "pow2"], ids=["without-h", "with-h"])
def test_copies_of_the_gradients_are_those_of_the_unfused_path(
    shape: tuple[int, int], dtype: torch.dtype, h: str | None
) -> None:
    dh, gate, up = inputs(shape, dtype)
    *halves, h_t = swiglu_backward_quantize(dh, gate, up, h=h_format(h), **options("pow2"))  # type: ignore[arg-type]
    for copies, gradient in zip(halves, swiglu_backward(dh, gate, up), strict=True):
        assert_copies_of(copies, gradient, "pow2")
    assert_is_h_turned(h_t, gate, up, h)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_whole_tiles_keep_their_codes_from_subnormal_numbers_to_inf(fmt: Format) -> None:
    dh, gate, up = inputs((128, 256), torch.bfloat16)
    magnitudes = torch.linspace(-140, 90, 128).round().exp2().to(DEVICE)
    dh = torch.cat((dh[:, :128].float() * magnitudes[:, None], dh[:, 128:].float() * magnitudes), dim=1).bfloat16()
    dh[7], dh[:, 3:5] = 0.0, -0.0
    dh[100, 20], dh[100, 200] = float("inf"), -float("inf")
    up[40, 9], up[41, 209] = float("nan"), float("inf")  # of dgate alone
    more, spec = {"fp8_dtype": fmt.dtype, "pow2": True}, QuantSpec(fmt, (1, 128), "pow2")
    *made, h_t = swiglu_backward_quantize(dh, gate, up, h=tuple(more.values()), **more)  # type: ignore[arg-type]
    made.append(swiglu_quantize(gate, dh, **more))  # type: ignore[arg-type]
    assert same_codes(QTensor(*h_t, spec), quantize(swiglu(gate, up), spec, transpose=True))  # type: ignore[misc]
    for (q, s, qt, st), gradient in zip(made, (*swiglu_backward(dh, gate, up), swiglu(gate, dh)), strict=True):
        assert same_codes(QTensor(q, s, spec), quantize(gradient, spec))
        assert same_codes(QTensor(qt, st, spec), quantize(gradient, spec, transpose=True))  # type: ignore[arg-type]


def test_the_unfused_path_is_two_kernels() -> None:
    _, gate, up = inputs((40, 20), torch.bfloat16)
    apart = quantize_dual(swiglu(gate, up), **options("fp32"))  # type: ignore[arg-type]
    assert_copies_of(apart, swiglu(gate, up), "fp32")


def test_the_row_copy_can_be_had_alone() -> None:
    dh, gate, up = inputs((20, 14), torch.bfloat16)
    both = swiglu_quantize(gate, up, **options("pow2"))  # type: ignore[arg-type]
    q, s, qt, st = swiglu_quantize(gate, up, columns=False, **options("pow2"))  # type: ignore[arg-type]
    assert qt is None and st is None
    assert torch.equal(q.view(torch.uint8), both[0].view(torch.uint8)) and torch.equal(s, both[1])
    *halves, h_t = swiglu_backward_quantize(dh, gate, up, columns=False, h=h_format("pow2"), **options("pow2"))  # type: ignore[arg-type]
    assert_is_h_turned(h_t, gate, up, "pow2")
    for copies, wanted in zip(halves, swiglu_backward_quantize(dh, gate, up, **options("pow2"))[:2], strict=True):  # type: ignore[arg-type]
        assert copies[2] is None and torch.equal(copies[0].view(torch.uint8), wanted[0].view(torch.uint8))


def test_halves_of_one_matrix_are_read_where_they_are() -> None:
    dh, gate, up = inputs((140, 32), torch.bfloat16)
    joined = torch.cat([gate, up], dim=1)
    assert torch.equal(swiglu(joined[:, :32], joined[:, 32:]), swiglu(gate, up))
    dgate, dup = swiglu_backward(dh, joined[:, :32], joined[:, 32:])
    assert torch.equal(dgate, swiglu_backward(dh, gate, up)[0]) and torch.equal(dup, swiglu_backward(dh, gate, up)[1])


def with_leading_stride(x: Tensor, stride: int, first: int) -> Tensor:
    """The same matrix from column `first` on of one of `stride` columns of NaN."""
    part = torch.full((x.shape[0], stride), float("nan"), dtype=x.dtype, device=x.device)[:, first : first + x.shape[1]]
    return part.copy_(x)


@dtypes
@pytest.mark.parametrize(
    ("shape", "first"),
    [((256, 128), 16), ((131, 50), 16), ((128, 128), 13)],
    ids=["whole-tiles", "ragged", "between-words"],
)
def test_every_input_is_read_by_its_own_leading_stride(shape: tuple[int, int], first: int, dtype: torch.dtype) -> None:
    alone = inputs(shape, dtype)
    dh, gate, up = (with_leading_stride(x, 16 * width, first) for x, width in zip(alone, (9, 11, 10), strict=True))
    h, gradients = swiglu(*alone[1:]), swiglu_backward(*alone)
    assert torch.equal(swiglu(gate, up), h)
    assert_copies_of(swiglu_quantize(gate, up, **options("pow2")), h, "pow2")  # type: ignore[arg-type]
    *halves, h_t = swiglu_backward_quantize(dh, gate, up, h=h_format("pow2"), **options("pow2"))  # type: ignore[arg-type]
    assert_is_h_turned(h_t, *alone[1:], "pow2")
    for copies, mine, gradient in zip(halves, swiglu_backward(dh, gate, up), gradients, strict=True):
        assert torch.equal(mine, gradient)
        assert_copies_of(copies, gradient, "pow2")


def torch_swiglu(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the model's MLP computes: h, and by autograd dgate and dup."""
    gate, up = gate.clone().requires_grad_(), up.clone().requires_grad_()
    h = F.silu(gate) * up
    h.backward(dh)
    assert gate.grad is not None and up.grad is not None
    return h.detach(), gate.grad, up.grad


@dtypes
def test_numbers_are_torchs_but_for_the_errors_of_exponentials(dtype: torch.dtype) -> None:
    dh, gate, up = inputs((256, 128), dtype)
    made = swiglu(gate, up), *swiglu_backward(dh, gate, up)
    for name, mine, theirs in zip(("h", "dgate", "dup"), made, torch_swiglu(dh, gate, up), strict=True):
        assert not swiglu_is_off(name, mine, theirs, dh, gate, up)


@pytest.mark.parametrize("name", ["h", "dgate", "dup"])
def test_a_sigmoid_that_is_a_little_off_is_seen(name: str) -> None:
    dh, gate, up = inputs((256, 128), torch.bfloat16)
    s = torch.sigmoid(gate.float()) * (1 + 2.0**-14)
    silu, x = (gate.float() * s).bfloat16(), gate.float()
    wrong = {"h": silu * up, "dup": silu * dh, "dgate": ((dh * up).float() * s * (1 + x * (1 - s))).bfloat16()}[name]
    right = dict(zip(("h", "dgate", "dup"), torch_swiglu(dh, gate, up), strict=True))[name]
    assert swiglu_is_off(name, wrong, right, dh, gate, up) and not swiglu_is_off(name, right, right, dh, gate, up)


def test_one_gate_that_falls_to_the_other_side_everywhere_is_allowed() -> None:
    dh, gate, up = inputs((256, 128), torch.bfloat16)
    h = swiglu(gate, up)
    near = gate == 5.9375  # its silu lies 9.5e-8 from the middle between two BF16 numbers
    assert int(near.sum()) > 20
    silu = F.silu(gate)
    turned = torch.where(near, 5.90625 + 5.9375 - silu, silu)
    assert not swiglu_is_off("h", turned * up, h, dh, gate, up)
    other = torch.where(gate == 5.96875, torch.nextafter(silu, torch.full_like(silu, 99.0)), silu)
    assert swiglu_is_off("h", other * up, h, dh, gate, up)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of the interpreter
def test_silu_is_as_exact_as_sigmoid_says_down_to_the_smallest_exponential() -> None:
    magnitudes = torch.cat((torch.logspace(-44, 2, 4096), torch.linspace(80, 100, 4096)))
    gate = torch.cat((magnitudes, -magnitudes)).view(128, 128).to(DEVICE)
    exact = gate.double() * torch.sigmoid(gate.double())
    error = (swiglu(gate, torch.ones_like(gate)).double() - exact).abs()
    # sigmoid's bound and half a place of the product; of subnormal numbers two last places; below -128 ln 2, where
    # exp(-x) is beyond FP32, 0 for less than 100 * 2^-128
    bound = exact.abs() * (gate.abs() * 2.0**-23 + 2.0**-21 + 2.0**-24) + 100 * 2.0**-148
    bound += torch.where(gate < -128 * math.log(2), 100 * 2.0**-128, 0.0)
    assert (error <= bound).all()


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_gates_poison_their_blocks_alone(value: float) -> None:
    _, gate, up = inputs((6, 130), torch.bfloat16)
    gate[2, 4] = value
    up[2, 4] = 0.0  # silu(Inf) * 0 is NaN too
    _, s, _, st = swiglu_quantize(gate, up, **options("pow2"))  # type: ignore[arg-type]
    assert s.isnan().nonzero().tolist() == [[2, 0]] and st is not None and st.isnan().nonzero().tolist() == [[4, 0]]


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # of the interpreter
def test_large_gates_neither_overflow_nor_lose_their_sign() -> None:
    gate = torch.tensor([[-1e38, -200.0, -88.0, -0.0, 0.0, 88.0, 200.0, 1e38]], device=DEVICE)
    h = swiglu(gate, torch.ones_like(gate))
    assert torch.equal(h[0, [0, 1, 3, 4, 6, 7]].cpu(), torch.tensor([0.0, 0.0, 0.0, 0.0, 200.0, 1e38]))
    assert h.signbit().tolist() == [[True, True, True, True, False, False, False, False]]


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of the interpreter
@dtypes
def test_gradients_of_large_gates_are_those_of_a_line(dtype: torch.dtype) -> None:
    gate = torch.tensor([[-1e38, -200.0, 88.0, 200.0, 2.0**24, 2.0**25, 1e9, 1e38]], device=DEVICE, dtype=dtype)
    one = torch.ones_like(gate)
    dgate, dup = swiglu_backward(one, gate, one)
    assert dgate.tolist() == [[0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]]
    assert torch.equal(dup, gate.clamp_min(0.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": torch.zeros(4)}, r"gate is \[4\]"),
        ({"gate": torch.zeros(4, 4, dtype=torch.float16)}, "torch.float16; needs"),
        ({"up": torch.zeros(4, 5)}, r"up is \[4, 5\] torch.float32; needs \[4, 4\]"),
        ({"up": torch.zeros(4, 4, dtype=torch.bfloat16)}, "torch.bfloat16; needs"),
        ({"up": torch.zeros(4, 8)[:, ::2]}, r"up has strides \(8, 2\)"),
        ({"fp8_dtype": torch.int8}, "fp8_dtype is torch.int8"),
    ],
    ids=["vector", "fp16", "other-shape", "other-dtype", "column-stride", "int8"],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    arguments = {"gate": torch.zeros(4, 4), "up": torch.zeros(4, 4), **options("pow2")} | change
    with pytest.raises(ValueError, match=f"swiglu_quantize: .*{message}") as refused:
        swiglu_quantize(**arguments)  # type: ignore[arg-type]
    assert has_remedy(refused)
    with pytest.raises(ValueError, match=f"swiglu_backward_quantize: .*{message}") as refused:
        swiglu_backward_quantize(torch.zeros(4, 4), **arguments)  # type: ignore[arg-type]
    assert has_remedy(refused)
