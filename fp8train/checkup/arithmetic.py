"""Checks of the arithmetic that the model's recipe asks for: codes, scales, GEMMs of single linears."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from fp8train.backends.interface import Backend
from fp8train.checkup.outcome import Outcome, relative, worst_row
from fp8train.checkup.subject import Subject, numbers, representatives, specs
from fp8train.nn.linear import Float8Linear
from fp8train.quant import reference
from fp8train.quant.formats import LinearPrecision, QuantSpec
from fp8train.quant.qtensor import QTensor

ROWS = 200  # one whole block of tokens and a short one
# Each result is rounded to BF16 once, 2^-9 of an element at most; the rest is the order of FP32 sums. A code that is
# wrong by one step is off by 2^-4.
BF16_LIMIT = 2.0**-8
# The weight gradient is FP32. Rounding it to BF16 costs 1.66e-3, Hopper's sums of 14 bits 1.3e-4.
WGRAD_LIMIT = 2.0**-10
SHIFTS = (-90, -40, -20, 20, 60)  # powers of two that no scale may notice


def definition(subject: Subject) -> Outcome:
    """Output and both gradients of single linears equal the definition, row by row, on tokens of uneven magnitude."""

    def errors(name: str, linear: Float8Linear) -> Iterator[tuple[float, str]]:
        x, dy = _x_and_dy(subject, linear, ROWS, 2, spread=6)
        got, want = ran(linear, x, dy), defined(linear, x, dy)
        for what, value, expected in zip(("y", "dx", "dw", "db"), got, want, strict=True):
            if expected is not None:
                apart = float("inf") if value is None else worst_row(_rows(value), _rows(expected))
                yield apart * (BF16_LIMIT / WGRAD_LIMIT if what == "dw" else 1.0), f"{what} of {name}"

    worst, where = _worst(subject, errors)
    return Outcome(
        passed=worst <= BF16_LIMIT,
        first=f"{where}: error of its worst row {worst:.1e}",
        second=f"limit {BF16_LIMIT:.1e}",
        detail="relative; dw, which is FP32, counts four times",
        meaning="a GEMM that does not compute what the recipe says: other blocks (128x128 on dy ruins tokens of small "
        "gradient), scales of the wrong axis, a bias that is left out, a weight gradient in BF16, or a kernel "
        "that this machine compiles wrongly. Try backend=reference.",
    )


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.unsqueeze(1)


def ran(linear: Float8Linear, x: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
    """(y, dx, dw, db) of a linear as it is; its gradients are put back to None."""
    x = x.clone().requires_grad_()
    y = linear(x)
    inputs = [x, linear.weight] + ([linear.bias] if linear.bias is not None else [])
    dx, dw, *db = torch.autograd.grad(y, inputs, dy, allow_unused=True)
    return y.detach(), dx, dw, db[0] if db else None


def defined(linear: Float8Linear, x: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
    """(y, dx, dw, db) by the definition, from the precision of a linear and nothing else of it."""
    p, w = linear.precision, linear.weight.detach()
    bias = None if linear.bias is None else linear.bias.detach()
    y = _product(_operand(x, p.fprop.left, p), _operand(w, p.fprop.right, p), p)
    dx = _product(_operand(dy, p.dgrad.left, p), _operand(w, p.dgrad.right, p, transpose=True), p)
    source = x
    if p.wgrad_source == "requant":
        assert p.fprop.left is not None
        source = reference.dequantize(reference.quantize(x, p.fprop.left))
    left, right = (_operand(t, s, p, transpose=True) for t, s in ((dy, p.wgrad.left), (source, p.wgrad.right)))
    dw = _product(left, right, p)
    return y if bias is None else y + bias, dx, dw, None if bias is None else dy.float().sum(0)


def _operand(x: Tensor, spec: QuantSpec | None, p: LinearPrecision, transpose: bool = False) -> QTensor | Tensor:
    if spec is not None:
        return reference.quantize(x, spec, transpose=transpose)
    return (x.T if transpose else x).to(p.high)


def _product(a: QTensor | Tensor, b: QTensor | Tensor, p: LinearPrecision) -> Tensor:
    """a @ b.T in FP32, by the definition if both are FP8."""
    if isinstance(a, QTensor) and isinstance(b, QTensor):
        return reference.scaled_mm(a, b, out_dtype=torch.float32)
    left, right = (reference.dequantize(q, p.high) if isinstance(q, QTensor) else q for q in (a, b))
    return (left.double() @ right.double().T).float()


def quantiser_codes(subject: Subject) -> Outcome:
    """Every quantiser of the backend gives the definition's codes and scales, for blocks of very different size."""
    assembly = subject.fresh()
    backend, good, total, where = subject.backend(assembly), 0, 0, ""
    for spec in specs(assembly):
        for seed, x in enumerate(_matrices()):
            for got, want in _quantised(backend, x.to(subject.device), spec):
                same = got.same_bits(want)
                good, total = good + same, total + 1
                where = where if same else where or f"{spec}, matrix {seed}"
    return Outcome(
        passed=good == total,
        first=f"{total} quantisations",
        second=f"{good} as defined",
        detail=f"first that differs: {where}" if where else "",
        meaning="scales rounded down (they saturate), a floor under amax (small gradients vanish), scales laid out "
        "transposed, padding in amax, or NaN turned into a number. Try backend=reference.",
    )


