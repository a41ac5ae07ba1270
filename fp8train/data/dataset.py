"""A dataset gives window `index` for any index from 0 up: for stored sources, a pure function of (seed, index)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypedDict

import numpy as np

from fp8train.data.corpus import Corpus
from fp8train.data.packing import PackedDocuments, Sample, permutation
from fp8train.data.split import Split
from fp8train.data.tokenizers import Tokenizer
from fp8train.errors import DataError

DOCUMENT_ORDER = 1  # what a permutation is for; part of its key
WINDOW_ORDER = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """The held-out windows of one source. name: short, one of its kind. share: of the samples of the dataset."""

    name: str
    share: float
    samples: list[Sample]


class StreamPosition(TypedDict):
    """How far a stream has been read: what reaches its window `sample` without tokenising those before.

    documents: read until then, held out or not. tokens: of the last of them, those at its end that come next.
    """

    sample: int
    documents: int
    tokens: int


class Dataset(Protocol):
    """What training and evaluation ask of data.

    streaming: samples must be asked for in increasing order; going back restarts the stream.
    document_mask: attention and targets stop at document boundaries.
    fingerprint: hash over corpus, tokenizer, split and seq_len (not the seed).
    splits: what is held out of each source.
    """

    seq_len: int
    seed: int
    tokenizer: Tokenizer
    streaming: bool
    document_mask: bool
    fingerprint: str
    splits: list[Split]

    def sample(self, index: int) -> Sample: ...

    def held_out(self) -> list[HeldOut]: ...

    def skip_to(self, index: int, streams: Sequence[StreamPosition] = ()) -> str: ...

    def stream_positions(self) -> list[StreamPosition]: ...

    def describe(self) -> str: ...

    def largest_token(self) -> int: ...

    def epochs(self, samples: int) -> dict[str, float]: ...


class PackedDataset:
    """Windows of a stored corpus; every epoch shuffles the documents and then the windows.

    Args:
        corpus: tokenised documents.
        seq_len: T; a sample has T + 1 tokens.
        seed: of the order; the split does not depend on it.
        split: which documents are held out.
        eval_windows: what eval_samples() gives at most.
        document_mask: see Dataset.

    Raises:
        DataError: less than one window to train on, or to hold out when some is to be held out.
    """

    streaming = False

    def __init__(
        self,
        corpus: Corpus,
        *,
        seq_len: int,
        seed: int,
        split: Split,
        eval_windows: int,
        document_mask: bool,
    ) -> None:
        self.corpus = corpus
        self.seq_len = seq_len
        self.seed = seed
        self.tokenizer = corpus.tokenizer
        self.document_mask = document_mask
        self._eval_windows = eval_windows
        self.splits = [split]
        outside = split.outside(corpus.hashes)
        self._train = np.flatnonzero(~outside)
        chosen = np.flatnonzero(outside)
        self._eval = PackedDocuments(corpus, chosen[np.argsort(corpus.hashes[chosen], kind="stable")])
        self._train_tokens = int(corpus.lengths[self._train].sum())
        self.samples_per_epoch = max(0, (self._train_tokens - 1) // seq_len)
        self._check_size()
        self._plans: dict[int, tuple[PackedDocuments, np.ndarray]] = {}
        key = f"{corpus.fingerprint()} {split} seq_len {seq_len}"
        self.fingerprint = hashlib.sha256(key.encode()).hexdigest()

    def sample(self, index: int) -> Sample:
        """Training window `index`; index // samples_per_epoch is its epoch."""
        epoch, place = divmod(index, self.samples_per_epoch)
        stream, windows = self._plan(epoch)
        return stream.read(int(windows[place]) * self.seq_len, self.seq_len + 1)

    def eval_samples(self) -> list[Sample]:
        """At most eval_windows windows of the held-out documents, evenly spread; the same for any seed.

        Raises:
            DataError: nothing is held out.
        """
        count = self._eval.windows(self.seq_len)
        if count == 0:
            raise DataError(
                f"data.holdout_fraction: nothing of {self.corpus.name} is held out; evaluation needs some. Set it "
                "above 0."
            )
        wanted = min(self._eval_windows, count)
        return [self._eval.read(i * count // wanted * self.seq_len, self.seq_len + 1) for i in range(wanted)]

    def held_out(self) -> list[HeldOut]:
        """eval_samples(), as the one source that there is."""
        return [HeldOut(name=self.corpus.name, share=1.0, samples=self.eval_samples())]

    def stream_positions(self) -> list[StreamPosition]:
        """Of no stream."""
        return []

    def skip_to(self, index: int, streams: Sequence[StreamPosition] = ()) -> str:
        """Nothing to skip: the position is computed."""
        return f"data position: sample {index} (computed, no cost)"

    def largest_token(self) -> int:
        """Largest token id in the corpus."""
        return self.corpus.largest_token()

    def epochs(self, samples: int) -> dict[str, float]:
        """How often that many training windows read the text of each source; one whose end is not known is left out."""
        return {self.corpus.name: samples / self.samples_per_epoch}

    def describe(self) -> str:
        """One line: documents, tokens, windows, split."""
        documents = len(self.corpus.lengths)
        held, windows = documents - len(self._train), self._eval.windows(self.seq_len)
        share = self._eval.tokens / max(self.corpus.tokens, 1)
        read = f"evaluation reads {min(self._eval_windows, windows):,} of {windows:,} windows"
        return (
            f"{self.corpus.name}: {documents:,} documents, {self.corpus.tokens:,} tokens ({self.tokenizer.name}); "
            f"{self.samples_per_epoch:,} training windows of {self.seq_len} per epoch; "
            f"held out: {held:,} documents, {self._eval.tokens:,} tokens ({share:.1%}); "
            f"{read if windows else 'no evaluation'}"
        )

    def _plan(self, epoch: int) -> tuple[PackedDocuments, np.ndarray]:
        if epoch not in self._plans:
            while len(self._plans) > 1:  # a batch may span two epochs
                del self._plans[min(self._plans)]
            order = self._train[permutation(len(self._train), self.seed, epoch, DOCUMENT_ORDER)]
            windows = permutation(self.samples_per_epoch, self.seed, epoch, WINDOW_ORDER)
            self._plans[epoch] = (PackedDocuments(self.corpus, order), windows)
        return self._plans[epoch]

    def _check_size(self) -> None:
        window = self.seq_len + 1
        holdout = self.splits[0].threshold > 0
        if self.samples_per_epoch >= 1 and (not holdout or self._eval.windows(self.seq_len) >= 1):
            return
        distinct = len(np.unique(self.corpus.hashes))
        parts = "one window to train on and one, of other documents, to hold out" if holdout else "one window"
        remedy = " or set data.holdout_fraction=0" if holdout else ""
        raise DataError(
            f"data: {self.corpus.name} got {self.corpus.tokens} tokens in {len(self.corpus.lengths)} documents, "
            f"{distinct} of them distinct; needs at least {window * (1 + holdout)}: {parts} "
            f"(seq_len {self.seq_len} + 1 tokens each). Give more text, lower seq_len{remedy}."
        )


def check_vocabulary(dataset: Dataset, vocab_size: int, init_from: str | None = None) -> None:
    """Refuse data with token ids that the model has no embedding for.

    Args:
        vocab_size: rows of the embedding.
        init_from: Hugging Face folder that they come from.

    Raises:
        DataError: the tokenizer, or a stored token, goes beyond vocab_size.
    """
    largest = -1 if dataset.streaming else dataset.largest_token()
    wanted = max(dataset.tokenizer.vocab_size, largest + 1)
    remedy = f"Set model.vocab_size={wanted} or take another tokenizer."
    if init_from is not None:
        remedy = f"Take its tokenizer, or give it rows: resize_token_embeddings({wanted}) of transformers, and save it."
    if largest >= vocab_size:
        raise DataError(
            f"data: token id {largest} is beyond the vocabulary of the model ({vocab_size}); needs ids below it. "
            f"{remedy}"
        )
    if dataset.tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"data.tokenizer: {dataset.tokenizer.name} has {dataset.tokenizer.vocab_size} ids; the model has "
            f"{vocab_size}. {remedy}"
        )
