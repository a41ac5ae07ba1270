"""A streamed source: one seeded sequence of documents, packed as it comes; a position is reached by reading."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fp8train.data.corpus import encode
from fp8train.data.dataset import HeldOut, StreamPosition
from fp8train.data.packing import Sample
from fp8train.data.split import HASH_RANGE, Split
from fp8train.data.tokenizers import Tokenizer
from fp8train.errors import DataError

READ_AHEAD_BYTES = 1 << 16  # text for one call of the tokenizer: enough for its threads, little to wait for
START = StreamPosition(sample=0, documents=0, tokens=0)
OpenStream = Callable[[int | None, int], Iterator[bytes]]


class StreamedDataset:
    """Windows of a stream. Every rank reads all of it and keeps its own windows: one order for any number of ranks.

    Args:
        open_stream: (seed, epoch) -> documents; seed None asks for the unshuffled order.
        name: what the user called the source.
        identity: what the stream is made of (dataset, revision, split), for the fingerprint.
        former: as earlier versions had it.
        split: which documents are held out.
        eval_windows: what eval_samples() gives at most.
        document_mask: see Dataset.
    """

    streaming = True

    def __init__(
        self,
        open_stream: OpenStream,
        *,
        name: str,
        identity: str,
        former: str,
        tokenizer: Tokenizer,
        seq_len: int,
        seed: int,
        split: Split,
        eval_windows: int,
        document_mask: bool,
    ) -> None:
        self._open = open_stream
        self._name = name
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.seed = seed
        self.document_mask = document_mask
        self.splits = [split]
        self._eval_windows = eval_windows
        self._eval: list[Sample] | None = None
        rest = f"tokenizer {tokenizer.hash} {split} seq_len {seq_len}"
        self.fingerprint = hashlib.sha256(f"{identity} {rest}".encode()).hexdigest()
        self.former_fingerprints = [hashlib.sha256(f"{former} {rest}".encode()).hexdigest()]
        self._restart()

    def sample(self, index: int) -> Sample:
        """Window `index` of the stream; reads on to it, from the start if it lies behind."""
        if index < self._next:
            self._restart()
        while self._next < index:
            self._window()
        return self._window()

    def stream_positions(self) -> list[StreamPosition]:
        """How far this one has been read."""
        return [StreamPosition(sample=self._next, documents=self._documents, tokens=len(self._tokens))]

    def skip_to(self, index: int, streams: Sequence[StreamPosition] = ()) -> str:
        """Read on until window `index` is next; says what that cost.

        streams: a position, up to which documents are read and not tokenised.
        """
        started, before = time.perf_counter(), self._documents_read
        known = next((position for position in streams if position["sample"] <= index), START)
        if not known["sample"] <= self._next <= index:
            self._restart(known)
            before = 0
        first = self._next
        while self._next < index:
            self._window()
        return (
            f"data position: sample {index} of the stream {self._name}; skipping read "
            f"{self._documents_read - before:,} documents and tokenised "
            f"{(index - first) * self.seq_len:,} tokens in {time.perf_counter() - started:.1f} s"
        )

    def eval_samples(self) -> list[Sample]:
        """The first eval_windows windows of the held-out documents in the unshuffled order.

        Raises:
            DataError: the stream ends before there is one window.
        """
        if self._eval is None:
            self._eval = self._read_held_out(self._eval_windows)
        return self._eval

    def held_out(self) -> list[HeldOut]:
        """eval_samples(), as the one source that there is."""
        return [HeldOut(name=self._name, share=1.0, samples=self.eval_samples())]

    def largest_token(self) -> int:
        """Largest id that the tokenizer can give: the stream itself is not known in advance."""
        return self.tokenizer.vocab_size - 1

    def epochs(self, samples: int) -> dict[str, float]:
        """Of no source: where a stream ends is not known in advance."""
        return {}

    def describe(self) -> str:
        """One line: source, tokenizer, window, split."""
        share = self.splits[0].threshold / HASH_RANGE
        return f"{self._name}: stream ({self.tokenizer.name}), windows of {self.seq_len}; {share:.1%} held out"

    def _restart(self, position: StreamPosition = START) -> None:
        self._next, self._documents = position["sample"], 0
        self._documents_read = 0
        self._ahead: deque[int] = deque()
        self._encoded = encode(self._training_documents(position["documents"]), self.tokenizer, READ_AHEAD_BYTES)
        last = self._document() if position["documents"] else np.empty(0, dtype=np.int64)
        self._tokens = last[-position["tokens"] :]
        self._number = 0
        self._ids = np.zeros(len(self._tokens), dtype=np.int64)

    def _training_documents(self, first: int) -> Iterator[bytes]:
        """From the first-th that is read on, which is one of them; 0 is all."""
        for epoch in itertools.count():
            found = False
            for document in self._open(self.seed, epoch):
                self._documents_read += 1
                if self._documents_read < first or not self.splits[0].holds_out(document):
                    found = True
                    if self._documents_read >= first:
                        self._ahead.append(self._documents_read)
                        yield document
            if not found:
                raise DataError(
                    f"data: the stream {self._name} has no document to train on; needs some. Check split and key."
                )

    def _document(self) -> np.ndarray:
        """Tokens of the next training document, int64."""
        _, document = next(self._encoded)
        self._documents = self._ahead.popleft()
        return document.astype(np.int64)

    def _window(self) -> Sample:
        """The next window; its last token is the first of the one after it."""
        tokens, ids, missing = [self._tokens], [self._ids], self.seq_len + 1 - len(self._tokens)
        while missing > 0:
            tokens.append(self._document())
            self._number += 1
            ids.append(np.full(len(tokens[-1]), self._number, dtype=np.int64))
            missing -= len(tokens[-1])
        joined, numbers = (tokens[0], ids[0]) if len(tokens) == 1 else (np.concatenate(tokens), np.concatenate(ids))
        self._tokens, self._ids = joined[self.seq_len :], numbers[self.seq_len :]
        self._next += 1
        window = slice(0, self.seq_len + 1)
        return Sample(tokens=joined[window], document_ids=(numbers[window] - numbers[0]).astype(np.int32))

    def _read_held_out(self, wanted: int) -> list[Sample]:
        chosen = (document for document in self._open(None, 0) if self.splits[0].holds_out(document))
        tokens: list[np.ndarray] = []
        ids: list[np.ndarray] = []
        needed = wanted * self.seq_len + 1
        for number, (_, document) in enumerate(encode(chosen, self.tokenizer, READ_AHEAD_BYTES)):
            tokens.append(document.astype(np.int64))
            ids.append(np.full(len(document), number, dtype=np.int32))
            needed -= len(document)
            if needed <= 0:
                break
        got = sum(map(len, tokens))
        if got < self.seq_len + 1:
            raise DataError(
                f"data: the stream {self._name} holds out {got} tokens; evaluation needs at least {self.seq_len + 1}. "
                "Raise data.holdout_fraction or lower seq_len."
            )
        joined, numbers = np.concatenate(tokens), np.concatenate(ids)
        starts = range(0, min(wanted * self.seq_len, got - self.seq_len), self.seq_len)
        return [
            Sample(
                tokens=joined[start : start + self.seq_len + 1],
                document_ids=numbers[start : start + self.seq_len + 1] - numbers[start],
            )
            for start in starts
        ]
