"""A forward and backward pass beside training: it leaves no gradient and is not counted."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from fp8train.data import MASKED_TARGET, Batch
from fp8train.nn.linear import Float8Linear
from fp8train.shards import is_sharded
from fp8train.telemetry.observer import uncounted
from fp8train.trainer.step import inputs


def pass_apart(model: nn.Module, batch: Batch, device: torch.device, linears: Iterable[Float8Linear]) -> None:
    """Run a micro-batch through the model, uncompiled, and the gradient of its mean loss back to the first parameter.

    Args:
        model: not wrapped in DDP; whoever wants to see something has hooks on its modules.
        batch: a micro-batch of this rank. Every rank of a sharded model must call this, before a step or after it.
        device: where to.
        linears: what they run does not count as training.
    """
    parameters = list(model.parameters())
    targets = int((batch.targets != MASKED_TARGET).sum())
    with torch.compiler.set_stance("force_eager"), uncounted(linears):
        loss = model(*inputs(batch, device))
        mean = loss / max(targets, 1)
        if not is_sharded(parameters):
            # not backward(): that would fill .grad, and wake the hooks of DDP
            torch.autograd.grad(mean, parameters[0])
            return
        mean.backward()  # which gathers the layers and frees them again
        for parameter in model.parameters():
            parameter.grad = None
