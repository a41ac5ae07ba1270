"""Held-out split by the content of a document: equal texts land on one side, in every source, for every seed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

HASH_RANGE = 1 << 64


def content_hash(document: bytes) -> int:
    """64-bit hash of a document's UTF-8 text."""
    return int.from_bytes(hashlib.blake2b(document, digest_size=8).digest(), "little")


def fixed_threshold(fraction: float) -> int:
    """Documents with a hash below this are held out."""
    return min(HASH_RANGE - 1, int(fraction * HASH_RANGE))


@dataclass(frozen=True, eq=False, slots=True)
class Split:
    """Which documents are held out.

    threshold: those with a hash below.
    also: [N] uint64, sorted: hashes of others, which another source of a mix holds out.
    """

    threshold: int
    also: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.uint64))

    def outside(self, hashes: np.ndarray) -> np.ndarray:
        """[D] bool: which of the documents with these hashes are held out."""
        below = hashes < np.uint64(self.threshold)
        if not len(self.also):
            return below
        places = np.minimum(np.searchsorted(self.also, hashes), len(self.also) - 1)
        return below | (self.also[places] == hashes)

    def holds_out(self, document: bytes) -> bool:
        """Whether a document is held out."""
        return bool(self.outside(np.array([content_hash(document)], dtype=np.uint64))[0])

    def __str__(self) -> str:
        others = hashlib.sha256(self.also.astype("<u8").tobytes()).hexdigest() if len(self.also) else ""
        return f"threshold {self.threshold}" + (f" and {others}" if others else "")


def splits(sources: Sequence[tuple[np.ndarray, np.ndarray] | None], fraction: float, seq_len: int) -> list[Split]:
    """The split of each source: a small one's higher threshold is its own, a text that two share is on one side.

    Args:
        sources: hashes [D] uint64 and lengths [D] in tokens of each one's documents; None: not known in advance.
        fraction, seq_len: see sufficient_threshold.
    """
    fixed = fixed_threshold(fraction)
    thresholds = [fixed if known is None else sufficient_threshold(*known, fraction, seq_len) for known in sources]
    raised = [
        known[0][(known[0] >= np.uint64(fixed)) & (known[0] < np.uint64(threshold))]
        for known, threshold in zip(sources, thresholds, strict=True)
        if known is not None
    ]
    also = np.unique(np.concatenate([np.empty(0, dtype=np.uint64), *raised]))
    return [Split(threshold, also[also >= np.uint64(threshold)]) for threshold in thresholds]


def sufficient_threshold(hashes: np.ndarray, lengths: np.ndarray, fraction: float, seq_len: int) -> int:
    """The fixed threshold, raised where a small corpus would otherwise hold out fewer tokens than half the fraction or
    than a window.

    Args:
        hashes: [D] uint64.
        lengths: [D] tokens of each document.
        fraction: share of documents to hold out; 0 holds nothing out, however small the corpus.
        seq_len: T; a window has T + 1 tokens.
    """
    threshold = fixed_threshold(fraction)
    needed = max(seq_len + 1, int(int(lengths.sum()) * fraction / 2))
    if fraction == 0 or int(lengths[Split(threshold).outside(hashes)].sum()) >= needed:
        return threshold
    order = np.argsort(hashes, kind="stable")
    enough = int(np.searchsorted(np.cumsum(lengths[order]), needed))
    last = min(enough, len(order) - 1)
    return min(HASH_RANGE - 1, int(hashes[order[last]]) + 1)
