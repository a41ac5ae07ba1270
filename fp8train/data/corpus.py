"""Tokenised documents: one array (or several memory-mapped) of token ids, each document ending in a separator."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from fp8train.data.split import content_hash
from fp8train.data.tokenizers import Tokenizer

BATCH_BYTES = 1 << 20


@dataclass(kw_only=True, slots=True)
class Corpus:
    """Documents by number: tokens are segments[segment[d]][starts[d] : starts[d] + lengths[d]], separator included.

    segments: token arrays, 1-D, uint16 or uint32, in memory or memory-mapped.
    segment: [D] int32. starts: [D] int64. lengths: [D] int64, at least 2. hashes: [D] uint64, of the text.
    name: what the user called the source. tokenizer: the tokenizer that made the ids.
    max_token_id: largest id; None until it is asked for.
    """

    segments: list[np.ndarray]
    segment: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    hashes: np.ndarray
    name: str
    tokenizer: Tokenizer
    max_token_id: int | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens, separators included."""
        return int(self.lengths.sum())

    def largest_token(self) -> int:
        """Largest token id (reads everything once unless the shards recorded it)."""
        if self.max_token_id is None:
            self.max_token_id = max((int(segment.max()) for segment in self.segments if len(segment)), default=0)
        return self.max_token_id

    def fingerprint(self) -> str:
        """Hash over the documents in order and the tokenizer."""
        digest = hashlib.sha256(self.tokenizer.hash.encode())
        digest.update(np.ascontiguousarray(self.hashes, dtype="<u8").tobytes())
        digest.update(np.ascontiguousarray(self.lengths, dtype="<i8").tobytes())
        return digest.hexdigest()


def token_dtype(vocab_size: int) -> np.dtype:
    """Smallest little-endian type that holds every id."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def encode(
    documents: Iterable[bytes], tokenizer: Tokenizer, batch_bytes: int = BATCH_BYTES
) -> Iterator[tuple[int, np.ndarray]]:
    """(content hash, ids with the separator at the end) of each document, in order.

    Args:
        batch_bytes: text for one call of the tokenizer, which may use several threads; 1 goes document by document.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    for batch in _batches(documents, batch_bytes):
        for document, ids in zip(batch, tokenizer.encode_documents(batch), strict=True):
            tokens = np.empty(len(ids) + 1, dtype=dtype)
            tokens[:-1] = ids
            tokens[-1] = tokenizer.separator
            yield content_hash(document), tokens


def build_corpus(documents: Iterable[bytes], tokenizer: Tokenizer, name: str) -> Corpus:
    """Tokenise documents into memory: 2 bytes a token (4 with more than 65,536 ids) and 28 a document."""
    content = bytearray()
    hashes, lengths = array("Q"), array("q")
    for digest, tokens in encode(documents, tokenizer):
        content += tokens.tobytes()
        hashes.append(digest)
        lengths.append(len(tokens))
    sizes = np.asarray(lengths, dtype=np.int64)
    return Corpus(
        segments=[np.frombuffer(content, dtype=token_dtype(tokenizer.vocab_size))],
        segment=np.zeros(len(sizes), dtype=np.int32),
        starts=np.cumsum(sizes) - sizes,
        lengths=sizes,
        hashes=np.asarray(hashes, dtype=np.uint64),
        name=name,
        tokenizer=tokenizer,
    )


def _batches(documents: Iterable[bytes], batch_bytes: int) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    filled = 0
    for document in documents:
        batch.append(document)
        filled += len(document)
        if filled >= batch_bytes:
            yield batch
            batch, filled = [], 0
    if batch:
        yield batch
