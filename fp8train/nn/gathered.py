"""Weights that are sharded over ranks: whole only while their layer computes, and so are their GEMM operands."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fp8train.errors import ConfigError
from fp8train.nn.operands import LaterOperand, Operand
from fp8train.nn.weights import COPIES, converted_linears, weight_operand
from fp8train.shards import is_partitioned, is_sharded

if TYPE_CHECKING:
    from fp8train.nn.gathered_operands import GatheredOperand
    from fp8train.nn.linear import Float8Linear


class GatheredWeight:
    """Provider of a weight that something else makes whole for forward, and again for backward (FSDP2, ZeRO-3).

    Operands are made from the whole FP32 master, unless they are what is gathered: the codes of a weight on one rank,
    however its rows are spread.

    Args:
        keep: make them once after each optimizer step, as those of a replicated weight, because the weight is whole
            from forward to backward anyway, or is used many times. Otherwise w is made in forward and w.T in backward,
            and no operand lives from one to the other; in a compiled layer the compiler may decide to keep w.T.
    """

    copies = COPIES[0]  # where any are kept; see LocalWeight
    exchanges = False  # its memory is another each time that it is made whole; see SeenWeight
    gathered: GatheredOperand | None = None

    def __init__(self, keep: bool = False) -> None:
        self.keeps = keep  # operands that are made of the master
        self._held: tuple[Operand, Operand] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what FSDP2 asks for: a copy's weight is not one that it gathers."""
        return {**self.__dict__, "gathered": None}

    def refresh(self, linear: Float8Linear) -> None:
        """Drop what is kept; operands are made when they are asked for."""
        self._held = None
        if self.gathered is not None:
            self.gathered.forget()

    def operands(self, linear: Float8Linear) -> tuple[Operand, Operand | LaterOperand]:
        """w [N, K] for fprop, and w.T [K, N] for dgrad, or what makes it once the weight is whole again."""
        if is_sharded((linear.weight,)):
            raise ConfigError(
                "Float8Linear: weight is a DTensor while its layer computes; needs a plain tensor, which fully_shard "
                "makes of it for forward. Call the module that was sharded, and keep nn.Linear where "
                "parallelize_module splits a layer."
            )
        if self.gathered is None and linear.scaled_by() and not linear.weight.is_meta:  # there are no numbers to scale
            raise ConfigError(
                "Float8Linear: weight is sharded and other weights scale its input (swiglu: smooth); needs the scales "
                "gathered too. Call fp8train.gather_operands(model) after fully_shard; elsewhere take `smooth` out of "
                "the recipe."
            )
        if self.gathered is not None and (operands := self.gathered.operands()) is not None:
            return operands
        if linear.weight.dim() != 2:
            raise ConfigError(
                f"Float8Linear: weight is {list(linear.weight.shape)} while its layer computes; needs [out_features, "
                "in_features], which ZeRO-3 of DeepSpeed makes of it where a module is called. Call the module, not "
                "its forward, or stay within deepspeed.zero.GatheredParameters."
            )
        if not self.keeps:
            return weight_operand(linear, False), LaterOperand(partial(_gathered, linear))
        if self._held is None:
            w = weight_operand(linear, False)
            same = w.spec is None and linear.plan.precision.dgrad.right is None
            self._held = w, Operand(w.data.t()) if same else weight_operand(linear, True)
        return self._held


def _gathered(linear: Float8Linear, *_: Tensor | None) -> Operand:
    """w.T from the weight, which is whole again."""
    return weight_operand(linear, True)


def follow_sharding(linear: Float8Linear, whole: bool = False) -> None:
    """Give a linear whose weight was sharded after its conversion the provider of such weights.

    Args:
        whole: something has made the weight whole, so that it looks like any other.

    Raises:
        ValueError: its weight is of another tensor class that holds no matrix itself.
    """
    wrapped, partitioned = is_traceable_wrapper_subclass(linear.weight), is_partitioned(linear.weight)
    if not (wrapped or partitioned or whole) or isinstance(linear.provider, GatheredWeight):
        return
    if wrapped and not is_sharded((linear.weight,)):
        raise ValueError(
            f"Float8Linear: weight is a {type(linear.weight).__name__}; needs a plain tensor, whose memory the kernels "
            "read. Keep nn.Linear for this layer."
        )
    linear.provider = GatheredWeight()
    linear.forget_weight()


def gather_weights(model: nn.Module, layers: nn.Module) -> None:
    """From now on the converted linears of a model make the operands of their weights when they need them.

    Args:
        model: converted; sharded after this call.
        layers: linears below it keep no operands; the others of the model do, from one optimizer step to the next.
    """
    in_layers = {id(linear) for linear in converted_linears(layers)}
    for linear in converted_linears(model):
        linear.provider = GatheredWeight(keep=id(linear) not in in_layers)
        linear.forget_weight()  # or it would keep the whole master alive while that is sharded
