"""Loss on fixed held-out windows, with exact token and byte counts; of a mix also that of each source."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fp8train.data import MASKED_TARGET, Batch, Batcher, HeldOut, Tokenizer
from fp8train.distributed import World
from fp8train.distributed.sharding import free_gathered
from fp8train.nn.weights import evaluation_precision
from fp8train.quant.formats import BF16
from fp8train.shards import is_sharded
from fp8train.trainer.step import inputs


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """Mean cross-entropy over the targets of all windows; of a mix the sources' means, weighed by their shares.

    nats: per token
    tokens: targets that entered
    bytes: UTF-8 bytes that as many targets of the mix stand for; 0 where the tokenizer drops some
    sources: nats of each source by its name
    """

    nats: float
    tokens: int
    bytes: float
    sources: dict[str, float] = field(default_factory=dict)

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
        windows_hash: SHA-256 over the token ids of all windows.
        hash: windows_hash; of a mix with the shares, which weigh the sources' losses.
    """

    def __init__(self, batcher: Batcher, world: World) -> None:
        parts = batcher.dataset.held_out()
        self._world = world
        self._names = [part.name for part in parts]
        self._shares = [part.share for part in parts]
        self.windows_hash, self.hash = held_out_hashes(parts)
        self._batches = batcher.eval_batches(parts)
        # the ranks of a sharded model must call it equally often: who has fewer windows reads one that does not count
        calls = int(world.all_max(float(len(self._batches))))
        self._idle = [batcher.batch_of(parts[0].samples[:1], [0]) for _ in range(calls - len(self._batches))]
        counts = torch.zeros((2, len(parts)), dtype=torch.float64)
        for source, batch in self._batches:
            counts[0, source] += int((batch.targets != MASKED_TARGET).sum())
            counts[1, source] += _bytes(batch, batcher.dataset.tokenizer)
        self._tokens, self._bytes = world.all_reduce_sum(counts.to(world.device)).tolist()
        self.tokens, self.bytes = int(sum(self._tokens)), int(sum(self._bytes))

    def score(self, model: nn.Module) -> Score:
        """Evaluate a model as it is, without gradients; every rank gets the result.

        Args:
            model: not wrapped in DDP; returns the summed loss for (tokens, targets, document_ids).
        """
        was_training = model.training
        model.eval()
        # A compiled model would be compiled again for the shapes and precisions of evaluation; that takes longer.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            # before the sum over ranks, or one rank would wait in it and the others in the gathering of a layer
            for batch in self._idle if is_sharded(model.parameters()) else ():
                model(*inputs(batch, self._world.device))
            score = self.average(lambda batch: model(*inputs(batch, self._world.device)))
        free_gathered(model)
        model.train(was_training)
        return score

    def average(self, loss: Callable[[Batch], Tensor]) -> Score:
        """The score where each micro-batch has the summed loss that `loss` gives."""
        totals = torch.zeros(len(self._names), dtype=torch.float64, device=self._world.device)
        for source, batch in self._batches:
            totals[source] += loss(batch)
        sums = self._world.all_reduce_sum(totals).tolist()
        sources = [source for source, tokens in enumerate(self._tokens) if tokens]  # of the others all is masked
        whole = sum(self._shares[source] for source in sources)
        nats = bytes_ = 0.0
        for source in sources:
            weight, tokens = self._shares[source] / whole, self._tokens[source]
            nats += weight * (sums[source] / tokens)
            bytes_ += weight * (self.tokens / tokens) * self._bytes[source]
        means = {self._names[source]: sums[source] / self._tokens[source] for source in sources}
        return Score(nats=nats, tokens=self.tokens, bytes=bytes_, sources=means)


def held_out_hashes(parts: Sequence[HeldOut]) -> tuple[str, str]:
    """EvalSet.windows_hash and EvalSet.hash."""
    windows = hashlib.sha256(b"".join(s.tokens.astype("<i8").tobytes() for part in parts for s in part.samples))
    weighed = windows.copy()
    if len(parts) > 1:
        weighed.update("".join(f"{len(part.samples)} x {part.share!r} " for part in parts).encode())
    return windows.hexdigest(), weighed.hexdigest()


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
        eval_loss, bits_per_byte, perplexity, eval_tokens, eval_bytes; of a mix also eval_loss/SOURCE; with bf16 all
        but the counts also as *_bf16 (eval_loss_bf16/SOURCE).
    """
    own = eval_set.score(model)
    row = _losses(own, "")
    if bf16:
        with contextlib.nullcontext() if all_bf16 else evaluation_precision(model, BF16):
            row |= _losses(own if all_bf16 else eval_set.score(model), "_bf16")
    return row | {"eval_tokens": own.tokens, "eval_bytes": eval_set.bytes}


def _losses(score: Score, suffix: str) -> dict[str, float]:
    row = {"eval_loss": score.nats, "bits_per_byte": score.bits_per_byte, "perplexity": score.perplexity}
    found = {f"{key}{suffix}": value for key, value in row.items()}
    if len(score.sources) > 1:
        found |= {f"eval_loss{suffix}/{name}": nats for name, nats in score.sources.items()}
    return found


def source_losses(row: Mapping[str, Any], suffix: str = "") -> dict[str, float]:
    """The held-out loss of each source of a mix in a row that evaluate gave; empty for one source."""
    start = f"eval_loss{suffix}/"
    return {key.removeprefix(start): value for key, value in row.items() if key.startswith(start)}


def score_text(row: Mapping[str, Any]) -> str:
    """`2.1034 nats, 3.035 bits/byte (stdlib 2.0511, notes.txt 2.2104); in BF16 2.1030 nats, 3.034 bits/byte`."""
    text = _loss_text(row["eval_loss"], row["bits_per_byte"])
    if each := source_losses(row):
        text += f" ({', '.join(f'{name} {nats:.4f}' for name, nats in each.items())})"
    if "eval_loss_bf16" in row:
        text += f"; in BF16 {_loss_text(row['eval_loss_bf16'], row['bits_per_byte_bf16'])}"
    return text


def _loss_text(nats: float, bits: float) -> str:
    return f"{nats:.4f} nats" if math.isnan(bits) and not math.isnan(nats) else f"{nats:.4f} nats, {bits:.3f} bits/byte"
