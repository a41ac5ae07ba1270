"""One optimizer step: micro-batches forward and backward, one agreement between ranks, clip, update or skip."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fp8train.data import MASKED_TARGET, Batch
from fp8train.distributed import World, gradient_sync
from fp8train.optim import clip_grad_norm
from fp8train.trainer.accumulation import accumulate_in_place, accumulating_linears


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What one step gave; the same on every rank.

    loss: mean cross-entropy in nats over the valid tokens of all ranks
    grad_norm: global 2-norm before clipping
    valid_tokens: targets that entered the loss, over all ranks
    updated: false where loss or norm was not finite: weights and moments are as before
    stop: some rank asked to stop after this step
    save: some rank asked for a checkpoint of it
    bad_ranks: of several, those whose own loss was not finite
    """

    loss: float
    grad_norm: float
    valid_tokens: int
    updated: bool
    stop: bool
    save: bool = False
    bad_ranks: tuple[int, ...] = ()


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Batch],
    world: World,
    *,
    clip: float | None,
    stop: bool = False,
    save: bool = False,
) -> StepResult:
    """Accumulate gradients over micro-batches and update once.

    loss = sum of cross-entropies / number of valid targets, both over all micro-batches and ranks, so that it does
    not depend on the split. Gradients are FP32 all the way; wrap_ddp sums them over ranks.

    Args:
        model: returns the summed loss for (tokens, targets, document_ids); DDP reduces in the last micro-batch only.
        optimizer: over the parameters of model; its gradients are set to None at the end.
        micro_batches: of this rank; every rank has the same number.
        clip: largest global norm; None leaves gradients as they are.
        stop: this rank asks to stop.
        save: this rank asks for a checkpoint.

    Returns:
        StepResult: on a non-finite loss or norm nothing is updated, on any rank.
    """
    own = sum(int((batch.targets != MASKED_TARGET).sum()) for batch in micro_batches)
    valid_tokens = int(world.all_reduce_sum(float(own)))
    factor = 1.0 / max(valid_tokens, 1)
    loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
    linears = accumulating_linears(model) if len(micro_batches) > 1 else []
    for number, batch in enumerate(micro_batches, start=1):
        last = number == len(micro_batches)
        # DDP starts its sums when autograd has accumulated a gradient, in the last micro-batch
        ours = [] if last and world.world_size > 1 else linears
        with gradient_sync(model, last), accumulate_in_place(ours):
            loss = model(*inputs(batch, world.device))
            (loss * factor).backward()
        loss_sum += loss.detach()
    norm = clip_grad_norm(model.parameters(), clip)
    # One collective decides for all: a NaN of any rank survives the sum, a request counts at least 1.
    requests = [torch.full_like(loss_sum, float(request)) for request in (stop, save)]
    agreed = torch.stack([loss_sum, (~norm.isfinite()).to(loss_sum), *requests])
    total_loss, bad_norms, stops, saves = world.all_reduce_sum(agreed).tolist()
    mean_loss = total_loss / max(valid_tokens, 1)
    updated = math.isfinite(mean_loss) and bad_norms == 0
    if updated:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    bad = [] if updated else world.all_gather_object(not bool(loss_sum.isfinite()))
    return StepResult(
        loss=mean_loss,
        grad_norm=float(norm),
        valid_tokens=valid_tokens,
        updated=updated,
        stop=stops > 0,
        save=saves > 0,
        bad_ranks=tuple(rank for rank, own in enumerate(bad) if own and world.world_size > 1),
    )


def inputs(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """tokens, targets and document_ids of a micro-batch on the device, as a model takes them."""
    ids = batch.document_ids
    return (
        batch.tokens.to(device, non_blocking=True),
        batch.targets.to(device, non_blocking=True),
        None if ids is None else ids.to(device, non_blocking=True),
    )
