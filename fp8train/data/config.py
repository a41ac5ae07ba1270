"""Configuration of training data: where the text comes from, how it becomes tokens, what is held out."""

from __future__ import annotations

import os.path
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from fp8train.errors import DataError

KINDS = ("stdlib", "text", "jsonl", "tokens", "hf", "mix")
READ_BY = {  # key of a source -> kinds that read it
    "path": ("text", "jsonl", "tokens", "hf"),
    "text_key": ("jsonl", "hf"),
    "document_bytes": ("text",),
    "verify": ("tokens",),
    **dict.fromkeys(("hf_name", "hf_subset", "hf_split", "hf_revision", "hf_streaming", "hf_shuffle_buffer"), ("hf",)),
}
MASKED_TARGET = -100  # of a token that the loss leaves out


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One source of documents; an entry of data.mix, or the whole of it.

    kind: stdlib | text | jsonl | tokens | hf (and mix, for the whole).
    path: file, glob (`**` goes into folders) or list of them; for kind=tokens a folder of shards.
    weight: share of the samples in a mix, relative to the other weights.
    text_key: key of the text in a JSON line or in a row of a Hugging Face dataset.
    document_bytes: size at which text files are cut (at line ends); null keeps them whole, unless they are few.
    verify: read the whole of every token shard and compare checksums; off compares sizes and the first and last block.
    hf_name: dataset on the hub, or reader of local files: json, parquet, csv, text, arrow; null goes by the file name.
    hf_subset: configuration of a Hugging Face dataset.
    hf_split: split to read, such as train or train[:1%].
    hf_revision: commit or tag of a hub dataset.
    hf_streaming: read as a stream, never stored whole.
    hf_shuffle_buffer: rows in the shuffle buffer of a stream; 0 keeps the order of the dataset.
    """

    kind: str = "stdlib"
    path: Any = None
    weight: float = 1.0
    text_key: str = "text"
    document_bytes: int | None = None
    verify: bool = False
    hf_name: str | None = None
    hf_subset: str | None = None
    hf_split: str = "train"
    hf_revision: str | None = None
    hf_streaming: bool = False
    hf_shuffle_buffer: int = 10_000

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DataError(f"data.kind: is {self.kind!r}; needs one of {', '.join(KINDS)}. Correct the name.")
        if self.path is not None and not isinstance(self.path, str):
            entries = list(self.path) if isinstance(self.path, (list, tuple)) else [self.path]
            if not entries or not all(isinstance(entry, str) for entry in entries):
                raise DataError(f"data.path: is {self.path!r}; needs a path or a list of paths. Quote the names.")
            self.path = entries
        if not 0 < self.weight < float("inf"):
            raise DataError(
                f"data.weight: is {self.weight}; needs a finite number above 0. Delete the entry to leave it out."
            )
        if self.document_bytes is not None and self.document_bytes < 1:
            raise DataError(
                f"data.document_bytes: is {self.document_bytes}; needs at least 1. Use null for whole files."
            )
        if self.hf_shuffle_buffer < 0:
            raise DataError(
                f"data.hf_shuffle_buffer: is {self.hf_shuffle_buffer}; needs 0 or more. Use 0 for no shuffling."
            )

    def check_read(self, typed: Collection[str] | None = None) -> None:
        """Refuse keys that are given and that a source of this kind does not read.

        Args:
            typed: those to look at; None: all. What a stored run has is no longer anybody's to change.
        """
        for key, kinds in READ_BY.items():
            given = getattr(self, key) != SourceConfig.__dataclass_fields__[key].default
            if given and self.kind not in kinds and (typed is None or key in typed):
                raise DataError(
                    f"data.{key}: is {getattr(self, key)} but data.kind is {self.kind}, which does not read it; needs "
                    f"kind {' or '.join(kinds)}. Add data={'KIND' if kinds[1:] else kinds[0]}, or leave data.{key} out."
                )

    @property
    def paths(self) -> list[str]:
        """data.path as a list, ~ as the home folder; empty when there is none."""
        entries = [self.path] if isinstance(self.path, str) else self.path or []
        return [os.path.expanduser(entry) for entry in entries]

    @property
    def streamed(self) -> bool:
        """Whether its documents come as a stream, whose end is not known."""
        return self.kind == "hf" and self.hf_streaming


@dataclass(kw_only=True, slots=True)
class DataConfig(SourceConfig):
    """Training data: a source (or a mix of several), its tokenizer and what is held out.

    tokenizer: bytes, a tokenizer.json, or a Hugging Face tokenizer folder; auto is that of the token shards, else
        that of model.init_from, else bytes.
    separator: special token that ends every document; null finds the tokenizer's own end-of-text token.
    holdout_fraction: share of the documents, by hash of their text, that is never trained on.
    eval_windows: number of fixed held-out windows that evaluation reads.
    document_mask: attention and targets stop at document boundaries.
    mix: entries of kind=mix, each a source with a weight.
    """

    tokenizer: str = "auto"
    separator: str | None = None
    holdout_fraction: float = 0.05
    eval_windows: int = 64
    document_mask: bool = False
    mix: list[SourceConfig] = field(default_factory=list)

    @property
    def sources(self) -> list[SourceConfig]:
        """The entries of a mix; of every other kind the one source that this is."""
        return list(self.mix) if self.kind == "mix" else [self]

    def __post_init__(self) -> None:
        SourceConfig.__post_init__(self)
        if not 0 <= self.holdout_fraction < 1:
            raise DataError(
                f"data.holdout_fraction: is {self.holdout_fraction}; needs 0 <= fraction < 1. Use 0 to hold nothing "
                "out."
            )
        if self.eval_windows < 1:
            raise DataError(
                f"data.eval_windows: is {self.eval_windows}; needs at least 1. Set data.holdout_fraction=0 for no "
                "evaluation."
            )
        if self.mix and self.kind != "mix":
            raise DataError(
                f"data.mix: has {len(self.mix)} entries but data.kind is {self.kind}; needs kind mix. Use data=mix."
            )
        if any(entry.kind == "mix" for entry in self.mix):
            raise DataError("data.mix: an entry has kind mix; needs plain sources. List its entries in the one mix.")
