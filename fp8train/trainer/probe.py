"""A forward and backward pass beside training: it leaves no gradient and is not counted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fp8train.data import MASKED_TARGET, Batch
from fp8train.nn.linear import Float8Linear
from fp8train.shards import is_sharded
from fp8train.telemetry.observer import uncounted
from fp8train.trainer.step import inputs


def pass_apart(
    model: nn.Module,
    batch: Batch,
    device: torch.device,
    linears: Iterable[Float8Linear],
    wanted: Sequence[Tensor] | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """Run a micro-batch through the model, uncompiled, and the gradient of its mean loss back to the first parameter.

    Args:
        model: not wrapped in DDP; whoever wants to see something has hooks on its modules.
        batch: a micro-batch of this rank. Every rank of a sharded model must call this, before a step or after it.
        device: where to.
        linears: what they run does not count as training.
        wanted: parameters whose gradients are given; None: the first alone, for which backward goes all the way.

    Returns:
        (mean loss of the micro-batch on this rank, gradients; None for a parameter that has no part in the loss).
    """
    wanted = [next(model.parameters())] if wanted is None else wanted
    targets = int((batch.targets != MASKED_TARGET).sum())
    with torch.compiler.set_stance("force_eager"), uncounted(linears):
        mean = model(*inputs(batch, device)) / max(targets, 1)
        if not is_sharded(wanted):  # not backward(): that would fill .grad, and wake the hooks of DDP
            return mean.detach(), list(torch.autograd.grad(mean, wanted, allow_unused=True))
        mean.backward()  # which gathers the layers and frees them again
        gradients = [parameter.grad for parameter in wanted]
        for parameter in model.parameters():
            parameter.grad = None
        return mean.detach(), gradients
