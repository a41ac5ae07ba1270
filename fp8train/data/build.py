"""From a DataConfig to a dataset: sources are read, tokenised, split and, for kind mix, put together."""

from __future__ import annotations

import functools
import glob
import hashlib
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from fp8train.data import huggingface
from fp8train.data.config import DataConfig, SourceConfig
from fp8train.data.corpus import Corpus, build_corpus
from fp8train.data.dataset import Dataset, PackedDataset
from fp8train.data.mix import MixedDataset, Source, eval_shares, quotas
from fp8train.data.model_tokenizer import covers
from fp8train.data.shards import open_shards, shard_tokenizer
from fp8train.data.sources import plan_pieces, read_piece, source_files
from fp8train.data.split import splits
from fp8train.data.stream import StreamedDataset
from fp8train.data.tokenizers import FileTokenizer, Tokenizer, build_tokenizer
from fp8train.errors import DataError

PIECE_BYTES = 1 << 26


def build_dataset(config: DataConfig, seq_len: int, seed: int) -> Dataset:
    """Read what the configuration names.

    Args:
        seq_len: T, tokens of a window.
        seed: of the order of documents and windows; the split does not depend on it.

    Returns:
        Dataset: `sample(index)` is a pure function of (seed, index); see fp8train/data/dataset.py.

    Raises:
        DataError: a path, file, line, tokenizer or size that cannot be used; the message names it.
    """
    if seq_len < 1:
        raise DataError(f"seq_len: is {seq_len}; needs at least 1.")
    entries = config.sources
    block = quotas([entry.weight for entry in entries])
    windows = eval_shares(block, config.eval_windows)
    tokenizer = configured_tokenizer(config)
    texts = [file for entry in entries if entry.kind == "text" for file in source_files(entry)]
    corpora = [None if entry.streamed else read_corpus(entry, tokenizer, texts) for entry in entries]
    known = [None if corpus is None else (corpus.hashes, corpus.lengths) for corpus in corpora]
    parts = splits(known, config.holdout_fraction, seq_len)
    datasets: list[Source] = []
    for number, (entry, corpus, split, share) in enumerate(zip(entries, corpora, parts, windows, strict=True)):
        options: dict[str, Any] = {
            "seq_len": seq_len,
            "seed": seed + (number << 32),
            "split": split,
            "eval_windows": share,
            "document_mask": config.document_mask,
        }
        datasets.append(_stream(entry, tokenizer, options) if corpus is None else PackedDataset(corpus, **options))
    if config.kind != "mix":
        return datasets[0]
    return MixedDataset(datasets, block, source_names(entries), seed=seed)


def source_names(entries: Sequence[SourceConfig]) -> list[str]:
    """A short name for each source of a mix: what its path ends with, else its dataset or kind; the whole path, or a
    number, where two would be called the same.
    """
    whole = [", ".join(entry.paths) or entry.hf_name or entry.kind for entry in entries]
    short = [name if ", " in name else PurePath(name).name for name in whole]
    names = [name if short.count(name) == 1 else long for name, long in zip(short, whole, strict=True)]
    return [f"{name} {names[: i + 1].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def read_corpus(source: SourceConfig, tokenizer: Tokenizer, texts: Sequence[Path]) -> Corpus:
    """Tokenise a stored source into memory, or map its shards.

    Args:
        texts: as plan_pieces takes them.

    Raises:
        DataError: nothing in it but empty documents, or as build_dataset.
    """
    if source.kind == "tokens":
        return open_shards(shard_folders(source), tokenizer, verify=source.verify)
    name = source.kind if source.kind == "stdlib" else f"{source.kind} {huggingface.name_of(source)}"
    pieces = plan_pieces(source, PIECE_BYTES, texts)
    corpus = build_corpus((document for piece in pieces for document in read_piece(source, piece)), tokenizer, name)
    if len(corpus.lengths) == 0:
        raise DataError(f"data: {name} got 0 tokens, its documents are all empty; needs text. Give other files.")
    return corpus


def shard_folders(source: SourceConfig) -> list[Path]:
    """Folders of a tokens source, sorted."""
    if not source.paths:
        raise DataError(
            "data.path: is not given; data=tokens needs a folder that `fp8train prepare` wrote. Add data.path=DIR."
        )
    folders: dict[Path, Path] = {}  # what it leads to -> the first path to it
    for entry in source.paths:
        path = Path(entry)
        matches = (
            [Path(match) for match in glob.glob(str(path))] if glob.has_magic(entry) and not path.exists() else [path]
        )
        if not matches:
            raise DataError(
                f"data.path: {entry} matches no folder; needs one that `fp8train prepare` wrote. Correct the path."
            )
        for match in sorted(matches):
            folders.setdefault(match.resolve(), match)
    return sorted(folders.values())


def configured_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer that a configuration asks for; under auto that of its token shards, which carry their own.

    Raises:
        DataError: it cannot be read.
    """
    if config.tokenizer == "auto":
        for entry in config.sources:
            if entry.kind == "tokens":
                return shard_tokenizer(shard_folders(entry)[0])
    return build_tokenizer(config.tokenizer, config.separator)


def training_tokenizer(config: DataConfig, named: str | None, vocab_size: int) -> Tokenizer:
    """The tokenizer that a model was trained in, or one in its place that has the same ids.

    Args:
        config: of the training.
        named: as build_tokenizer takes it; None: that of the training. What ends a document is that of the training.
        vocab_size: of the model.

    Raises:
        DataError: it is not there, is another, or has more ids than the model.
    """
    trained: Tokenizer | None
    if named is None:
        chosen = trained = configured_tokenizer(config)
    else:
        trained = _still_there(config)
        separator = trained.separator_token if isinstance(trained, FileTokenizer) else config.separator
        chosen = build_tokenizer(named, None if named in ("bytes", "auto") else separator)
    if chosen.vocab_size > vocab_size:
        raise DataError(
            f"tokenizer: {chosen.name} has {chosen.vocab_size} ids, the model {vocab_size}; needs the tokenizer of the "
            f"training. {'Give that as tokenizer=PATH' if named is None else 'Leave `tokenizer` out'}."
        )
    if trained is not None and not covers(chosen, trained):
        replaced = "" if trained.path is None else f" If {trained.path} is another by now, move it away."
        raise DataError(
            f"tokenizer: {chosen.name} ({chosen.vocab_size} ids) has other ids than {trained.name} "
            f"({trained.vocab_size}), in which the model was trained; needs that one. Leave `tokenizer` out.{replaced}"
        )
    return chosen


def _still_there(config: DataConfig) -> Tokenizer | None:
    try:
        return configured_tokenizer(config)
    except (DataError, OSError):  # gone, or of a user who lets no other in
        return None


def _stream(source: SourceConfig, tokenizer: Tokenizer, options: dict[str, Any]) -> StreamedDataset:
    return StreamedDataset(
        functools.partial(huggingface.stream, source, huggingface.load(source)),
        name=huggingface.name_of(source),
        identity=hashlib.sha256(huggingface.identity(source).encode()).hexdigest(),
        former=hashlib.sha256(huggingface.identity(source, by_path=True).encode()).hexdigest(),
        tokenizer=tokenizer,
        **options,
    )
