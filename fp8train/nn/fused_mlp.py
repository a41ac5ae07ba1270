"""A SwiGLU MLP whose product, and in backward the gradients of its factors, exist in FP8 only; see fused.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fp8train.nn.fused import Fused, input_specs, quantized_input, refusal, taking_over, trains, unwritten, watched
from fp8train.nn.inputs import QuantizedInput
from fp8train.nn.linear import Float8Linear
from fp8train.nn.linear_function import InplaceGrad, Plan, weight_grad, wgrad_operand
from fp8train.nn.operands import OPS, LaterOperand, Operand, as_matrix, gemm, refuse_transforms
from fp8train.quant.formats import QuantSpec


@dataclass(frozen=True, slots=True)
class MLPFusion:
    """See Fusion."""

    plain: type[nn.Module]


class FusedMLP(Fused):
    """A SwiGLU MLP, down_proj(silu(gate_proj(x)) * up_proj(x)), whose product exists in FP8 only; see `fused_mlp`."""

    fusion: MLPFusion
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
        row, col = input_specs(down.plan.precision, trains((down,)))
        h, copies = _swiglu(x, gate, up, row, col)
        return down(quantized_input(h, copies, row, col, down.plan.precision))

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


def _swiglu(
    x: Tensor | QuantizedInput, gate: Float8Linear, up: Float8Linear, row: QuantSpec, col: QuantSpec | None
) -> tuple[Tensor, list[Tensor]]:
    """h = silu(gate(x)) * up(x) as autograd sees it, and its copies."""
    if not torch.compiler.is_compiling():
        gate.refresh_if_stale()
        up.refresh_if_stale()
    tensor = x.x if isinstance(x, QuantizedInput) else x
    out_dtype, needs = gate.checked_input(tensor), gate.plan.needs[trains((gate, up))]
    if isinstance(x, QuantizedInput):
        x_row, x_col = x.operands(needs)
    else:
        x_row, x_col = gate.inputs.get(tensor, needs, gate.plan.backend, gate.plan.site)
    products: list[Tensor] = []
    transposed: list[Tensor | None] = []
    later: list[Callable[..., Operand] | None] = []
    for linear in (gate, up):
        w, wt = linear.provider.operands(linear)
        products.append(gemm(x_row, w, bias=None, out_dtype=out_dtype, **linear.plan.common["fprop"]))
        transposed += wt.tensors()
        later.append(wt.make if isinstance(wt, LaterOperand) else None)
    copies = OPS.swiglu_quantize(*products, row, col, gate.plan.backend)
    h = _SwiGLU.apply(
        as_matrix(tensor), gate.weight, up.weight, *products, *((None, None) if x_col is None else x_col.tensors()),
        *transposed, (gate.plan, up.plan), (gate.grad_sink, up.grad_sink), later,
    )  # fmt: skip
    return h.view(*tensor.shape[:-1], gate.out_features), copies


class _SwiGLU(torch.autograd.Function):
    """Connects h, which is quantised already, with x and the weights of gate and up: backward is that of all three."""

    @staticmethod
    def forward(  # noqa: PLR0913
        ctx: Any, x: Tensor, gate_weight: Tensor, up_weight: Tensor, gate: Tensor, up: Tensor,
        col: Tensor | None, col_scale: Tensor | None,
        gate_wt: Tensor | None, gate_wt_scale: Tensor | None, up_wt: Tensor | None, up_wt_scale: Tensor | None,
        plans: tuple[Plan, Plan], sinks: tuple[InplaceGrad | None, InplaceGrad | None],
        later: list[Callable[..., Operand] | None],
    ) -> Tensor:  # fmt: skip
        weights = (gate_wt, gate_wt_scale, up_wt, up_wt_scale) if ctx.needs_input_grad[0] else (None, None, None, None)
        ctx.save_for_backward(gate, up, col, col_scale, *weights)
        ctx.plans, ctx.sinks, ctx.later, ctx.x_dtype = plans, sinks, later, x.dtype
        return unwritten(gate, gate.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, col, col_scale, *weights = ctx.saved_tensors
        need_dx, *need_dw = ctx.needs_input_grad[:3]
        precision, backend = ctx.plans[0].precision, ctx.plans[0].backend
        specs = precision.dgrad.left, precision.wgrad.left if any(need_dw) else None
        copies = OPS.swiglu_backward_quantize(dh.contiguous(), gate, up, *specs, backend)
        dx: Tensor | None = None
        dw: list[Tensor | None] = [None, None]
        for half, plan in enumerate(ctx.plans):
            row, row_scale, *col_copy = copies[half * len(copies) // 2 : (half + 1) * len(copies) // 2]
            if need_dx:
                left = Operand(row, row_scale, precision.dgrad.left)
                (wt, wt_scale), later = weights[2 * half : 2 * half + 2], ctx.later[half]
                right = Operand(wt, wt_scale, precision.dgrad.right) if later is None else later(wt, wt_scale, row)
                part = gemm(left, right, bias=None, out_dtype=ctx.x_dtype, **plan.common["dgrad"])
                del right  # w.T may have been made for this alone
                dx = part if dx is None else dx + part
            if need_dw[half]:
                dy_t = Operand(col_copy[0], col_copy[1], precision.wgrad.left)
                dw[half] = weight_grad(dy_t, wgrad_operand(col, col_scale, plan), plan, ctx.sinks[half])
        return dx, *dw, *([None] * 11)


def fused_mlp(mlp: nn.Module) -> FusedMLP:
    """A FusedMLP with the linears, hooks and attributes of `mlp`."""
    fused = taking_over(FusedMLP, mlp)
    fused.fusion = MLPFusion(type(mlp))
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
