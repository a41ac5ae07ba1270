"""Small files and tokenizers for the data tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A text file of 20,000 bytes in lines, all different."""
    file = tmp_path / "text.txt"
    file.write_text("".join(f"line {n:05d} of the text\n" for n in range(800)))
    return file


@pytest.fixture(scope="session")
def bpe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer.json of a byte-level BPE with 300 ids and <|endoftext|>; the file asks for truncation."""
    return _train(tmp_path_factory.mktemp("bpe") / "tokenizer.json", _byte_level)


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer.json in the style of Llama 2: spaces as U+2581, one before the text, bytes for unknown characters."""
    return _train(tmp_path_factory.mktemp("spm") / "tokenizer.json", _byte_fallback)


def _train(file: Path, build: Callable[[list[str]], object]) -> Path:
    build([f"def function_{n}(x): return x * {n}  # a line of text" for n in range(50)]).save(str(file))  # type: ignore[attr-defined]
    return file


def _byte_level(lines: list[str]) -> object:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.enable_truncation(4)
    return tokenizer


def _byte_fallback(lines: list[str]) -> object:
    tokenizers = pytest.importorskip("tokenizers")
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    model = tokenizers.models.BPE(
        vocab={piece: n for n, piece in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer
