"""The autograd function of a linear: fprop in forward, dgrad and wgrad in backward, each as its plan says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fp8train.nn.inputs import InputNeeds
from fp8train.nn.operands import (
    LaterOperand,
    Operand,
    as_matrix,
    gemm,
    gemm_add_,
    quantized,
    quantized_both,
    requantized,
)
from fp8train.quant.formats import LinearPrecision


@dataclass(frozen=True, slots=True)
class Plan:
    """What the GEMMs of one linear compute with; all that backward must know besides tensors."""

    precision: LinearPrecision
    backend: str
    site: int
    needs: dict[bool, InputNeeds] = field(init=False, compare=False)  # by whether the weight's gradient is wanted
    common: dict[str, dict[str, Any]] = field(init=False, compare=False)  # by GEMM: what every call of it is told

    def __post_init__(self) -> None:
        object.__setattr__(self, "needs", {wgrad: InputNeeds.of(self.precision, wgrad) for wgrad in (False, True)})
        shared = {"high": self.precision.high, "backend": self.backend, "site": self.site}
        object.__setattr__(self, "common", {name: {**shared, "name": name} for name in self.precision.gemms})


@dataclass(slots=True)
class InplaceGrad:
    """A gradient sink: wgrad adds into `buffer` and returns no gradient to autograd. Tied weights share one.

    Args:
        buffer: [N, K] fp32, zeroed by its owner; usually the parameter's .grad.
        notify: called after each accumulation, e.g. to start a reduction.
    """

    buffer: Tensor
    notify: Callable[[], None] | None = None


class LinearFunction(torch.autograd.Function):
    """One linear with its three GEMMs. Operands come quantised; x and weight are there for autograd's sake.

    Each argument costs autograd time, a tensor most, and so does each node: the operands come as one tuple, and x with
    its leading dimensions.
    """

    @staticmethod
    def forward(  # noqa: PLR0913
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None,
        operands: tuple[Operand, Operand | None, Operand, Operand | LaterOperand], plan: Plan, out_dtype: torch.dtype,
        sink: InplaceGrad | None,
    ) -> Tensor:  # fmt: skip
        row, col, w, wt = operands
        need_dx, need_dw, need_db = ctx.needs_input_grad[:3]
        later = wt.make if isinstance(wt, LaterOperand) else None
        ctx.save_for_backward(
            *(col[:2] if need_dw and col is not None else (None, None)), *(wt.tensors() if need_dx else (None, None))
        )
        ctx.call = plan, sink, x.dtype, bias.dtype if bias is not None and need_db else None, later
        y = gemm(row, w, bias=bias, out_dtype=out_dtype, **plan.common["fprop"])
        # detached, since autograd forbids writing in place to a view that a Function made
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1]).detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_create_graph()
        plan, sink, x_dtype, bias_dtype, later = ctx.call
        col, col_scale, wt, wt_scale = ctx.saved_tensors
        need_dx, need_dw, need_db = ctx.needs_input_grad[:3]
        lead, dy = dy.shape[:-1], as_matrix(dy)
        left, left_t = quantized_grad(dy.contiguous(), plan, need_dx, need_dw)
        dx = dw = db = None
        if need_dx:
            dx = input_grad(left, (wt, wt_scale), later, plan, x_dtype)
            dx = dx if len(lead) == 1 else dx.view(*lead, dx.shape[1])
        if need_dw:
            dw = weight_grad(left_t, wgrad_operand(col, col_scale, plan), plan, sink)
        if need_db:
            db = bias_grad(dy, bias_dtype)
        return dx, dw, db, None, None, None, None


# what Function.apply comes to where there is no transform of torch.func, which it looks for in every argument for 3 us
APPLY: Any = super(torch.autograd.Function, LinearFunction).apply


def refuse_create_graph() -> None:
    """Raise RuntimeError where backward is to be differentiated: once_differentiable's check, at less cost."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "Float8Linear: backward was called with create_graph=True; needs False, since rounding has no "
            "derivative. Keep nn.Linear where second derivatives are wanted."
        )


def quantized_grad(dy: Tensor, plan: Plan, need_dx: bool, need_dw: bool) -> tuple[Operand, Operand]:
    """dy as dgrad's and wgrad's left operand; the one that is not needed is the other."""
    precision = plan.precision
    dgrad, wgrad, high, noise = precision.dgrad.left, precision.wgrad.left, precision.high, precision.noise
    if need_dx and need_dw:
        return quantized_both(dy, dgrad, wgrad, high, plan.backend, noise)
    only = quantized(dy, dgrad if need_dx else wgrad, high, not need_dx, plan.backend, noise)
    return only, only


def input_grad(
    dy: Operand, kept: Sequence[Any], later: Callable[..., Operand] | None, plan: Plan, out_dtype: torch.dtype
) -> Tensor:
    """dx [M, K] from w.T as forward saved it, or as `later` makes it of that, for this alone."""
    wt = Operand(kept[0], kept[1], plan.precision.dgrad.right) if later is None else later(*kept, dy.data)
    return gemm(dy, wt, bias=None, out_dtype=out_dtype, **plan.common["dgrad"])


def bias_grad(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """db [N], summed in FP32."""
    return dy.sum(0, dtype=torch.float32).to(dtype)


def wgrad_operand(col: Tensor, col_scale: Tensor | None, plan: Plan) -> Operand:
    """x.T [K, M] as forward saved it: the column copy itself, or with source "requant" made from the row copy."""
    precision = plan.precision
    if precision.wgrad_source == "requant" and precision.wgrad.right is not None:
        return requantized(Operand(col, col_scale, precision.fprop.left), precision.wgrad.right, plan.backend)
    return Operand(col, col_scale, precision.wgrad.right)


def weight_grad(dy_t: Operand, x_t: Operand, plan: Plan, sink: InplaceGrad | None) -> Tensor | None:
    """dw [N, K] in FP32, or None after adding it to the sink."""
    common = plan.common["wgrad"]
    if sink is None:
        return gemm(dy_t, x_t, bias=None, out_dtype=torch.float32, **common)
    gemm_add_(sink.buffer, dy_t, x_t, **common)
    if sink.notify is not None:
        sink.notify()
    return None
