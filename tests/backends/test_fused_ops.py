"""The fused producers as operators: schemas, fakes, compilation; the bits of the plain modules on every backend."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fp8train.backends import fused_ops, get_backend, ops
from fp8train.backends.producer_checks import EPS, rstd_is_off
from fp8train.backends.producers import norm_gradients, row_rstd
from fp8train.quant import reference
from fp8train.quant.formats import QuantSpec
from fp8train.quant.qtensor import QTensor
from tests.hardware import requires_gpu
from tests.kernels.products import DEVICE
from tests.quant.specs import same_codes

OPS = torch.ops.fp8train
X, X_FP32, TENSOR = "e4m3 1x128 pow2", "e4m3 1x128 fp32", "e4m3 tensor fp32"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
TRITON = pytest.param("triton", marks=needs_triton)
ON_CPU = ["cpu"] if DEVICE == "cpu" else []
backends = pytest.mark.parametrize("backend", [*ON_CPU, "reference", TRITON])
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
# specifications of row and column copy; without kernels of their own too, where a backend quantises in a second pass
SPECS = {"pow2": (X, X), "mixed": (X_FP32, X), "row-copy": (X, None), "no-kernel": (TENSOR, TENSOR)}
specs = pytest.mark.parametrize(("row", "col"), list(SPECS.values()), ids=list(SPECS))


def numbers(rows: int = 35, cols: int = 140, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Rows of different magnitude."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = 2.0 ** torch.randint(-4, 5, (rows, 1), generator=generator)
    return (torch.randn(rows, cols, generator=generator) * magnitude).to(DEVICE, dtype)


def calls(backend: str, rows: int = 35, dtype: torch.dtype = torch.bfloat16) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """One call of every operator, and of those that quantise one without a column copy."""
    x, dy, up, weight = (numbers(rows, dtype=dtype, seed=seed) for seed in (0, 1, 2, 3))
    weight = torch.linspace(0.5, 2.0, 140, device=DEVICE)
    rstd = torch.linspace(0.5, 2.0, rows, device=DEVICE)
    heads = x.view(rows, 2, 5, 14).transpose(0, 2), *numbers(2, 7 * rows, torch.float32).view(2, rows, 7)
    norm = (x, weight, rstd, torch.bfloat16)
    return {
        "rstd": (OPS.rstd.default, (x, EPS, backend)),
        "add_rstd": (OPS.add_rstd.default, (x, up.float(), EPS, backend)),
        "rms_norm": (OPS.rms_norm.default, (*norm, backend)),
        "rms_norm_backward": (OPS.rms_norm_backward.default, (dy, x, weight, rstd, None, None, backend)),
        "rms_norm_backward-sum": (OPS.rms_norm_backward.default, (dy, x, weight, rstd, up, torch.float32, backend)),
        "rmsnorm_quantize": (OPS.rmsnorm_quantize.default, (*norm, X, X, backend)),
        "rmsnorm_quantize-row": (OPS.rmsnorm_quantize.default, (*norm, X, None, backend)),
        "rope": (OPS.rope.default, (*heads, torch.bfloat16, False, backend)),
        "rope-back": (OPS.rope.default, (*heads, torch.float32, True, backend)),
        "swiglu": (OPS.swiglu.default, (x, up, backend)),
        "swiglu_backward": (OPS.swiglu_backward.default, (dy, x, up, backend)),
        "swiglu_quantize": (OPS.swiglu_quantize.default, (x, up, X, X, backend)),
        "swiglu_quantize-row": (OPS.swiglu_quantize.default, (x, up, X, None, backend)),
        "swiglu_backward_quantize": (OPS.swiglu_backward_quantize.default, (dy, x, up, X, X, None, backend)),
        "swiglu_backward_quantize-h": (OPS.swiglu_backward_quantize.default, (dy, x, up, X, X, X, backend)),
        "swiglu_backward_quantize-row": (OPS.swiglu_backward_quantize.default, (dy, x, up, X, None, None, backend)),
        "swiglu_backward_quantize-row-h": (OPS.swiglu_backward_quantize.default, (dy, x, up, X, None, X, backend)),
    }


every_op = pytest.mark.parametrize("name", list(calls("reference")))


def test_every_operator_is_called_here() -> None:
    assert {name.split("-")[0] for name in calls("reference")} == {
        name for name in vars(ops.OPS) if name in vars(fused_ops)
    }


def test_results_are_contiguous_as_fakes_promise_whatever_the_inputs() -> None:
    for name, (op, arguments) in calls("reference").items():
        if name in ("rstd", "add_rstd", "rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward"):
            turned = [x.t().contiguous().t() if isinstance(x, Tensor) and x.dim() == 2 else x for x in arguments]
            made = op(*turned)
            assert not turned[0].is_contiguous()
            assert all(tensor.is_contiguous() for tensor in ((made,) if isinstance(made, Tensor) else made)), name


@every_op
@pytest.mark.uninitialized_memory  # opcheck turns deterministic algorithms off and on itself
def test_opcheck_accepts_schema_fake_and_compilation(name: str) -> None:
    op, arguments = calls("reference")[name]
    torch.library.opcheck(op, arguments)


@every_op
@backends
@pytest.mark.parametrize("rows", [35, 128, 1, 0])
def test_fakes_promise_what_the_operators_return(name: str, backend: str, rows: int) -> None:
    op, arguments = calls(backend, rows)[name]
    made = op(*arguments)
    with FakeTensorMode() as mode:
        promised = op(*(mode.from_tensor(value) if isinstance(value, Tensor) else value for value in arguments))
    made, promised = ((made,), (promised,)) if isinstance(made, Tensor) else (made, promised)
    for real, fake in zip(made, promised, strict=True):
        assert (real.shape, real.dtype) == (fake.shape, fake.dtype)
        for size, stride, promise in zip(real.shape, real.stride(), fake.stride(), strict=True):
            assert stride == promise or size <= 1 or rows == 0  # nothing is reached by the others


def assert_copies(copies: list[Tensor], x: Tensor, row: str, col: str | None) -> None:
    """The copies are the definition's for x."""
    for spec, transpose, place in ((row, False, 0), (col, True, 2)):
        if spec is not None:
            parsed = QuantSpec.parse(spec)
            made = QTensor(copies[place].cpu(), copies[place + 1].cpu(), parsed)
            assert same_codes(made, reference.quantize(x.cpu(), parsed, transpose=transpose))


