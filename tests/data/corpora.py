"""Small corpora for the data tests."""

from __future__ import annotations

from fp8train.data.corpus import Corpus, build_corpus
from fp8train.data.tokenizers import ByteTokenizer

UNICODE_TEXT = "na\u00efve caf\u00e9 \u6f22\u5b57 \U0001f642 <|endoftext|> x\n"


def make_documents(count: int, seed: int = 0, shortest: int = 5, longest: int = 60) -> list[bytes]:
    """Distinct texts of different lengths; `seed` shifts them."""
    return [
        (f"document {seed}/{n} " + "abcdefghij" * 9)[: shortest + 12 + (n * 37) % (longest - shortest)].encode()
        for n in range(count)
    ]


def make_corpus(documents: list[bytes], name: str = "corpus") -> Corpus:
    """Documents as a byte corpus in memory."""
    return build_corpus(documents, ByteTokenizer(), name)
