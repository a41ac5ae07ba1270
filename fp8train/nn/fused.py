"""Modules that make the FP8 input of a linear themselves, RMSNorm before linears and SwiGLU in an MLP; and RoPE.

    fused_norm.py  x -> FP8 copies of rms_norm(x), for the linears that read it (q, k, v; gate, up)
    fused_mlp.py   gate, up -> FP8 codes of h = silu(gate) * up, for down; backward: dh -> FP8 copies of dgate and dup,
                   and h.T for down's wgrad
    fused_rope.py  queries or keys -> rotated, by one kernel forward and backward, whatever the precision of the linears
What is quantised is never written in high precision: autograd is connected by a tensor of the right shape whose numbers
nobody reads, and which are NaN. A fused module has the parameters, state-dict names and hooks of the plain one that it
took the place of. At each forward it looks at its linears: where their precisions do not permit it falls back to the
plain forward, and where hooks want to see numbers it computes the same ones and writes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fp8train.backends import fused_ops as _fused_ops  # noqa: F401  registers the operators
from fp8train.nn.linear import Float8Linear
from fp8train.nn.linear_function import Plan
from fp8train.nn.operands import Operand
from fp8train.quant.formats import LinearPrecision, QuantSpec

T = TypeVar("T", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Fusion:
    """What a fused module knows beyond the module that it took the place of.

    Args:
        plain: class of that module.
    """

    plain: type[nn.Module]


class Fused(nn.Module):
    """A module that took the place of a plain one."""

    fusion: Fusion


def plain_module(fused: Fused) -> nn.Module:
    """The module that a fused one took the place of, with the parameters, hooks and attributes that it has today."""
    plain = taking_over(fused.fusion.plain, fused)
    del plain.fusion
    return plain


def taking_over(kind: type[T], module: nn.Module) -> T:
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


def watched(modules: Iterable[nn.Module]) -> bool:
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


def trains(linears: Iterable[Float8Linear]) -> bool:
    """Whether the gradient of a weight will be computed."""
    return torch.is_grad_enabled() and any(linear.weight.requires_grad for linear in linears)


def input_specs(precision: LinearPrecision, wgrad: bool) -> tuple[QuantSpec, QuantSpec | None]:
    """Row copy and column copy of an input to be made; with source "requant" the row copy serves as both."""
    row, col = precision.fprop.left, precision.wgrad.right
    assert row is not None
    return row, col if wgrad and precision.wgrad_source == "dual" else None


def input_operands(
    copies: Sequence[Tensor], row: QuantSpec, col: QuantSpec | None, precision: LinearPrecision
) -> tuple[Operand, Operand | None]:
    """Those copies as fprop's left operand and what wgrad's right one is kept as, if it is."""
    left = Operand(copies[0], copies[1], row)
    if col is not None:
        return left, Operand(copies[2], copies[3], col)
    return left, left if precision.wgrad_source == "requant" else None


def unwritten(like: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of that shape without memory of its own: autograd's handle on what exists in FP8 only."""
    return like.new_full((), float("nan"), dtype=dtype).expand(like.shape)
