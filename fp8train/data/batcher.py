"""Batches of a step for one rank. Step s takes samples s*G .. s*G+G-1, however ranks and micro-batches share them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fp8train.data.config import MASKED_TARGET
from fp8train.data.dataset import Dataset, HeldOut, StreamPosition
from fp8train.data.packing import Sample
from fp8train.errors import DataError


@dataclass(kw_only=True, slots=True)
class Batch:
    """One micro-batch. tokens, targets: [b, T] int64. document_ids: [b, T] int64, or None without document mask."""

    tokens: Tensor
    targets: Tensor
    document_ids: Tensor | None
    sample_ids: list[int]


class Batcher:
    """Splits the samples of a step over micro-batches, then ranks, each a contiguous range.

    Args:
        dataset: where samples come from.
        global_batch_samples: G, samples of one optimizer step over all ranks.
        micro_batch_samples: b, samples of one forward pass on one rank.
        rank, world_size: this process among those that share the step.

    Raises:
        DataError: G is not a multiple of b * world_size.
    """

    def __init__(
        self, dataset: Dataset, global_batch_samples: int, micro_batch_samples: int, rank: int = 0, world_size: int = 1
    ) -> None:
        together = micro_batch_samples * world_size
        if min(global_batch_samples, micro_batch_samples, world_size) < 1:
            raise DataError(
                f"batch: global batch {global_batch_samples}, micro-batch {micro_batch_samples}, ranks {world_size}; "
                "each needs at least 1."
            )
        if global_batch_samples % together:
            lower = global_batch_samples - global_batch_samples % together
            near = f"{lower} or {lower + together}" if lower else f"{together}"
            raise DataError(
                f"batch: global batch of {global_batch_samples} samples is not divisible by {micro_batch_samples} "
                f"samples a micro-batch x {world_size} ranks = {together}; nearest: {near} samples ({dataset.seq_len} "
                "tokens each). Change global_batch_tokens or micro_batch_samples."
            )
        self.dataset = dataset
        self.global_batch_samples = global_batch_samples
        self.micro_batch_samples = micro_batch_samples
        self.rank = rank
        self.world_size = world_size
        self.num_micro_batches = global_batch_samples // together

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step, in order."""
        size, begin = self.micro_batch_samples, step * self.global_batch_samples
        starts = range(begin + self.rank * size, begin + self.global_batch_samples, size * self.world_size)
        chunks = [list(range(start, start + size)) for start in starts]
        return [self.batch_of([self.dataset.sample(index) for index in chunk], chunk) for chunk in chunks]

    def skip_to(self, step: int, streams: Sequence[StreamPosition] = ()) -> str:
        """Bring the dataset to a step, after a resume; says what it cost.

        streams: as `dataset.stream_positions` gave them at that step, on any rank.
        """
        return self.dataset.skip_to(step * self.global_batch_samples, streams)

    def eval_batches(self, held_out: Sequence[HeldOut]) -> list[tuple[int, Batch]]:
        """This rank's share of the held-out windows, in micro-batches of one source each (its last may be short).

        Returns:
            (number of the source, micro-batch); sample_ids count the windows of all sources.
        """
        counts = [len(part.samples) for part in held_out]
        ends = list(itertools.accumulate(counts))
        first, last = (rank * ends[-1] // self.world_size for rank in (self.rank, self.rank + 1))
        found = []
        for source, (part, count, end) in enumerate(zip(held_out, counts, ends, strict=True)):
            begin = end - count
            mine = range(max(first, begin), min(last, end))
            for start in range(0, len(mine), self.micro_batch_samples):
                chunk = mine[start : start + self.micro_batch_samples]
                found.append((source, self.batch_of([part.samples[i - begin] for i in chunk], list(chunk))))
        return found

    def batch_of(self, samples: Sequence[Sample], sample_ids: list[int]) -> Batch:
        """These windows as one micro-batch."""
        tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples]))
        inputs = tokens[:, :-1].contiguous()
        targets = tokens[:, 1:].clone(memory_format=torch.contiguous_format)  # written below; of one row both are views
        if not self.dataset.document_mask:
            return Batch(tokens=inputs, targets=targets, document_ids=None, sample_ids=sample_ids)
        ids = torch.from_numpy(np.stack([sample.document_ids for sample in samples])).long()
        targets[ids[:, 1:] != ids[:, :-1]] = MASKED_TARGET
        return Batch(tokens=inputs, targets=targets, document_ids=ids[:, :-1].contiguous(), sample_ids=sample_ids)