def _matrices() -> Iterator[Tensor]:
    """Ragged matrices: uneven rows, tiny gradients, zeros, a NaN, an Inf; fp32 and bf16."""
    x = numbers(300, 200, 5, spread=9)
    yield x
    yield x.to(torch.bfloat16) * 2.0**-50
    broken = numbers(140, 260, 6, spread=3)
    broken[0], broken[3, 7], broken[130, 200] = 0.0, float("nan"), float("inf")
    yield broken


def _quantised(backend: Backend, x: Tensor, spec: QuantSpec) -> Iterator[tuple[QTensor, QTensor]]:
    """(from the backend, as defined) by each way that it quantises."""
    row, col = reference.quantize(x, spec), reference.quantize(x, spec, transpose=True)
    yield backend.quantize(x, spec, False), row
    yield backend.quantize(x, spec, True), col
    yield from zip(backend.quantize_dual(x, spec, spec), (row, col), strict=True)
    if spec.transposable:
        yield from zip(backend.quantize_square(x, spec), (row, col), strict=True)


def scale_equivariance(subject: Subject) -> Outcome:
    """The codes of 2^k x are those of x."""
    assembly = subject.fresh()
    backend, equal, total = subject.backend(assembly), 0, 0
    x = numbers(256, 384, 7, spread=3).to(subject.device)
    for spec in specs(assembly):
        for transpose in (False, True):
            codes = backend.quantize(x, spec, transpose).qdata.view(torch.uint8)
            for shift in SHIFTS:
                moved = backend.quantize(x * 2.0**shift, spec, transpose).qdata.view(torch.uint8)
                equal, total = equal + int((moved == codes).sum()), total + codes.numel()
    return Outcome(
        passed=equal == total,
        first=f"codes {total}",
        second=f"the same after x 2^k {equal}",
        detail=f"k = {', '.join(map(str, SHIFTS))}",
        meaning="a floor under amax or under scales, a lower limit that flushes, or scales that are not divided "
        "exactly: small gradients lose their bits as the loss or the batch is scaled.",
    )


