"""Held-out split: by content, never on both sides, never empty where something is to be held out."""

from __future__ import annotations

import numpy as np

from fp8train.data.split import Split, content_hash, fixed_threshold, splits, sufficient_threshold
from tests.data.corpora import make_corpus, make_documents


def test_share_of_held_out_documents_is_the_fraction() -> None:
    hashes = np.asarray([content_hash(document) for document in make_documents(10_000)], dtype=np.uint64)
    share = Split(fixed_threshold(0.05)).outside(hashes).mean()
    assert abs(share - 0.05) < 0.0109  # five standard deviations: 5 * sqrt(0.05 * 0.95 / 10,000)


def test_content_hash_is_pinned() -> None:
    """A change would move documents of existing shards and runs across the split."""
    assert content_hash(b"fp8train") == int.from_bytes(bytes.fromhex("606c7e5218450cfb"), "little")


def test_small_corpus_holds_out_whole_documents_up_to_the_need() -> None:
    corpus = make_corpus(make_documents(4))
    threshold = sufficient_threshold(corpus.hashes, corpus.lengths, 1e-9, seq_len=0)
    assert np.count_nonzero(Split(threshold).outside(corpus.hashes)) == 1
    threshold = sufficient_threshold(corpus.hashes, corpus.lengths, 1e-9, seq_len=int(corpus.lengths.max()))
    assert np.count_nonzero(Split(threshold).outside(corpus.hashes)) >= 2


def test_large_corpus_keeps_the_fixed_threshold() -> None:
    corpus = make_corpus(make_documents(2000))
    assert sufficient_threshold(corpus.hashes, corpus.lengths, 0.1, seq_len=99) == fixed_threshold(0.1)


def test_fraction_zero_holds_nothing_out() -> None:
    corpus = make_corpus(make_documents(3))
    assert sufficient_threshold(corpus.hashes, corpus.lengths, 0.0, seq_len=99) == 0


def test_small_source_raises_the_threshold_of_no_other() -> None:
    own = make_documents(4, seed=2)
    corpora = [make_corpus(documents) for documents in (make_documents(2000, seed=1) + own[:2], own)]
    large, small = corpora[0].hashes[:2000], corpora[1].hashes
    fixed = fixed_threshold(0.05)
    known = [(corpus.hashes, corpus.lengths) for corpus in corpora]
    one, two, stream = splits([*known, None], 0.05, seq_len=corpora[1].tokens)  # all of the small source
    assert one.threshold == stream.threshold == fixed and two.threshold == int(np.sort(small)[-1]) + 1
    assert two.outside(small).all()
    assert one.outside(small).all() and stream.outside(small).all(), "wherever else it may be"
    assert np.count_nonzero(one.outside(large)) == np.count_nonzero(large < np.uint64(fixed))
    alone = splits(known[:1], 0.05, seq_len=8)[0]
    assert str(alone) == f"threshold {fixed}" != str(one) != str(Split(fixed, small[:1]))


def test_document_is_held_out_by_its_hash() -> None:
    documents = make_documents(50)
    split = Split(fixed_threshold(0.3), np.sort(np.array([content_hash(documents[0])], dtype=np.uint64)))
    hashes = np.array([content_hash(document) for document in documents], dtype=np.uint64)
    assert [split.holds_out(document) for document in documents] == split.outside(hashes).tolist()
    assert split.holds_out(documents[0])
