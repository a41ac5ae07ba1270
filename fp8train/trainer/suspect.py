"""Whose doing a bad step was: whether BF16 fares as badly, and at which linear the first non-finite number was made."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fp8train.data import MASKED_TARGET, Batch
from fp8train.distributed import World
from fp8train.distributed.sharding import free_gathered
from fp8train.nn.gathered_operands import show_weights
from fp8train.nn.inputs import QuantizedInput
from fp8train.nn.linear import Float8Linear
from fp8train.nn.shared_inputs import group_of
from fp8train.nn.weights import evaluation_precision
from fp8train.quant.formats import BF16, LinearPrecision
from fp8train.shards import is_sharded, local
from fp8train.telemetry.observer import uncounted
from fp8train.trainer.probe import pass_apart
from fp8train.trainer.step import inputs

OUTSIDE = "outside"  # of every linear: weights, embedding, loss
Linears = Mapping[str, Float8Linear]  # by module path


@dataclass(kw_only=True, slots=True)
class Trace:
    """What was finite in one pass over a micro-batch.

    order: linears as forward reached them. finite: (linear, one of x, w, y, dy, dw) -> whether all of it was.
    """

    order: list[str] = field(default_factory=list)
    finite: dict[tuple[str, str], bool] = field(default_factory=dict)

    def culprit(self, quantised: Collection[str], sums: bool = False) -> tuple[int, str] | None:
        """The linear that made the first non-finite number, OUTSIDE for one that none made, behind the phase in which
        it was made: forward 0, backward 1, sums over ranks 2. None if there is none.

        That is the first one with finite operands and another result. What first turns up in the operand of one was
        made between it and the linear before it, in the order of computation, that does not share its input. One that
        does not quantise only hands on what came before.

        Args:
            quantised: linears that do.
            sums: dw is a sum over ranks, of which another may have made it.
        """
        if any(not finite for (_, operand), finite in self.finite.items() if operand == "w"):
            return 0, OUTSIDE
        backward = self.order[::-1]
        passes = [(0, self.order, "x", "y"), (1, backward, "dy", "" if sums else "dw"), (2, backward, "", "dw")]
        for phase, order, operand, result in passes:
            for place, fqn in enumerate(order):
                given, made = (self.finite.get((fqn, name), True) for name in (operand, result))
                if given and made:
                    continue
                spared = [] if given else group_of(fqn, self.order)
                before = (other for other in order[place::-1] if other in quantised and other not in spared)
                return phase, next(before, OUTSIDE)
        return None


def loss_of(
    model: nn.Module, batches: Sequence[Batch], world: World, linears: Linears, precision: LinearPrecision | None = None
) -> float:
    """Mean loss of micro-batches over all ranks, every linear in that precision; None: in its own."""
    there = contextlib.nullcontext() if precision is None else evaluation_precision(model, precision)
    total = torch.zeros(2, dtype=torch.float64, device=world.device)
    with there, torch.no_grad(), torch.compiler.set_stance("force_eager"), uncounted(linears.values()):
        for batch in batches:
            total[0] += model(*inputs(batch, world.device))
            total[1] += int((batch.targets != MASKED_TARGET).sum())
    free_gathered(model)
    loss, targets = world.all_reduce_sum(total).tolist()
    return float(loss / max(targets, 1.0))


def finite_in_bf16(model: nn.Module, batches: Sequence[Batch], world: World, linears: Linears) -> bool:
    """Whether loss and gradients of micro-batches are finite on all ranks where every linear computes in BF16."""
    bad = False
    with evaluation_precision(model, BF16):
        for batch in batches:
            loss, broken = _pass(model, batch, world, linears)
            bad |= not math.isfinite(loss) or bool(broken)
    return not world.any(bad)


def find_culprit(model: nn.Module, batches: Sequence[Batch], world: World, linears: Linears) -> str | None:
    """Trace.culprit of the first micro-batch in which, on any rank, there is one: of the earliest phase, and of several
    ranks' the first's.
    """
    quantised = {fqn for fqn, linear in linears.items() if linear.precision.quantized}
    for batch in batches:
        trace = Trace()
        with _watching(linears, trace) as flags:
            _, broken = _pass(model, batch, world, linears)
        trace.finite = {key: bool(flag) for key, flag in flags.items()}
        weights = {id(linear.weight): fqn for fqn, linear in linears.items()}
        trace.finite |= {(weights[one], "dw"): False for one in broken if one in weights}
        own = trace.culprit(quantised, sums=is_sharded(model.parameters()))
        found = [culprit for culprit in world.all_gather_object(own) if culprit is not None]
        if found:
            return min(found, key=lambda culprit: (culprit[0], culprit[1] == OUTSIDE))[1]
    return None


def _pass(model: nn.Module, batch: Batch, world: World, linears: Linears) -> tuple[float, list[int]]:
    """(mean loss of a micro-batch on this rank, id of each parameter whose gradient is not finite)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    mean, gradients = pass_apart(model, batch, world.device, linears.values(), parameters)
    broken = [
        id(parameter)
        for parameter, gradient in zip(parameters, gradients, strict=True)
        if gradient is not None and not bool(local(gradient).isfinite().all())
    ]
    return float(mean), broken


@contextlib.contextmanager
def _watching(linears: Linears, trace: Trace) -> Iterator[dict[tuple[str, str], Tensor]]:
    """Inside, forward and backward note which operands and results of linears are finite; gives the notes."""
    flags: dict[tuple[str, str], Tensor] = {}
    hooks = [linear.register_forward_hook(_Note(fqn, trace.order, flags)) for fqn, linear in linears.items()]
    show_weights(linears.values(), True)
    try:
        yield flags
    finally:
        show_weights(linears.values(), False)
        for hook in hooks:
            hook.remove()


class _Note:
    """Forward hook of one linear; the first call counts, since recomputation in backward is another."""

    def __init__(self, fqn: str, order: list[str], flags: dict[tuple[str, str], Tensor]) -> None:
        self._fqn, self._order, self._flags = fqn, order, flags

    def __call__(self, linear: Float8Linear, args: tuple[Any, ...], y: Tensor) -> None:
        if (self._fqn, "x") in self._flags:
            return
        self._order.append(self._fqn)
        x = args[0].x if isinstance(args[0], QuantizedInput) else args[0]
        for name, tensor in (("x", x), ("w", linear.weight), ("y", y)):
            self._note(name, tensor)
        if y.requires_grad:
            y.register_hook(lambda dy: self._note("dy", dy))

    def _note(self, name: str, tensor: Tensor) -> None:
        self._flags.setdefault((self._fqn, name), local(tensor.detach()).isfinite().all())
