"""Activation checkpointing of a decoder layer: what backward computes again and what it finds saved."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

CHOICES = ("none", "selective", "full")

_ATEN = torch.ops.aten
_KEPT = frozenset(
    {
        _ATEN.mm.default,
        _ATEN.addmm.default,
        _ATEN.bmm.default,
        _ATEN._scaled_mm.default,
        _ATEN._scaled_dot_product_flash_attention.default,
        _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
        _ATEN._scaled_dot_product_efficient_attention.default,
        _ATEN._scaled_dot_product_cudnn_attention.default,
    }
)


def run_layer(choice: str, layer: nn.Module, *inputs: Tensor | None) -> Tensor:
    """layer(*inputs), keeping for backward what `choice` says.

    Args:
        choice: "none" keeps everything. "full" keeps the layer's input and runs the layer again in backward.
            "selective" keeps the results of matrix multiplications and of attention, which hold nearly all of the time,
            and repeats the rest (norms, RoPE, SwiGLU, casts, quantisation). By the shapes of Llama-3-8B in BF16 that
            keeps 111 of 184 kB a token and layer; "full" keeps 16 kB.
        layer: takes and returns tensors.
        inputs: arguments of layer.
    """
    if choice == "none" or not torch.is_grad_enabled():
        return layer(*inputs)
    # a decoder layer draws no random numbers, so there is no state to restore
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if choice == "selective":
        options["context_fn"] = _selective_contexts
    return checkpoint(layer, *inputs, **options)


def _policy(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    # every FP8 GEMM is one operation of the namespace fp8train, whichever backend runs it
    ours = getattr(operation, "namespace", "") == "fp8train" and "mm" in operation.__name__
    return CheckpointPolicy.MUST_SAVE if ours or operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


_selective_contexts: Callable[[], Any] = partial(create_selective_checkpoint_contexts, _policy)