def ragged(subject: Subject) -> Outcome:
    """A number of tokens that fills no block gives what zero rows after it give: padding has no part in any scale."""

    def differences(name: str, linear: Float8Linear) -> Iterator[tuple[float, str]]:
        # so small that a stray 1 in a block flushes them all
        x, dy = (part * 2.0**-24 for part in _x_and_dy(subject, linear, ROWS - 71, 8))
        pad = (0, 0, 0, 2 * ROWS - len(x))
        own = ran(linear, x, dy)
        padded = ran(linear, torch.nn.functional.pad(x, pad), torch.nn.functional.pad(dy, pad))
        for a, b in zip(own, padded, strict=True):
            if a is not None and b is not None:
                yield relative(b[: len(a)], a), name

    worst, where = _worst(subject, differences)
    return Outcome(
        passed=worst <= BF16_LIMIT,
        first=f"{where}: {worst:.1e}",
        second=f"limit {BF16_LIMIT:.1e}",
        detail="ragged against padded with zeros",
        meaning="padding that enters amax, memory that nobody wrote, or a kernel that reads past the end.",
    )


def nonfinite(subject: Subject) -> Outcome:
    """A NaN in one token comes out as NaN in that token's row, and in the weight gradient: it is not laundered."""

    def finite_shares(name: str, linear: Float8Linear) -> Iterator[tuple[float, str]]:
        x, dy = _x_and_dy(subject, linear, ROWS, 10)
        x[5, 3] = float("nan")
        y, _, dw, _ = ran(linear, x, dy)
        assert y is not None and dw is not None
        for part in (y[5], dw[:, 3]):
            yield float(part.isfinite().float().mean()), name

    share, where = _worst(subject, finite_shares)
    return Outcome(
        passed=share == 0,
        first=f"{where}: NaN in one number of x",
        second=f"{100 * share:.3g} % of that token's outputs or of that column of dw are finite",
        detail="none may be",
        meaning="a maximum that drops NaN, a cast that saturates it or nan_to_num: a broken run would look healthy.",
    )


def fp32_accumulation(subject: Subject) -> Outcome:
    """Gradients 256 and 1 of two micro-batches make 257; BF16, with 8 bits, makes 256."""
    found: dict[str, float] = {}
    for name, linear in representatives(subject.fresh()):
        linear.weight.grad = None
        for size in (16.0, 1.0):
            x = torch.zeros(2, linear.in_features, device=subject.device, dtype=torch.bfloat16)
            dy = torch.zeros(2, linear.out_features, device=subject.device, dtype=torch.bfloat16)
            x[0, 0], dy[0, 0] = size, size
            linear(x.requires_grad_()).backward(dy)
        grad = linear.weight.grad
        found[name] = float("nan") if grad is None or grad.dtype is not torch.float32 else float(grad[0, 0])
        linear.weight.grad = None
    # an FP32 scale decodes 16 to within 2^-23 of it; BF16 numbers are 2 apart here
    wrong = {name: value for name, value in found.items() if not abs(value - 257) < 0.01}
    name, value = next(iter((wrong or found or {"no linear in FP8": 257.0}).items()))
    return Outcome(
        passed=not wrong,
        first="256 + 1 = 257",
        second=f"{name}: {value:g}",
        detail="gradients of two micro-batches, to be added in FP32",
        meaning="weight gradients that are rounded to BF16, or accumulated in it: small contributions of late "
        "micro-batches are lost and training drifts.",
    )


def _x_and_dy(subject: Subject, linear: Float8Linear, rows: int, seed: int, spread: int = 0) -> tuple[Tensor, Tensor]:
    """An input of a linear and a gradient of its output, BF16; see `numbers`."""
    x = numbers(rows, linear.in_features, seed, spread).to(subject.device, torch.bfloat16)
    return x, numbers(rows, linear.out_features, seed + 1, spread).to(subject.device, torch.bfloat16)


def _worst(subject: Subject, measure: Callable[[str, Float8Linear], Iterable[tuple[float, str]]]) -> tuple[float, str]:
    """Largest of what is measured of the representative linears, and what it is of."""
    found = (pair for name, linear in representatives(subject.fresh()) for pair in measure(name, linear))
    return max(found, key=lambda pair: pair[0], default=(0.0, "no linear in FP8"))