@backends
@specs
@dtypes
def test_copies_are_those_of_what_the_backend_computes(
    backend: str, row: str, col: str | None, dtype: torch.dtype
) -> None:
    x, weight = numbers(dtype=dtype), torch.linspace(0.5, 2.0, 140, device=DEVICE)
    rstd = OPS.rstd(x, EPS, backend)
    for out_dtype in (torch.bfloat16, torch.float32):
        copies = OPS.rmsnorm_quantize(x, weight, rstd, out_dtype, row, col, backend)
        y = OPS.rms_norm(x, weight, rstd, out_dtype, backend)
        assert y.dtype is out_dtype and len(copies) == (2 if col is None else 4)
        assert_copies(copies, y, row, col)
    gate, up, dh = (numbers(dtype=dtype, seed=seed) for seed in (1, 2, 3))
    copies = OPS.swiglu_quantize(gate, up, row, col, backend)
    h = OPS.swiglu(gate, up, backend)
    assert_copies(copies, h, row, col)
    for h_spec in dict.fromkeys((X, X_FP32, row)):
        *_, codes, scale_inv = OPS.swiglu_backward_quantize(dh, gate, up, row, col, h_spec, backend)
        assert_copies([*copies[:2], codes, scale_inv], h, row, h_spec)
    copies = OPS.swiglu_backward_quantize(dh, gate, up, row, col, None, backend)
    half = len(copies) // 2
    for place, gradient in zip((0, half), OPS.swiglu_backward(dh, gate, up, backend), strict=True):
        assert_copies(copies[place : place + half], gradient, row, col)


@dtypes
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=["to-bf16", "to-fp32"])
def test_norm_has_the_bits_of_torch_forward_and_backward(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    x, dy = numbers(dtype=dtype).cpu().requires_grad_(), numbers(dtype=out_dtype, seed=1).cpu()
    weight = torch.linspace(0.5, 2.0, 140).requires_grad_()
    theirs = F.rms_norm(x.float(), weight.shape, weight, EPS).to(out_dtype)
    theirs.backward(dy)
    rstd = row_rstd(x.detach(), EPS)
    y = get_backend("reference").rms_norm(x.detach(), weight.detach(), rstd, out_dtype)
    dx, dweight = norm_gradients(dy, x.detach(), weight.detach(), rstd)
    assert torch.equal(y, theirs)
    assert torch.equal(dx, x.grad) and torch.equal(dweight, weight.grad)


def test_norm_backward_is_the_derivative() -> None:
    """In FP64, against finite differences."""

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            rstd = (x.square().mean(-1) + EPS).rsqrt()
            ctx.save_for_backward(x, weight, rstd)
            return x * rstd[:, None] * weight

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
            return norm_gradients(*wide(dy, *ctx.saved_tensors))

    class Wide(Tensor):
        """FP64 that stays FP64 where the formula asks for FP32."""

        def float(self) -> Tensor:  # type: ignore[override]
            return self.as_subclass(Tensor)

    def wide(*tensors: Tensor) -> list[Tensor]:
        return [tensor.as_subclass(Wide) for tensor in tensors]

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Norm.apply, (x, weight))


