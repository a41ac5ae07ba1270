"""A SwiGLU MLP whose product, and in backward the gradients of its factors, exist in FP8 only; see fused.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fp8train.nn.fused import Fused, Fusion, input_operands, input_specs, refusal, taking_over, trains, watched
from fp8train.nn.inputs import QuantizedInput
from fp8train.nn.linear import Float8Linear
from fp8train.nn.linear_function import (
    InplaceGrad,
    Plan,
    bias_grad,
    input_grad,
    quantized_grad,
    refuse_create_graph,
    weight_grad,
    wgrad_operand,
)
from fp8train.nn.operands import OPS, LaterOperand, Operand, as_matrix, gemm, refuse_transforms


class FusedMLP(Fused):
    """A SwiGLU MLP, down_proj(silu(gate_proj(x)) * up_proj(x)), whose product exists in FP8 only; see `fused_mlp`."""

    gate_proj: Float8Linear
    up_proj: Float8Linear
    down_proj: Float8Linear

    def forward(self, x: Tensor | QuantizedInput) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if mlp_refusal(gate, up, down) is not None:
            return self.fusion.plain.forward(self, x)
        if not torch.compiler.is_compiling():
            refuse_transforms()
        if watched((gate, up, down)):
            return down(_Product.apply(gate(x), up(x), gate.plan.backend))
        return _fused(x, (gate, up, down))

    def extra_repr(self) -> str:
        return "SwiGLU fused with its casts"


class _Product(torch.autograd.Function):
    """silu(gate) * up, written: the numbers that the fused kernels quantise."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.backend = backend
        return OPS.swiglu(as_matrix(gate), as_matrix(up), backend).view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dgate, dup = OPS.swiglu_backward(as_matrix(dh.contiguous()), as_matrix(gate), as_matrix(up), ctx.backend)
        return dgate.view(gate.shape), dup.view(up.shape), None


def _fused(x: Tensor | QuantizedInput, linears: Sequence[Float8Linear]) -> Tensor:
    """down(silu(gate(x)) * up(x)) in one node of autograd."""
    gate, up, down = linears
    if not torch.compiler.is_compiling():
        for linear in linears:
            linear.refresh_if_stale()
    tensor = x.x if isinstance(x, QuantizedInput) else x
    out_dtype, needs = gate.checked_input(tensor), gate.plan.needs[trains((gate, up))]
    if isinstance(x, QuantizedInput):
        x_row, x_col = x.operands(needs)
    else:
        x_row, x_col = gate.inputs.get(tensor, needs, gate.plan.backend, gate.plan.site)
    factors: list[Tensor] = []
    turned: list[Operand | LaterOperand] = []
    for linear in (gate, up):
        w, wt = linear.provider.operands(linear)
        factors.append(gemm(x_row, w, bias=None, out_dtype=out_dtype, **linear.plan.common["fprop"]))
        turned.append(wt)
    w, wt = down.provider.operands(down)
    # where backward comes to h's own gradient, it makes h.T from what it reads for that, and none is kept until then
    later = trains((gate, up)) or (tensor.requires_grad and torch.is_grad_enabled())
    row, col = input_specs(down.plan.precision, trains((down,)))
    col = None if later else col
    copies = OPS.swiglu_quantize(*factors, row, col, gate.plan.backend)
    h, h_t = input_operands(copies, row, col, down.plan.precision)
    y = _MLP.apply(
        as_matrix(tensor), gate.weight, up.weight, down.weight, down.bias, (h, w, *factors, x_col, h_t, (*turned, wt)),
        tuple(linear.plan for linear in linears), tuple(linear.grad_sink for linear in linears),
    )  # fmt: skip
    return y.view(*tensor.shape[:-1], down.out_features)


Operands = tuple[Operand, Operand, Tensor, Tensor, Operand | None, Operand | None, tuple[Operand | LaterOperand, ...]]


