"""Held-out split by the content of a document: equal texts land on one side, in every source, for every seed."""

from __future__ import annotations

import hashlib

import numpy as np

HASH_RANGE = 1 << 64


def content_hash(document: bytes) -> int:
    """64-bit hash of a document's UTF-8 text."""
    return int.from_bytes(hashlib.blake2b(document, digest_size=8).digest(), "little")


def fixed_threshold(fraction: float) -> int:
    """Documents with a hash below this are held out."""
    return min(HASH_RANGE - 1, int(fraction * HASH_RANGE))


def held_out(hashes: np.ndarray, threshold: int) -> np.ndarray:
    """[D] bool: which documents are held out."""
    return hashes < np.uint64(threshold)


def sufficient_threshold(hashes: np.ndarray, lengths: np.ndarray, fraction: float, needed_tokens: int) -> int:
    """The fixed threshold, raised where a small corpus would otherwise hold out fewer than needed_tokens.

    Args:
        hashes: [D] uint64.
        lengths: [D] tokens of each document.
        fraction: share of documents to hold out; 0 holds nothing out, however small the corpus.
        needed_tokens: such as one evaluation window.
    """
    threshold = fixed_threshold(fraction)
    if fraction == 0 or int(lengths[held_out(hashes, threshold)].sum()) >= needed_tokens:
        return threshold
    order = np.argsort(hashes, kind="stable")
    enough = int(np.searchsorted(np.cumsum(lengths[order]), needed_tokens))
    last = min(enough, len(order) - 1)
    return min(HASH_RANGE - 1, int(hashes[order[last]]) + 1)
