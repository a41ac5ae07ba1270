"""Weights that are sharded over ranks: whole only while their layer computes, and so are their GEMM operands."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from fp8train.errors import ConfigError
from fp8train.nn.operands import LaterOperand, Operand, quantized
from fp8train.nn.weights import converted_linears

if TYPE_CHECKING:
    from fp8train.nn.linear import Float8Linear


class GatheredWeight:
    """Provider of a weight that something else makes whole for forward, and again for backward (FSDP2).

    Operands are made from the whole FP32 master: the codes of a weight on one rank, however its rows are spread.

    Args:
        keep: make them once after each optimizer step, as those of a replicated weight, because the weight is whole
            from forward to backward anyway, or is used many times. Otherwise w is made in forward and w.T in backward,
            and no operand lives from one to the other; in a compiled layer the compiler may decide to keep w.T.
    """

    def __init__(self, keep: bool = False) -> None:
        self._keep = keep
        self._held: tuple[Operand, Operand] | None = None

    def refresh(self, linear: Float8Linear) -> None:
        """Drop what is kept; operands are made when they are asked for."""
        self._held = None

    def operands(self, linear: Float8Linear) -> tuple[Operand, Operand | LaterOperand]:
        """w [N, K] for fprop, and w.T [K, N] for dgrad, or what makes it once the weight is whole again."""
        if not self._keep:
            return _operand(linear, False), partial(_operand, linear, True)
        if self._held is None:
            w = _operand(linear, False)
            same = w.spec is None and linear.plan.precision.dgrad.right is None
            self._held = w, Operand(w.data.t()) if same else _operand(linear, True)
        return self._held


@torch.no_grad()
def _operand(linear: Float8Linear, transposed: bool) -> Operand:
    precision, backend = linear.plan.precision, linear.plan.backend
    spec = precision.dgrad.right if transposed else precision.fprop.right
    return quantized(linear.weight.detach(), spec, precision.high, transposed, backend, precision.noise)


def gather_weights(model: nn.Module, layers: nn.Module) -> None:
    """From now on the converted linears of a model make the operands of their weights when they need them.

    Args:
        model: converted; sharded after this call.
        layers: linears below it keep no operands; the others of the model do, from one optimizer step to the next.

    Raises:
        ConfigError: a linear's recipe treats its input, and changes its weight by those of other linears (`swiglu`).
    """
    in_layers = {id(linear) for linear in converted_linears(layers)}
    for linear in converted_linears(model):
        if linear.remedy is not None:
            raise ConfigError(
                "parallel.strategy: got fsdp with a recipe that treats the input of SwiGLU's down projection (swiglu); "
                "needs one that does not. Use parallel=ddp, or take `swiglu` out of the recipe."
            )
        linear.provider = GatheredWeight(keep=id(linear) not in in_layers)
        linear.forget_weight()  # or it would keep the whole master alive while that is sharded
