"""Small corpora for the data tests."""

from __future__ import annotations

from fp8train.data.corpus import Corpus, build_corpus
from fp8train.data.dataset import PackedDataset
from fp8train.data.split import Split, sufficient_threshold
from fp8train.data.tokenizers import ByteTokenizer

SEQ_LEN = 16  # of make_dataset


def make_documents(count: int, seed: int = 0, longest: int = 60) -> list[bytes]:
    """Distinct texts of different lengths; `seed` shifts them."""
    lengths = (17 + (n * 37) % (longest - 5) for n in range(count))
    return [(f"document {seed}/{n} " + "abcdefghij" * 9)[:length].encode() for n, length in enumerate(lengths)]


def make_corpus(documents: list[bytes]) -> Corpus:
    """Documents as a byte corpus in memory."""
    return build_corpus(documents, ByteTokenizer(), "corpus")


def make_dataset(
    documents: list[bytes], seed: int = 1, fraction: float = 0.2, eval_windows: int = 64, document_mask: bool = False
) -> PackedDataset:
    """Documents as a dataset of bytes, cut into windows of SEQ_LEN."""
    corpus = make_corpus(documents)
    split = Split(sufficient_threshold(corpus.hashes, corpus.lengths, fraction, SEQ_LEN))
    return PackedDataset(
        corpus, seq_len=SEQ_LEN, seed=seed, split=split, eval_windows=eval_windows, document_mask=document_mask
    )
