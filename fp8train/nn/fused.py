"""Modules that make the FP8 input of a linear themselves, RMSNorm before linears and SwiGLU within an MLP; and RoPE.

    FusedRMSNorm  x -> FP8 copies of rms_norm(x), for the linears that read it (q, k, v; gate, up)
    FusedMLP      gate, up -> FP8 copies of h = silu(gate) * up, for down; in backward dh -> FP8 copies of dgate and dup
    FusedRope     queries or keys -> rotated, by one kernel forward and backward, whatever the precision of the linears
What is quantised is never written in high precision: autograd is connected by a tensor of the right shape whose numbers
nobody reads, and which are NaN. A fused module has the parameters, state-dict names and hooks of the plain one that it
took the place of. At each forward it looks at its linears: where their precisions do not permit it falls back to the
plain forward, and where hooks want to see numbers it computes the same ones and writes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook

from fp8train.backends import fused_ops as _fused_ops  # noqa: F401  registers the operators
from fp8train.backends.producers import norm_gradients
from fp8train.nn.inputs import QuantizedInput
from fp8train.nn.linear import HIGH, Float8Linear, InplaceGrad, Plan, weight_grad, wgrad_operand
from fp8train.nn.operands import OPS, LaterOperand, Operand, as_matrix, gemm
from fp8train.quant.formats import LinearPrecision, QuantSpec

T = TypeVar("T", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class NormFusion:
    """What a FusedRMSNorm knows beyond the module that it took the place of.

    Args:
        plain: class of that module.
        readers: the linears that read its result; nothing else does.
        through: the modules that its result passes on the way to them.
        eps: added to the mean square.
        rounds_early: the plain forward rounds to x's dtype before it multiplies by the weight, so that only an FP32 x
            gives the same numbers here.
    """

    plain: type[nn.Module]
    readers: tuple[Float8Linear, ...]
    through: tuple[nn.Module, ...]
    eps: float
    rounds_early: bool


@dataclass(frozen=True, slots=True)
class MLPFusion:
    """As NormFusion: the class of the module that a FusedMLP took the place of."""

    plain: type[nn.Module]


@dataclass(frozen=True, slots=True)
class RopeFusion:
    """As NormFusion; and the backend that rotates."""

    plain: type[nn.Module]
    backend: str


class FusedRMSNorm(nn.Module):
    """An RMSNorm that hands its result to linears as FP8 copies; made by `fused_norm`."""

    fusion: NormFusion
    weight: nn.Parameter

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor | QuantizedInput:
        """Normalise the last dimension.

        Args:
            x: [..., size], bf16 or fp32.
            dtype: dtype of the result; None is x's own.

        Returns:
            QuantizedInput: FP8 copies for the readers; a Tensor where they do not permit, or hooks look.
        """
        fusion, out_dtype = self.fusion, x.dtype if dtype is None else dtype
        if not self._serves(x, out_dtype) or refusal(fusion.readers) is not None:
            return fusion.plain.forward(self, x, *(() if dtype is None else (dtype,)))
        precision, backend = fusion.readers[0].plan.precision, fusion.readers[0].plan.backend
        matrix, weight = as_matrix(x.detach()), self.weight.detach()
        if _watched((self, *fusion.readers, *fusion.through)):
            y, rstd = OPS.rms_norm(matrix, weight, fusion.eps, out_dtype, backend)
            return _RMSNorm.apply(x, self.weight, rstd, out_dtype, y.view(x.shape), backend)
        row, col = _input_specs(precision, _train(fusion.readers))
        *copies, rstd = OPS.rmsnorm_quantize(matrix, weight, fusion.eps, out_dtype, row, col, backend)
        y = _RMSNorm.apply(x, self.weight, rstd, out_dtype, None, backend)
        return _quantized_input(y, copies, row, col, precision)

    def _serves(self, x: Tensor, out_dtype: torch.dtype) -> bool:
        dtypes = x.dtype in HIGH and out_dtype in HIGH and self.weight.dtype is torch.float32
        return dtypes and x.dim() > 0 and not (self.fusion.rounds_early and x.dtype is not torch.float32)

    def extra_repr(self) -> str:
        return f"{self.fusion.plain.extra_repr(self)}, fused into {len(self.fusion.readers)} linears"


class FusedMLP(nn.Module):
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
        if _watched((gate, up, down)):
            return down(_Product.apply(gate(x), up(x), gate.plan.backend))
        row, col = _input_specs(down.plan.precision, _train((down,)))
        h, copies = _swiglu(x, gate, up, row, col)
        return down(_quantized_input(h, copies, row, col, down.plan.precision))

    def extra_repr(self) -> str:
        return "SwiGLU fused with its casts"


class FusedRope(nn.Module):
    """A rotary embedding by a backend's kernel, but in compiled runs, where inductor fuses it; made by `fused_rope`.

    torch.func does not know it: fused=never.
    """

    fusion: RopeFusion

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
        """Rotate x [B, heads, T, head_dim] by the angles of its positions, dense cos and sin [T, head_dim / 2] fp32."""
        if torch.compiler.is_compiling() or x.dtype not in HIGH or dtype not in HIGH:
            return self.fusion.plain.forward(self, x, cos, sin, dtype)
        return _Rotation.apply(x, cos, sin, dtype, False, self.fusion.backend)

    def extra_repr(self) -> str:
        return f"backend={self.fusion.backend}"


class _RMSNorm(torch.autograd.Function):
    """Connects the normalised x, which is computed already, with x and the weight; y: None if it is in FP8 only."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, rstd: Tensor, dtype: torch.dtype, y: Tensor | None, backend: str
    ) -> Tensor:
        ctx.save_for_backward(x, weight, rstd)
        ctx.backend = backend
        return _unwritten(x, dtype) if y is None else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        inputs = as_matrix(dy), as_matrix(x), weight, rstd
        if torch.compiler.is_compiling():  # traced, the formula is fused with what is around it
            dx, dweight = norm_gradients(*inputs)
        else:
            dx, dweight = OPS.rms_norm_backward(*inputs, ctx.backend)
        return dx.view(x.shape), dweight, None, None, None, None


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


