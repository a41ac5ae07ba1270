"""Loss on fixed held-out windows, with exact token and byte counts."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fp8train.data import MASKED_TARGET, Batch, Batcher, Tokenizer
from fp8train.distributed import World
from fp8train.distributed.sharding import free_gathered
from fp8train.nn.weights import evaluation_precision
from fp8train.quant.formats import BF16
from fp8train.shards import is_sharded
from fp8train.trainer.step import inputs


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """Mean cross-entropy over the targets of all windows.

    nats: per token
    tokens: targets that entered
    bytes: UTF-8 bytes that those targets stand for; 0 where the tokenizer drops some
    """

    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """nats * tokens / (ln 2 * bytes)."""
        return self.nats * self.tokens / (math.log(2) * self.bytes) if self.bytes else math.nan

    @property
    def perplexity(self) -> float:
        """exp(nats), per token; infinite beyond the range of a float, NaN where nats is."""
        return math.inf if self.nats >= 700 else math.exp(self.nats)


class EvalSet:
    """Held-out windows, the same at every evaluation, shared out among the ranks.

    Args:
        batcher: gives this rank its share.
        world: sums over the ranks.

    Attributes:
        tokens, bytes: targets of all windows, over all ranks, and the UTF-8 bytes that they stand for.
        hash: SHA-256 over the token ids of all windows.
    """

    def __init__(self, batcher: Batcher, world: World) -> None:
        dataset = batcher.dataset
        windows = dataset.eval_samples()
        self.hash = hashlib.sha256(b"".join(window.tokens.astype("<i8").tobytes() for window in windows)).hexdigest()
        self._world = world
        self._batches = batcher.eval_batches()
        # the ranks of a sharded model must call it equally often: who has fewer windows reads one that does not count
        calls = int(world.all_max(float(len(self._batches))))
        self._idle = [batcher.eval_batch(0) for _ in range(calls - len(self._batches))]
        tokens = sum(int((batch.targets != MASKED_TARGET).sum()) for batch in self._batches)
        self.tokens = int(world.all_reduce_sum(float(tokens)))
        self.bytes = int(world.all_reduce_sum(float(sum(_bytes(batch, dataset.tokenizer) for batch in self._batches))))

    def score(self, model: nn.Module) -> Score:
        """Evaluate a model as it is, without gradients; every rank gets the result.

        Args:
            model: not wrapped in DDP; returns the summed loss for (tokens, targets, document_ids).
        """
        was_training = model.training
        model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self._world.device)
        # A compiled model would be compiled again for the shapes and precisions of evaluation; that takes longer.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for batch in self._batches:
                total += model(*inputs(batch, self._world.device))
            for batch in self._idle if is_sharded(model.parameters()) else ():
                model(*inputs(batch, self._world.device))
        free_gathered(model)
        model.train(was_training)
        total = self._world.all_reduce_sum(total)
        return Score(nats=float(total) / max(self.tokens, 1), tokens=self.tokens, bytes=self.bytes)


def _bytes(batch: Batch, tokenizer: Tokenizer) -> int:
    """UTF-8 bytes that the targets stand for; 0 for a tokenizer whose ids do not say."""
    if not tokenizer.bytes_exact:
        return 0
    # with the token before the first target: whether it is a separator counts
    windows = torch.cat([batch.tokens[:, :1], batch.targets], dim=1).numpy()
    return sum(tokenizer.bytes_of(window) - tokenizer.bytes_of(window[:1]) for window in windows)


def evaluate(model: nn.Module, eval_set: EvalSet, *, bf16: bool, all_bf16: bool) -> dict[str, Any]:
    """Score a model in its own precision and in BF16.

    Args:
        bf16: also score with every linear in BF16.
        all_bf16: every linear is in BF16 as it is, so that one pass gives both.

    Returns:
        eval_loss, bits_per_byte, perplexity, eval_tokens, eval_bytes; with bf16 the first three also as *_bf16.
    """
    own = eval_set.score(model)
    row: dict[str, Any] = {"eval_loss": own.nats, "bits_per_byte": own.bits_per_byte, "perplexity": own.perplexity}
    if bf16:
        with contextlib.nullcontext() if all_bf16 else evaluation_precision(model, BF16):
            high = own if all_bf16 else eval_set.score(model)
        row |= {
            "eval_loss_bf16": high.nats,
            "bits_per_byte_bf16": high.bits_per_byte,
            "perplexity_bf16": high.perplexity,
        }
    return row | {"eval_tokens": own.tokens, "eval_bytes": own.bytes}


def score_text(row: Mapping[str, Any]) -> str:
    """`2.1034 nats, 3.035 bits/byte; in BF16 2.1030 nats, 3.034 bits/byte`."""
    text = _loss_text(row["eval_loss"], row["bits_per_byte"])
    if "eval_loss_bf16" in row:
        text += f"; in BF16 {_loss_text(row['eval_loss_bf16'], row['bits_per_byte_bf16'])}"
    return text


def _loss_text(nats: float, bits: float) -> str:
    return f"{nats:.4f} nats" if math.isnan(bits) and not math.isnan(nats) else f"{nats:.4f} nats, {bits:.3f} bits/byte"
