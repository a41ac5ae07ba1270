"""Packing: documents one after the other in a seeded order, cut into windows of seq_len + 1 tokens.

Windows overlap by one token, so that every token but the first of a stream is a target exactly once an epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fp8train.data.corpus import Corpus
from fp8train.errors import DataError

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(kw_only=True, slots=True)
class Sample:
    """A window. tokens: [T+1] int64. document_ids: [T+1] int32, from 0; a separator is of the document it ends."""

    tokens: np.ndarray
    document_ids: np.ndarray


class PackedDocuments:
    """A stream of documents of a corpus in a given order.

    Args:
        corpus: the documents.
        order: [D'] int64, document numbers in the order of the stream.
    """

    def __init__(self, corpus: Corpus, order: np.ndarray) -> None:
        self._corpus = corpus
        self._order = order
        self._ends = np.cumsum(corpus.lengths[order])
        self.tokens = int(self._ends[-1]) if len(order) else 0

    def windows(self, seq_len: int) -> int:
        """Number of whole windows."""
        return max(0, (self.tokens - 1) // seq_len)

    def read(self, position: int, count: int) -> Sample:
        """Tokens position .. position + count - 1 of the stream.

        Raises:
            DataError: an id beyond those that the shards are said to hold: their file was damaged.
        """
        corpus, order, ends = self._corpus, self._order, self._ends
        tokens = np.empty(count, dtype=np.int64)
        document_ids = np.empty(count, dtype=np.int32)
        place = int(np.searchsorted(ends, position, side="right"))
        filled = number = 0
        while filled < count:
            document = order[place]
            left = int(ends[place]) - position - filled
            take = min(left, count - filled)
            stop = int(corpus.starts[document] + corpus.lengths[document]) - left + take
            tokens[filled : filled + take] = corpus.segments[corpus.segment[document]][stop - take : stop]
            document_ids[filled : filled + take] = number
            filled += take
            place += 1
            number += 1
        largest = int(tokens.max())
        if corpus.max_token_id is not None and largest > corpus.max_token_id:  # an embedding would not say where from
            raise DataError(
                f"data.path: {corpus.name} has the token id {largest}, index.json says at most {corpus.max_token_id} "
                "(damaged). Find the file with data.verify=true, delete it and index.json, and prepare again."
            )
        return Sample(tokens=tokens, document_ids=document_ids)


def permutation(count: int, *key: int) -> np.ndarray:
    """[count] int64: a pseudo-random permutation that depends on the key alone, whatever the version of numpy.

    Sorts the numbers by a hash of (key, number); equal hashes keep their order.
    """
    state = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):  # arithmetic is modulo 2^64
        for part in key:
            state = _mix(state + GOLDEN + np.uint64(part % (1 << 64)))
        hashes = _mix(state + GOLDEN * np.arange(1, count + 1, dtype=np.uint64))
    return np.argsort(hashes, kind="stable")


def _mix(z: np.ndarray) -> np.ndarray:
    """Finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
