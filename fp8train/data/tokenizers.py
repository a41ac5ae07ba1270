"""Tokenizers: bytes (always there) and any Hugging Face tokenizer file. A separator token ends every document."""

from __future__ import annotations

import hashlib
import json
import os.path
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from fp8train.errors import DataError

END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[SEP]", "<|im_end|>")
COPIED_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
PROBE = "Hello, world!\n\tdef f(x):  return x ** 2  # \u00c4\u00df \u6f22\u5b57 \U0001f642 1234567890\n"


class Tokenizer(Protocol):
    """What the data pipeline asks of a tokenizer; ids are below vocab_size; no text yields `separator`."""

    name: str
    path: Path | None
    vocab_size: int
    separator: int
    hash: str
    bytes_exact: bool

    def encode(self, text: str) -> list[int]: ...

    def encode_prompt(self, text: str) -> list[int]: ...

    def encode_documents(self, documents: Sequence[bytes]) -> list[np.ndarray]: ...

    def decode(self, ids: ArrayLike) -> str: ...

    def bytes_of(self, ids: ArrayLike) -> int: ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, and 256 as the separator of documents."""

    name = "bytes"
    path: Path | None = None
    vocab_size = 257
    separator = 256
    hash = hashlib.sha256(b"fp8train bytes 257 separator 256").hexdigest()
    bytes_exact = True

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without separator."""
        return list(text.encode())

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text: it has no special tokens."""
        return self.encode(text)

    def encode_documents(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Ids of each document (UTF-8), without separators; uint8, a view."""
        return [np.frombuffer(document, dtype=np.uint8) for document in documents]

    def decode(self, ids: ArrayLike) -> str:
        """Text of ids; separators vanish, an incomplete character becomes U+FFFD."""
        values = np.asarray(ids)
        return values[(values >= 0) & (values < 256)].astype(np.uint8).tobytes().decode(errors="replace")

    def bytes_of(self, ids: ArrayLike) -> int:
        """Number of UTF-8 bytes that the ids stand for; separators and negative (masked) ids count zero."""
        values = np.asarray(ids)
        return int(np.count_nonzero((values >= 0) & (values < 256)))


class FileTokenizer:
    """A tokenizer.json, read by the `tokenizers` package; truncation and padding in the file are switched off.

    files: name and content of tokenizer.json and of the files beside it, for a copy that any reader understands.
    Special tokens written out in a document are encoded as ordinary text, so that no document can forge a separator
    that is one. bytes_exact: ids say how many bytes of text they stand for; no, where the tokenizer drops some.
    """

    def __init__(
        self, tokenizer: Any, *, name: str, path: Path | None, separator: int, files: dict[str, bytes]
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.name = name
        self.path = path
        self.separator = separator
        self.separator_token: str = tokenizer.id_to_token(separator)
        self.files = files
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1  # ids may have holes: the count of tokens is not enough
        self.hash = hashlib.sha256(files["tokenizer.json"] + b"\0separator %d" % separator).hexdigest()
        self._byte_lengths = _byte_lengths(json.loads(tokenizer.to_str()), vocab, self.vocab_size)
        self._byte_lengths[separator] = 0  # also one that is not marked as special: it is in no document
        # SentencePiece style files put a space before the first word of a text; it is in no document.
        self._space_before_text = int(self._byte_lengths[self._ids("a")].sum()) == 2
        probe_bytes = int(self._byte_lengths[self._ids(PROBE)].sum()) - self._space_before_text
        self.bytes_exact = probe_bytes == len(PROBE.encode())

    def vocabulary(self) -> dict[str, int]:
        """Token -> id, added tokens included."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without separator or any other special token."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text of the user's own, in which special tokens that are written out are themselves."""
        self._tokenizer.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self._tokenizer.encode_special_tokens = True

    def encode_documents(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Ids of each document (UTF-8), without separators; uint32."""
        texts = [document.decode() for document in documents]
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: ArrayLike) -> str:
        """Text of ids; special tokens vanish."""
        return self._tokenizer.decode([int(i) for i in np.asarray(ids).ravel() if i >= 0], skip_special_tokens=True)

    def bytes_of(self, ids: ArrayLike) -> int:
        """UTF-8 bytes of the text (as the tokenizer normalises it) that the ids stand for; masked ids count zero."""
        values = np.asarray(ids).ravel()
        total = int(self._byte_lengths[values[values >= 0]].sum())
        if self._space_before_text:
            starts = (values[:-1] == self.separator) & (values[1:] >= 0) & (values[1:] != self.separator)
            total -= int(np.count_nonzero(starts))
        return total

    def _ids(self, text: str) -> np.ndarray:
        return np.asarray(self.encode(text), dtype=np.int64)


def build_tokenizer(name: str, separator: str | None = None) -> Tokenizer:
    """The tokenizer called `name`.

    Args:
        name: "bytes" (also "auto"), path of a tokenizer.json, or a Hugging Face tokenizer folder.
        separator: special token that ends a document; None takes the file's end-of-text token.

    Raises:
        DataError: nothing there, unreadable, not a tokenizer, no end-of-text token, the package tokenizers is missing.
    """
    if name in ("bytes", "auto"):
        if separator is not None:
            raise DataError(
                f"data.separator: is {separator!r} but the tokenizer is bytes, whose separator is id 256. Delete it."
            )
        return ByteTokenizer()
    try:
        return _read_files(Path(os.path.expanduser(name)), name, separator)
    except OSError as error:
        raise DataError(
            f"data.tokenizer: {name} cannot be read ({error.strerror or error}); needs files that can. Correct the "
            "path, or who may read it."
        ) from error


def _read_files(path: Path, name: str, separator: str | None) -> FileTokenizer:
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.is_file():
        content = file.read_bytes()
        tokenizer = _read_tokenizer(content, file)
    elif path.is_dir():
        tokenizer = _convert_folder(path)
        content = tokenizer.to_str().encode()
    else:
        raise DataError(
            f"data.tokenizer: {name!r} is not there; needs bytes, a tokenizer.json or a tokenizer folder. Correct "
            "the path."
        )
    id_of_separator = _find_separator(tokenizer, file.parent, separator, name)
    files = {"tokenizer.json": content}
    if path.is_dir():
        files |= {beside: (path / beside).read_bytes() for beside in COPIED_BESIDE if (path / beside).is_file()}
    return FileTokenizer(tokenizer, name=name, path=path, separator=id_of_separator, files=files)


def _read_tokenizer(content: bytes, file: Path) -> Any:
    try:
        from tokenizers import Tokenizer as Reader
    except ImportError as error:
        raise DataError(
            f"data.tokenizer: {file} needs the package tokenizers, which is not installed. pip install 'fp8train[hf]'."
        ) from error
    try:
        return Reader.from_str(content.decode())
    except Exception as error:  # tokenizers raises plain Exception for a file that it cannot read
        raise DataError(
            f"data.tokenizer: {file} is not a tokenizer.json ({error}). Give the tokenizer's own file."
        ) from error


def _convert_folder(path: Path) -> Any:
    """A folder without tokenizer.json (a SentencePiece model, a vocab with merges), converted by transformers."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise DataError(
            f"data.tokenizer: {path} has no tokenizer.json; converting needs transformers. pip install 'fp8train[hf]'."
        ) from error
    try:
        return AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, use_fast=True, trust_remote_code=False
        ).backend_tokenizer
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"data.tokenizer: {path} holds no tokenizer that transformers can convert ({reason}). Add a tokenizer.json."
        ) from error