class _Rotation(torch.autograd.Function):
    """RoPE, which keeps no x: its gradient is the rotation back, whose own is the rotation."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, inverse: bool, backend: str
    ) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.x_dtype, ctx.inverse, ctx.backend = x.dtype, inverse, backend
        return OPS.rope(x, cos, sin, dtype, inverse, backend)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = _Rotation.apply(dy, *ctx.saved_tensors, ctx.x_dtype, not ctx.inverse, ctx.backend)
        return dx, None, None, None, None, None


def _swiglu(
    x: Tensor | QuantizedInput, gate: Float8Linear, up: Float8Linear, row: QuantSpec, col: QuantSpec | None
) -> tuple[Tensor, list[Tensor]]:
    """h = silu(gate(x)) * up(x) as autograd sees it, and its copies."""
    if not torch.compiler.is_compiling():
        gate.refresh_if_stale()
        up.refresh_if_stale()
    tensor = x.x if isinstance(x, QuantizedInput) else x
    out_dtype, needs = gate.checked_input(tensor), gate.plan.needs[_train((gate, up))]
    if isinstance(x, QuantizedInput):
        x_row, x_col = x.operands(needs)
    else:
        x_row, x_col = gate.inputs.get(tensor, needs, gate.plan.backend, gate.plan.site)
    products: list[Tensor] = []
    transposed: list[Tensor | None] = []
    later: list[LaterOperand | None] = []
    for linear in (gate, up):
        w, wt = linear.provider.operands(linear)
        products.append(gemm(x_row, w, bias=None, out_dtype=out_dtype, **linear.plan.common["fprop"]))
        transposed += wt.tensors() if isinstance(wt, Operand) else (None, None)
        later.append(None if isinstance(wt, Operand) else wt)
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
        later: list[LaterOperand | None],
    ) -> Tensor:  # fmt: skip
        weights = (gate_wt, gate_wt_scale, up_wt, up_wt_scale) if ctx.needs_input_grad[0] else (None, None, None, None)
        ctx.save_for_backward(gate, up, col, col_scale, *weights)
        ctx.plans, ctx.sinks, ctx.later, ctx.x_dtype = plans, sinks, later, x.dtype
        return _unwritten(gate, gate.dtype)

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
                right = Operand(wt, wt_scale, precision.dgrad.right) if later is None else later()
                part = gemm(left, right, bias=None, out_dtype=ctx.x_dtype, **plan.common["dgrad"])
                dx = part if dx is None else dx + part
            if need_dw[half]:
                dy_t = Operand(col_copy[0], col_copy[1], precision.wgrad.left)
                dw[half] = weight_grad(dy_t, wgrad_operand(col, col_scale, plan), plan, ctx.sinks[half])
        return dx, *dw, *([None] * 11)


def fused_norm(
    norm: nn.Module, readers: Sequence[Float8Linear], through: Iterable[nn.Module], *, eps: float, rounds_early: bool
) -> FusedRMSNorm:
    """A FusedRMSNorm with the parameters, hooks and attributes of `norm`; see NormFusion."""
    fused = _taking_over(FusedRMSNorm, norm)
    fused.fusion = NormFusion(type(norm), tuple(readers), tuple(through), eps, rounds_early)
    return fused


def fused_mlp(mlp: nn.Module) -> FusedMLP:
    """A FusedMLP with the linears, hooks and attributes of `mlp`."""
    fused = _taking_over(FusedMLP, mlp)
    fused.fusion = MLPFusion(type(mlp))
    return fused


def fused_rope(rope: nn.Module, backend: str) -> FusedRope:
    """A FusedRope with the hooks and attributes of `rope`; see RopeFusion."""
    fused = _taking_over(FusedRope, rope)
    fused.fusion = RopeFusion(type(rope), backend)
    return fused


def plain_module(fused: FusedRMSNorm | FusedMLP | FusedRope) -> nn.Module:
    """The module that a fused one took the place of, with the parameters, hooks and attributes that it has today."""
    plain = _taking_over(fused.fusion.plain, fused)
    del plain.fusion
    return plain


def _taking_over(kind: type[T], module: nn.Module) -> T:
    """A module of that class in the state of `module`, which is not used again."""
    made = kind.__new__(kind)
    made.__dict__.update(vars(module))
    return made


def refusal(linears: Iterable[Float8Linear]) -> str | None:
    """Why linears that read one input cannot take it as FP8 copies made elsewhere, or None."""
    first: Plan | None = None
    for linear in linears:
        plan = linear.plan
        first = plan if first is None else first
        if plan.precision is not first.precision and plan.precision != first.precision:
            return f"they differ in precision: {first.precision.name} and {plan.precision.name}"
        if plan.backend != first.backend:
            return f"they differ in backend: {first.backend} and {plan.backend}"
        if linear.remedy is not None:
            return "a remedy treats the input before it is rounded"
    assert first is not None
    if first.precision.fprop.left is None or first.precision.wgrad.right is None:
        return f"{first.precision.name} does not read the input in FP8 in both fprop and wgrad"
    return None


def mlp_refusal(gate: Float8Linear, up: Float8Linear, down: Float8Linear) -> str | None:
    """Why the product of a SwiGLU cannot be made in FP8, nor the gradients of its factors, or None."""
    if why := refusal((gate, up)) or refusal((down,)):
        return why
    if gate.bias is not None or up.bias is not None:
        return "a bias of gate_proj or up_proj needs its gradient in high precision"
    precision = gate.plan.precision
    if precision.dgrad.left is None or precision.wgrad.left is None:
        return f"{precision.name} does not read the gradient in FP8 in both dgrad and wgrad"
    return None if gate.plan.backend == down.plan.backend else "its linears differ in backend"


def _watched(modules: Iterable[nn.Module]) -> bool:
    """Whether a hook wants to see what a module reads or gives; one with reads_values = False does not."""
    if _has_any_global_hook():
        return True
    for module in modules:
        hooks = (
            module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks,
        )  # fmt: skip
        if any(getattr(hook, "reads_values", True) for kind in hooks for hook in kind.values()):
            return True
    return False


def _train(linears: Iterable[Float8Linear]) -> bool:
    """Whether the gradient of a weight will be computed."""
    return torch.is_grad_enabled() and any(linear.weight.requires_grad for linear in linears)


def _input_specs(precision: LinearPrecision, wgrad: bool) -> tuple[QuantSpec, QuantSpec | None]:
    """Row copy and column copy of an input to be made; with source "requant" the row copy serves as both."""
    row, col = precision.fprop.left, precision.wgrad.right
    assert row is not None
    return row, col if wgrad and precision.wgrad_source == "dual" else None


def _quantized_input(
    x: Tensor, copies: Sequence[Tensor], row: QuantSpec, col: QuantSpec | None, precision: LinearPrecision
) -> QuantizedInput:
    left = Operand(copies[0], copies[1], row)
    if col is not None:
        return QuantizedInput(x, left, Operand(copies[2], copies[3], col))
    return QuantizedInput(x, left, left if precision.wgrad_source == "requant" else None)


def _unwritten(like: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of that shape without memory of its own: autograd's handle on what exists in FP8 only."""
    return like.new_full((), float("nan"), dtype=dtype).expand(like.shape)