class _MLP(torch.autograd.Function):
    """The product of h, which is quantised already, and down's weight; backward is that of all three linears.

    In one node, so that h.T can be made where dgate and dup are, and dh be freed there.
    """

    @staticmethod
    def forward(  # noqa: PLR0913
        ctx: Any, x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor, bias: Tensor | None,
        operands: Operands, plans: tuple[Plan, ...], sinks: tuple[InplaceGrad | None, ...],
    ) -> Tensor:  # fmt: skip
        h, w, gate, up, x_t, h_t, turned = operands
        need_dx, *need_dw, need_db = ctx.needs_input_grad[:5]
        need_dh = need_dx or need_dw[0] or need_dw[1]
        kept = [*((gate, up) if need_dh else (None, None)), *((None, None) if x_t is None else x_t.tensors())]
        kept += (None, None) if h_t is None or not need_dw[2] else h_t.tensors()
        for wt, needed in zip(turned, (need_dx, need_dx, need_dh), strict=True):
            kept += wt.tensors() if needed else (None, None)
        ctx.save_for_backward(*kept)
        later = [wt.make if isinstance(wt, LaterOperand) else None for wt in turned]
        dtypes = x.dtype, gate.dtype, bias.dtype if bias is not None and need_db else None
        ctx.call = plans, sinks, later, dtypes
        return gemm(h, w, bias=bias, out_dtype=gate.dtype, **plans[2].common["fprop"])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_create_graph()
        plans, sinks, later, (x_dtype, dtype, bias_dtype) = ctx.call
        gate, up, x_t, x_scale, h_t, h_scale, *turned = ctx.saved_tensors
        need_dx, *need_dw, need_db = ctx.needs_input_grad[:5]
        precision, down = plans[0].precision, plans[2]
        need_dh = need_dx or need_dw[0] or need_dw[1]
        left, left_t = quantized_grad(dy.contiguous(), down, need_dh, need_dw[2])
        dx: Tensor | None = None
        dw: list[Tensor | None] = [None, None, None]
        copies: list[Tensor] = []
        if need_dh:
            col = precision.wgrad.left if need_dw[0] or need_dw[1] else None
            h_spec = down.precision.wgrad.right if need_dw[2] and h_t is None else None
            dh = input_grad(left, turned[4:], later[2], down, dtype)
            copies = OPS.swiglu_backward_quantize(dh, gate, up, precision.dgrad.left, col, h_spec, down.backend)
            del dh
            if h_spec is not None:
                *copies, h_t, h_scale = copies
        if need_dw[2]:
            dw[2] = weight_grad(left_t, wgrad_operand(h_t, h_scale, down), down, sinks[2])
            del h_t
        for half in (0, 1) if need_dh else ():
            row, row_scale, *col_copy = copies[half * len(copies) // 2 : (half + 1) * len(copies) // 2]
            if need_dx:
                dhalf = Operand(row, row_scale, precision.dgrad.left)
                part = input_grad(dhalf, turned[2 * half : 2 * half + 2], later[half], plans[half], x_dtype)
                dx = part if dx is None else dx + part
            if need_dw[half]:
                dhalf_t = Operand(col_copy[0], col_copy[1], precision.wgrad.left)
                dw[half] = weight_grad(dhalf_t, wgrad_operand(x_t, x_scale, plans[half]), plans[half], sinks[half])
        db = bias_grad(dy, bias_dtype) if need_db else None
        return dx, *dw, db, None, None, None


def fused_mlp(mlp: nn.Module) -> FusedMLP:
    """A FusedMLP with the linears, hooks and attributes of `mlp`."""
    fused = taking_over(FusedMLP, mlp)
    fused.fusion = Fusion(type(mlp))
    return fused


def mlp_refusal(gate: Float8Linear, up: Float8Linear, down: Float8Linear) -> str | None:
    """Why the product of a SwiGLU cannot be made in FP8, nor the gradients of its factors, or None."""
    if not all(isinstance(linear, Float8Linear) for linear in (gate, up, down)):
        return "one of its linears has been wrapped or replaced"
    if why := refusal((gate, up)) or refusal((down,)):
        return why
    if gate.bias is not None or up.bias is not None:
        return "a bias of gate_proj or up_proj needs its gradient in high precision"
    precision = gate.plan.precision
    if precision.dgrad.left is None or precision.wgrad.left is None:
        return f"{precision.name} does not read the gradient in FP8 in both dgrad and wgrad"
    return None if gate.plan.backend == down.plan.backend else "its linears differ in backend"