@dtypes
def test_swiglu_has_the_bits_of_torch_forward_and_backward(dtype: torch.dtype) -> None:
    gate, up = (numbers(dtype=dtype, seed=seed).cpu().requires_grad_() for seed in (1, 2))
    dh = numbers(dtype=dtype, seed=3).cpu()
    theirs = F.silu(gate) * up
    theirs.backward(dh)
    backend = get_backend("reference")
    dgate, dup = backend.swiglu_backward(dh, gate.detach(), up.detach())
    assert torch.equal(backend.swiglu(gate.detach(), up.detach()), theirs)
    assert torch.equal(dgate, gate.grad) and torch.equal(dup, up.grad)


@needs_triton
def test_kernels_are_run_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the product is not computed apart."""
    triton = get_backend("triton")
    row, wide = QuantSpec.parse(X), QuantSpec.parse(TENSOR)
    e5m2 = QuantSpec.parse("e5m2 1x128")
    assert triton.fuses(row, row) and triton.fuses(row, None) and triton.fuses(row, QuantSpec.parse(X_FP32))
    assert not triton.fuses(wide, wide) and not triton.fuses(row, wide) and not triton.fuses(row, e5m2)
    assert not get_backend("reference").fuses(row, row)

    def refuse(*_: Any) -> Any:
        raise AssertionError("the product was computed apart")

    for method in ("rstd", "rms_norm", "swiglu", "swiglu_backward", "quantize", "quantize_dual"):
        monkeypatch.setattr(type(triton), method, refuse)
    run: dict[str, Callable[[], Any]] = {
        name: (lambda name=name: calls("triton")[name][0](*calls("triton")[name][1]))  # type: ignore[misc]
        for name in calls("triton")
        if "quantize" in name
    }
    for call in run.values():
        call()


@needs_triton
@dtypes
@pytest.mark.parametrize("backend", ["triton", pytest.param("reference", marks=requires_gpu(sm=89))])
def test_norm_backward_is_the_formula(backend: str, dtype: torch.dtype) -> None:
    x, dy = numbers(300, 1100, dtype), numbers(300, 1100, seed=1)
    weight = torch.linspace(0.5, 2.0, 1100, device=DEVICE)
    rstd = row_rstd(x, EPS)
    alone, wanted = OPS.rms_norm_backward(dy, x, weight, rstd, None, None, backend), norm_gradients(dy, x, weight, rstd)
    for mine, theirs in zip(alone, wanted, strict=True):
        # sums of 1100 and 300 terms in other orders: at most their number times 2^-24 of the largest, in practice its
        # root; BF16 rounds both, one place apart at most, which is 2^-7 of a number just above a power of two
        places = 2.0**-7 if mine.dtype is torch.bfloat16 else 1e-5
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=places, atol=1e-5 * float(theirs.abs().max()))


@backends
@dtypes
@pytest.mark.parametrize("branch_dtype", [torch.bfloat16, torch.float32], ids=["branch-bf16", "branch-fp32"])
def test_the_residual_streams_sum_is_torchs(backend: str, dtype: torch.dtype, branch_dtype: torch.dtype) -> None:
    x, branch = numbers(dtype=dtype), numbers(dtype=branch_dtype, seed=1)
    total, rstd = OPS.add_rstd(x, branch, EPS, backend)
    assert total.dtype is dtype and torch.equal(total, (x + branch).to(dtype))
    assert not rstd_is_off(rstd, total) and not rstd_is_off(OPS.rstd(x, EPS, backend), x)
    if backend != "triton" and DEVICE == "cpu":
        assert torch.equal(rstd, row_rstd(total, EPS))


@backends
@dtypes
def test_the_streams_gradient_is_added_as_torch_would(backend: str, dtype: torch.dtype) -> None:
    x, dtotal, dy = numbers(dtype=dtype), numbers(dtype=dtype, seed=1), numbers(seed=2)
    inputs = dy, x, torch.linspace(0.5, 2.0, 140, device=DEVICE), row_rstd(x, EPS)
    dx, dweight = OPS.rms_norm_backward(*inputs, None, None, backend)
    summed, again, cast = OPS.rms_norm_backward(*inputs, dtotal, torch.bfloat16, backend)
    # the same roundings; on a GPU two compiled kernels may differ in the last place of dx, or of BF16's
    place = 2.0**-7 if dtype is torch.bfloat16 else 2.0**-22
    atol = 0.0 if DEVICE == "cpu" else place * float(dx.abs().max())
    torch.testing.assert_close(summed, dx + dtotal, rtol=0.0, atol=atol)
    assert torch.equal(dweight, again) or DEVICE != "cpu"
    assert torch.equal(cast, summed.bfloat16())
