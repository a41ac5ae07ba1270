"""From the second micro-batch of a step on, wgrad adds into the gradient that is there, in its own epilogue.

Autograd would write dw [N, K] in FP32 and then add it in a pass of its own: 12 bytes of memory traffic more for each
weight and micro-batch, and room for dw. The sum is the same bit for bit, for the GEMM rounds grad + dw once, as that
pass does (but below 2^-126, which an H100 or H200 takes for zero there); of a linear that runs several times in a
micro-batch the same products are added in another order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from fp8train.nn.linear import Float8Linear
from fp8train.nn.linear_function import InplaceGrad
from fp8train.nn.weights import LocalWeight, converted_linears, own_weights


def accumulating_linears(model: nn.Module) -> list[Float8Linear]:
    """The linears with an FP8 wgrad that is the only gradient of their weight, and that nobody wants to see by itself.

    Left to autograd: wgrads in high precision, whose result is added in a pass of its own either way; weights that
    modules share, that are sharded, that do not train or whose rows are not contiguous, as a GEMM writes them; those
    with hooks on the gradient, but for one with reads_values = False; linears whose input a remedy changes or that
    have a sink.
    """
    alone = own_weights(model)
    return [
        linear
        for linear in converted_linears(model)
        if linear.precision.wgrad.left is not None
        and linear.precision.wgrad.right is not None
        and linear.remedy is None
        and isinstance(linear.provider, LocalWeight)
        and linear.grad_sink is None
        and (weight := linear._parameters.get("weight")) is not None
        and id(weight) in alone
        and weight.requires_grad
        and weight.is_contiguous()
        and not weight._backward_hooks
        and not any(getattr(hook, "reads_values", True) for hook in (weight._post_accumulate_grad_hooks or {}).values())
    ]


@contextmanager
def accumulate_in_place(linears: Sequence[Float8Linear]) -> Iterator[None]:
    """Let forward and backward in this block add to the gradients of these linears; one that has none gets it first."""
    for linear in linears:
        if linear.weight.grad is not None:
            linear.grad_sink = InplaceGrad(linear.weight.grad)
    try:
        yield
    finally:
        for linear in linears:
            linear.grad_sink = None
