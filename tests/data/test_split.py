"""Held-out split: by content, never on both sides, never empty where something is to be held out."""

from __future__ import annotations

import numpy as np

from fp8train.data.split import content_hash, fixed_threshold, held_out, sufficient_threshold
from tests.data.corpora import make_corpus, make_documents


def test_share_of_held_out_documents_is_the_fraction() -> None:
    hashes = np.asarray([content_hash(document) for document in make_documents(10_000)], dtype=np.uint64)
    share = held_out(hashes, fixed_threshold(0.05)).mean()
    assert abs(share - 0.05) < 0.0109  # five standard deviations: 5 * sqrt(0.05 * 0.95 / 10,000)


def test_content_hash_is_pinned() -> None:
    """A change would move documents of existing shards and runs across the split."""
    assert content_hash(b"fp8train") == int.from_bytes(bytes.fromhex("606c7e5218450cfb"), "little")


def test_small_corpus_holds_out_whole_documents_up_to_the_need() -> None:
    corpus = make_corpus(make_documents(4))
    threshold = sufficient_threshold(corpus.hashes, corpus.lengths, 1e-9, needed_tokens=1)
    assert np.count_nonzero(held_out(corpus.hashes, threshold)) == 1
    threshold = sufficient_threshold(corpus.hashes, corpus.lengths, 1e-9, needed_tokens=int(corpus.lengths.max()) + 1)
    assert np.count_nonzero(held_out(corpus.hashes, threshold)) >= 2


def test_large_corpus_keeps_the_fixed_threshold() -> None:
    corpus = make_corpus(make_documents(2000))
    assert sufficient_threshold(corpus.hashes, corpus.lengths, 0.1, needed_tokens=100) == fixed_threshold(0.1)


def test_fraction_zero_holds_nothing_out() -> None:
    corpus = make_corpus(make_documents(3))
    assert sufficient_threshold(corpus.hashes, corpus.lengths, 0.0, needed_tokens=100) == 0
