"""Cross-entropy of a language model in FP32 without the FP32 logits of all tokens at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fp8train.data.config import MASKED_TARGET

LOGITS_PER_CHUNK = 2**28
"""Logits that exist at once: 1 GiB in FP32, 2,048 tokens of a 128k vocabulary."""
ROWS = 128
"""Chunks hold a multiple of this many tokens, so that a wgrad that scales blocks of 128 tokens sees the same blocks."""


def cross_entropy_sum(
    hidden: Tensor, targets: Tensor, lm_head: nn.Module, vocab_size: int, logits_per_chunk: int = LOGITS_PER_CHUNK
) -> Tensor:
    """Sum over tokens of -log softmax(lm_head(hidden))[target], in FP32.

    Where the logits of all tokens exceed logits_per_chunk, the tokens are taken in chunks whose logits are computed
    again in backward: lm_head's fprop runs twice, and only the hidden states are kept.

    Args:
        hidden: [M, hidden].
        targets: [M] int64; MASKED_TARGET leaves a token out.
        lm_head: maps [m, hidden] to [m, >= vocab_size].
        vocab_size: columns of the softmax; those after are padding.
        logits_per_chunk: number of logits that may exist at once.

    Returns:
        Tensor: fp32 scalar; 0 if every target is MASKED_TARGET.
    """
    rows = max(ROWS, logits_per_chunk // vocab_size // ROWS * ROWS)
    if hidden.shape[0] <= rows:
        return _cross_entropy_sum(hidden, targets, lm_head, vocab_size)
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for part, part_targets in zip(hidden.split(rows), targets.split(rows), strict=True):
        total = total + checkpoint(
            _cross_entropy_sum, part, part_targets, lm_head, vocab_size, use_reentrant=False, preserve_rng_state=False
        )
    return total


def _cross_entropy_sum(hidden: Tensor, targets: Tensor, lm_head: nn.Module, vocab_size: int) -> Tensor:
    logits = lm_head(hidden)[:, :vocab_size].float()
    return F.cross_entropy(logits, targets, reduction="sum", ignore_index=MASKED_TARGET)
