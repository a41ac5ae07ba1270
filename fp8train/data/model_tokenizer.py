"""Data for a model that starts from a Hugging Face folder: its ids must be those of the folder's tokenizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fp8train.data.config import DataConfig
from fp8train.data.tokenizers import FileTokenizer, Tokenizer, build_tokenizer
from fp8train.errors import DataError

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder holds a tokenizer, in one of the forms that build_tokenizer reads."""
    return any((Path(folder) / name).is_file() for name in FILES)


def covers(tokenizer: Tokenizer, other: Tokenizer) -> bool:
    """Whether every id of `other` means the same in `tokenizer`, which may have further ones."""
    if isinstance(tokenizer, FileTokenizer) and isinstance(other, FileTokenizer):
        return other.vocabulary().items() <= tokenizer.vocabulary().items()
    return tokenizer.hash == other.hash


def with_model_tokenizer(config: DataConfig, init_from: str | None) -> DataConfig:
    """The configuration with the folder's tokenizer, if it has one, in the place of `auto`; token shards carry their
    own.
    """
    if init_from is None or config.tokenizer != "auto" or _of_shards(config) or not has_tokenizer(init_from):
        return config
    return dataclasses.replace(config, tokenizer=init_from)


def check_model_tokenizer(tokenizer: Tokenizer, config: DataConfig, init_from: str | None) -> None:
    """Refuse ids that are not those of the folder's tokenizer, unless data.tokenizer asks for them.

    Args:
        tokenizer: of the data.
        config: which with_model_tokenizer gave.

    Raises:
        DataError: token shards are of another, or the folder has none.
    """
    if init_from is None or config.tokenizer != "auto":
        return
    if not has_tokenizer(init_from):
        if _of_shards(config):
            return
        raise DataError(
            f"data.tokenizer: model.init_from={init_from} holds no tokenizer ({', '.join(FILES)}); needs that of the "
            "model. Set data.tokenizer to its file, or to bytes for a model of bytes."
        )
    wanted = build_tokenizer(init_from)
    if not covers(tokenizer, wanted):
        raise DataError(
            f"data.path: its tokens are of the tokenizer {tokenizer.name} ({tokenizer.vocab_size} ids), the model "
            f"starts from {init_from}, whose ids mean something else ({wanted.vocab_size} ids); needs that one. "
            f"Prepare them with data.tokenizer={init_from}."
        )


def _of_shards(config: DataConfig) -> bool:
    return any(source.kind == "tokens" for source in config.sources)
