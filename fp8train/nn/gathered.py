"""Weights that are sharded over ranks: whole only while their layer computes, and so are their GEMM operands."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from fp8train.errors import ConfigError
from fp8train.nn.operands import Operand, quantized
from fp8train.nn.weights import converted_linears

if TYPE_CHECKING:
    from fp8train.nn.linear import Float8Linear


class GatheredWeight:
    """Provider of a weight that something else makes whole for forward, and again for backward (FSDP2).

    Operands are made from the whole FP32 master each time: the codes of a weight on one rank, however its rows are
    spread. w is made in forward; w.T in backward, so that no operand lives from one to the other.
    """

    def refresh(self, linear: Float8Linear) -> None:
        """Nothing: operands are made when they are asked for."""

    def operands(self, linear: Float8Linear) -> tuple[Operand, Callable[[], Operand]]:
        """w [N, K] for fprop, and what makes w.T [K, N] for dgrad once the weight is whole again."""
        return _operand(linear, False), partial(_operand, linear, True)


@torch.no_grad()
def _operand(linear: Float8Linear, transposed: bool) -> Operand:
    precision, backend = linear.plan.precision, linear.plan.backend
    spec = precision.dgrad.right if transposed else precision.fprop.right
    return quantized(linear.weight.detach(), spec, precision.high, transposed, backend, precision.noise)


def gather_weights(model: nn.Module) -> None:
    """From now on the converted linears of a model make the operands of their weights when they need them.

    Args:
        model: converted; sharded after this call.

    Raises:
        ConfigError: a linear's recipe changes its weight by those of other layers (`smooth`, `clamp` of a SwiGLU).
    """
    for linear in converted_linears(model):
        if linear.remedy is not None:
            raise ConfigError(
                "parallel.strategy: got fsdp with a recipe that treats the input of SwiGLU's down projection (swiglu); "
                "needs one that does not. Use parallel=ddp, or take `swiglu` out of the recipe."
            )
        linear.provider = GatheredWeight()
        linear.forget_weight()  # or it would keep the whole master alive while that is sharded