def _find_separator(tokenizer: Any, folder: Path, separator: str | None, name: str) -> int:
    """Id of the token that ends a document: the given one, that of tokenizer_config.json, or a usual name."""
    candidates = [separator] if separator is not None else [*_configured_end(folder), *END_TOKENS]
    for token in candidates:
        found = tokenizer.token_to_id(token)
        if found is not None:
            return found
    special = sorted(token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special)
    known = f"its special tokens: {', '.join(special[:8])}" if special else "it has no special tokens"
    wanted = f"no token {separator!r}" if separator is not None else "no end-of-text token"
    raise DataError(
        f"data.tokenizer: {name} has {wanted}; needs one to separate documents ({known}). Set data.separator=TOKEN."
    )


def _configured_end(folder: Path) -> list[str]:
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return []
    try:
        settings = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DataError(
            f"data.tokenizer: {file} cannot be read ({error}); needs a JSON object. Fetch the folder again."
        ) from error
    token = settings.get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    return [token] if isinstance(token, str) else []


def _byte_lengths(document: dict[str, Any], vocab: dict[str, int], size: int) -> np.ndarray:
    """[size] int32: UTF-8 bytes of each id's text, by the decoder that the tokenizer.json names."""
    decoders = _types_in(document.get("decoder"))
    byte_level = "ByteLevel" in decoders or ("ByteLevel" in _types_in(document.get("pre_tokenizer")) and not decoders)
    added = {token["id"]: token for token in document.get("added_tokens", [])}
    lengths = np.zeros(size, dtype=np.int32)
    for token, token_id in vocab.items():
        if token_id in added:
            lengths[token_id] = 0 if added[token_id]["special"] else len(token.encode())
        elif byte_level:
            lengths[token_id] = len(token)  # one printable character stands for one byte
        elif "ByteFallback" in decoders and BYTE_TOKEN.fullmatch(token):
            lengths[token_id] = 1
        else:
            lengths[token_id] = len(token.removeprefix("##").replace("\u2581", " ").encode())
    return lengths


def _types_in(node: Any) -> set[str]:
    """Every "type" in a part of a tokenizer.json."""
    if isinstance(node, dict):
        inner = set().union(*(_types_in(value) for value in node.values())) if node else set()
        return inner | ({node["type"]} if isinstance(node.get("type"), str) else set())
    return set().union(*(_types_in(value) for value in node)) if isinstance(node, list) and node else set()
