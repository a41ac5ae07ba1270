"""What training takes of a device's memory besides weights and moments, found where there is no such device.

The model runs forward and backward on the meta device, whose tensors have shapes but no numbers, and the memory that
they would take is counted as it comes and goes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fp8train.backends.ops import fake_quantize
from fp8train.models import Decoder
from fp8train.nn.linear import Float8Linear
from fp8train.nn.weights import OPERANDS, LocalWeight, converted_linears
from fp8train.trainer.accumulation import accumulate_in_place, accumulating_linears

FLASH_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMemory:
    """Bytes of a step in eager mode besides weights, moments and the copies that the GEMMs read.

    kept: from forward to backward, of one micro-batch.
    peak: the most that there is at a time, with the gradients that there are then.
    """

    kept: int
    peak: int


def step_memory(
    model: Decoder,
    shape: tuple[int, int],
    micro_batches: int,
    *,
    device_type: str,
    document_mask: bool = False,
    keep_gradients: bool = True,
) -> StepMemory:
    """What a step takes.

    Args:
        model: converted, on the meta device.
        shape: (sequences, tokens) of a micro-batch.
        micro_batches: of a step; from the second on there are the gradients of those before.
        device_type: "cpu", or "cuda": where attention and norms are kernels of their own.
        document_mask: attention stops at the ends of documents.
        keep_gradients: False: each goes when it is complete, as those of a sharded model do, or into DDP's own room.
    """
    for linear in converted_linears(model):
        _lay_out_copies(linear)
    tokens = torch.zeros(shape, dtype=torch.int64, device="meta")
    live = LiveBytes([tokens, *model.parameters(), *held_copies(model)])
    documents = tokens if document_mask else None
    dropped = [] if keep_gradients else [p.register_post_accumulate_grad_hook(_drop) for p in model.parameters()]
    kept = 0
    try:
        with kernels_of(device_type), live:
            for number in range(min(micro_batches, 2)):
                begun = live.bytes
                with accumulate_in_place(accumulating_linears(model) if number else []):
                    loss = model(tokens, tokens, documents)
                    kept = live.bytes - begun
                    loss.backward()
                del loss
    finally:
        for hook in dropped:
            hook.remove()
        model.zero_grad(set_to_none=True)
    return StepMemory(kept=kept, peak=live.peak)


class LiveBytes(TorchDispatchMode):
    """Counts the memory of the tensors that operations make, for as long as anything holds it.

    Args:
        there: tensors whose memory does not count.

    Attributes:
        bytes: now. peak: the most that there were.
    """

    def __init__(self, there: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._seen: dict[int, weakref.ref[Any]] = {}
        for tensor in there:
            self._see(tensor, counts=False)

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation, and see what it has made."""
        made = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return made

    def _see(self, tensor: Tensor, counts: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)  # torch gives a storage one Python object for all of its life
        if key in self._seen:
            return
        size = storage.nbytes() if counts else 0

        def gone(_: weakref.ref[Any]) -> None:
            del self._seen[key]
            self.bytes -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


@contextmanager
def kernels_of(device_type: str) -> Iterator[None]:
    """Inside, functions that a device has kernels of its own for keep on the meta device what those keep.

    Not by a mode of torch, which does not hold in backward, where layers may run again.
    """
    others: dict[str, Callable[..., Tensor]] = {"scaled_dot_product_attention": _attention}
    if device_type == "cuda":
        others = {"scaled_dot_product_attention": _cuda_attention, "rms_norm": _rms_norm}
    own = {name: getattr(F, name) for name in others}
    try:
        for name, function in others.items():
            setattr(F, name, function)
        yield
    finally:
        for name, function in own.items():
            setattr(F, name, function)


def _cuda_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **_options: Any
) -> Tensor:
    """As scaled_dot_product_attention chooses on a GPU: flash, or where that does not serve memory-efficient."""
    if attn_mask is None and q.dtype in FLASH_DTYPES:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
    mask = None if attn_mask is None else attn_mask.expand(*q.shape[:3], k.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, 0.0, is_causal)[0]


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **_options: Any
) -> Tensor:
    """As scaled_dot_product_attention chooses on a CPU."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, attn_mask=attn_mask)[0]


class _FusedRMSNorm(torch.autograd.Function):
    """Keeps what aten._fused_rms_norm keeps on a GPU; on the meta device torch puts the norm together of others."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1)))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _rstd = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _rms_norm(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
    y: Tensor = _FusedRMSNorm.apply(x, weight)
    return y


def _lay_out_copies(linear: Float8Linear) -> None:
    """What a linear holds of its weight, without numbers; a linear on the meta device makes none by itself."""
    precision, weight = linear.precision, linear.weight.detach()
    fprop, dgrad = precision.fprop.right, precision.dgrad.right
    if linear.scaled_by():
        linear.channel_scale = weight.new_empty(linear.in_features)
    if not isinstance(linear.provider, LocalWeight):
        return
    if fprop is not None:
        linear.w_qdata, linear.w_scale_inv = fake_quantize(weight, str(fprop), False, linear.backend_name)
    if dgrad is not None and linear.provider.copies == "both":
        linear.wt_qdata, linear.wt_scale_inv = fake_quantize(weight, str(dgrad), True, linear.backend_name)
    if None in (fprop, dgrad):
        linear.w_high = weight.to(precision.high)


def held_copies(model: nn.Module) -> list[Tensor]:
    """What the linears of a model hold of their weights for their GEMMs."""
    every = [getattr(linear, name) for linear in converted_linears(model) for name in OPERANDS]
    return [tensor for tensor in every if tensor is not None]


def _drop(parameter: Tensor) -> None:
    parameter.grad = None
