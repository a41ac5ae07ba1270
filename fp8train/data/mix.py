"""Weighted mixing of datasets. Each block of samples holds the exact shares, in a seeded order."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from fp8train.data.dataset import HeldOut, PackedDataset, StreamPosition
from fp8train.data.packing import Sample, permutation
from fp8train.data.stream import StreamedDataset
from fp8train.errors import DataError

Source: TypeAlias = PackedDataset | StreamedDataset
LARGEST_BLOCK = 10_000
MIX_ORDER = 3


class MixedDataset:
    """Samples of several datasets in fixed proportions.

    In each block of sum(quotas) samples, source k has exactly quotas[k] of them, in an order that (seed, block)
    gives; its samples are taken one after the other. Each source has its own epochs: a small one starts again while a
    large one goes on.

    Args:
        datasets: with one seq_len, tokenizer and document mask.
        quotas: samples of each in a block.
        names: what reports call the sources.
        seed: of the order.
    """

    def __init__(self, datasets: Sequence[Source], quotas: Sequence[int], names: Sequence[str], *, seed: int) -> None:
        self._datasets = list(datasets)
        self._names = list(names)
        self._quotas = list(quotas)
        self.seed = seed
        self.document_mask = datasets[0].document_mask
        self.seq_len = datasets[0].seq_len
        self.tokenizer = datasets[0].tokenizer
        self.streaming = any(dataset.streaming for dataset in datasets)
        self.splits = [split for dataset in datasets for split in dataset.splits]
        self._pattern = np.repeat(np.arange(len(datasets)), self._quotas)
        self._block: tuple[int, np.ndarray] = (-1, self._pattern)
        parts = [f"{dataset.fingerprint} x {quota}" for dataset, quota in zip(datasets, self._quotas, strict=True)]
        self.fingerprint = hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def sample(self, index: int) -> Sample:
        """Sample `index` of the mix."""
        source, position = self.locate(index)
        return self._datasets[source].sample(position)

    def locate(self, index: int) -> tuple[int, int]:
        """(number of the source, index in it) of sample `index`."""
        block, place = divmod(index, len(self._pattern))
        source = int(self._order(block)[place])
        return source, self._position(source, index)

    def held_out(self) -> list[HeldOut]:
        """The held-out windows of each source."""
        sources = zip(self._datasets, self._names, self._quotas, strict=True)
        return [
            HeldOut(name=name, share=quota / len(self._pattern), samples=dataset.eval_samples())
            for dataset, name, quota in sources
        ]

    def stream_positions(self) -> list[StreamPosition]:
        """Of each streamed source, in order."""
        return [position for dataset in self._datasets for position in dataset.stream_positions()]

    def skip_to(self, index: int, streams: Sequence[StreamPosition] = ()) -> str:
        """Bring every source to its position; says what that cost."""
        known = iter(streams)
        costs = [
            dataset.skip_to(self._position(source, index), list(itertools.islice(known, 1)))
            for source, dataset in enumerate(self._datasets)
            if dataset.streaming
        ]
        return "; ".join(costs) or f"data position: sample {index} (computed, no cost)"

    def largest_token(self) -> int:
        """Largest token id in any source."""
        return max(dataset.largest_token() for dataset in self._datasets)

    def epochs(self, samples: int) -> dict[str, float]:
        """How often that many training windows read the text of each source; one whose end is not known is left out."""
        read: dict[str, float] = {}
        for dataset, quota in zip(self._datasets, self._quotas, strict=True):
            for name, each in dataset.epochs(1).items():  # a source that is listed twice is read by both
                read[name] = read.get(name, 0.0) + samples * quota / len(self._pattern) * each
        return read

    def describe(self) -> str:
        """One line: share and description of each source."""
        total = len(self._pattern)
        return "mix of " + " | ".join(
            f"{quota / total:.4g} {dataset.describe()}"
            for dataset, quota in zip(self._datasets, self._quotas, strict=True)
        )

    def _position(self, source: int, index: int) -> int:
        """How many samples of a source come before sample `index` of the mix."""
        block, place = divmod(index, len(self._pattern))
        return block * self._quotas[source] + int(np.count_nonzero(self._order(block)[:place] == source))

    def _order(self, block: int) -> np.ndarray:
        if self._block[0] != block:
            self._block = (block, self._pattern[permutation(len(self._pattern), self.seed, block, MIX_ORDER)])
        return self._block[1]


def eval_shares(quotas: Sequence[int], wanted: int) -> list[int]:
    """Held-out windows of each source, of `wanted` in all: its share, and at least one."""
    return [max(1, wanted * quota // sum(quotas)) for quota in quotas]


def quotas(weights: Sequence[float]) -> list[int]:
    """Samples of each source in a block: the smallest with whole shares, else LARGEST_BLOCK by largest remainders.

    Args:
        weights: shares, relative to their sum.

    Raises:
        DataError: no weights, or one that gets no sample in the largest block.
    """
    if not weights:
        raise DataError(
            "data.mix: has no entries; needs at least one source. Add data.mix=[{kind: stdlib, weight: 1}]."
        )
    shares = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    for size in range(1, LARGEST_BLOCK + 1):
        exact = shares * size
        whole = np.rint(exact)
        # weights are typed with few digits; 1e-6 of a sample is noise
        if np.abs(exact - whole).max() < 1e-6 and whole.min() >= 1:
            return [int(count) for count in whole]
    exact = shares * LARGEST_BLOCK
    counts = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(counts - exact, kind="stable")
    counts[by_remainder[: LARGEST_BLOCK - int(counts.sum())]] += 1
    if counts.min() < 1:
        smallest = int(np.argmin(shares))
        raise DataError(
            f"data.mix: entry {smallest} has {shares[smallest]:.2g} of the weight; needs at least 1/{LARGEST_BLOCK}. "
            "Raise its weight."
        )
    return [int(count) for count in counts]
