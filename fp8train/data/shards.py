"""Token shards: a folder of tokenised documents that training maps into memory. Written by `fp8train prepare`.

index.json        format, version, dtype, vocabulary, tokenizer hash, totals, list of shards; written last
shard_00000.bin   token ids, little-endian uint16 or uint32, each document ending in the separator
shard_00000.idx   D lengths (uint32, separator included), then D hashes of the documents' text (uint64), little-endian
shard_00000.json  tokens, documents, largest id, CRC-32 of the .idx and of every block of the .bin; written third
tokenizer/        copy of the tokenizer (none for bytes)
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fp8train.data.corpus import Corpus, token_dtype
from fp8train.data.tokenizers import FileTokenizer, Tokenizer, build_tokenizer
from fp8train.errors import DataError
from fp8train.whole_file import whole_file, write_whole

FORMAT = "fp8train-tokens"
VERSION = 1
BLOCK_BYTES = 1 << 24  # unit of the checksums


def write_shard(
    folder: Path, number: int, documents: Iterable[tuple[int, np.ndarray]], tokenizer: Tokenizer
) -> dict[str, Any]:
    """Write one shard; each file appears under its name only when it is whole and on disk, the .json last.

    Args:
        documents: (content hash, ids with separator) in order.

    Returns:
        dict: what the .json holds.
    """
    name = f"shard_{number:05d}"
    dtype = token_dtype(tokenizer.vocab_size)
    lengths: list[int] = []
    hashes: list[int] = []
    checksums: list[int] = []
    largest = 0
    waiting = bytearray()
    with whole_file(folder / f"{name}.bin") as file:
        for digest, tokens in documents:
            lengths.append(len(tokens))
            hashes.append(digest)
            largest = max(largest, int(tokens.max()))
            waiting += tokens.astype(dtype, copy=False).tobytes()
            while len(waiting) >= BLOCK_BYTES:
                checksums.append(zlib.crc32(waiting[:BLOCK_BYTES]))
                file.write(waiting[:BLOCK_BYTES])
                del waiting[:BLOCK_BYTES]
        if waiting:
            checksums.append(zlib.crc32(waiting))
            file.write(waiting)
    index = np.asarray(lengths, dtype="<u4").tobytes() + np.asarray(hashes, dtype="<u8").tobytes()
    write_whole(folder / f"{name}.idx", index)
    meta = {
        "name": name,
        "tokens": sum(lengths),
        "documents": len(lengths),
        "max_token_id": largest,
        "idx_crc32": zlib.crc32(index),
        "bin_crc32": checksums,
    }
    write_whole(folder / f"{name}.json", json.dumps(meta))
    return meta


def finished_shard(folder: Path, number: int, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """What the .json of a shard holds, if the shard is complete; None if it is to be written (again)."""
    file = folder / f"shard_{number:05d}.json"
    if not file.is_file():
        return None
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
        sizes = (meta["tokens"] * token_dtype(tokenizer.vocab_size).itemsize, meta["documents"] * 12)
    except (ValueError, TypeError, KeyError):  # cut off or damaged
        return None
    files = (file.with_suffix(".bin"), file.with_suffix(".idx"))
    whole = all(part.is_file() and part.stat().st_size == size for part, size in zip(files, sizes, strict=True))
    return meta if whole else None


def write_index(folder: Path, shards: list[dict[str, Any]], tokenizer: Tokenizer) -> dict[str, Any]:
    """Write the tokenizer's copy and then index.json, which makes the folder complete."""
    from_file = tokenizer if isinstance(tokenizer, FileTokenizer) else None
    index = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "vocab_size": tokenizer.vocab_size,
        "separator": tokenizer.separator,
        "separator_token": from_file.separator_token if from_file else None,
        "tokenizer": "tokenizer" if from_file else "bytes",
        "tokenizer_hash": tokenizer.hash,
        "block_bytes": BLOCK_BYTES,
        "tokens": sum(shard["tokens"] for shard in shards),
        "documents": sum(shard["documents"] for shard in shards),
        "max_token_id": max((shard["max_token_id"] for shard in shards), default=0),
        "shards": shards,
    }
    if from_file is not None:
        (folder / "tokenizer").mkdir(exist_ok=True)
        for name, content in from_file.files.items():
            write_whole(folder / "tokenizer" / name, content)
    write_whole(folder / "index.json", json.dumps(index, indent=1))
    return index


INDEX_TYPES: dict[str, Any] = {
    "dtype": str, "vocab_size": int, "separator": int, "separator_token": (str, type(None)), "tokenizer": str,
    "tokenizer_hash": str, "block_bytes": int, "tokens": int, "documents": int, "max_token_id": int, "shards": list,
}  # fmt: skip
SHARD_TYPES = {"name": str, "tokens": int, "documents": int, "max_token_id": int, "idx_crc32": int, "bin_crc32": list}


def read_index(folder: Path) -> dict[str, Any]:
    """index.json of a folder of token shards.

    Raises:
        DataError: no such folder, not made by prepare, not finished, another version.
    """
    file = folder / "index.json"
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise DataError(
            f"data.path: {folder} {what}; data=tokens needs a folder that `fp8train prepare` wrote. Correct the path."
        )
    if not file.is_file():
        if (folder / "plan.json").is_file():
            done = len(list(folder.glob("shard_*.json")))
            raise DataError(
                f"data.path: {folder} is not finished ({done} shards so far). Run the same `fp8train prepare` again "
                "to go on."
            )
        raise DataError(
            f"data.path: {folder} has no index.json, so it is no folder of token shards. Make one with `fp8train "
            "prepare`."
        )
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"data.path: {file} is damaged ({error}). Prepare the folder again.") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT or index.get("version") != VERSION:
        got = (
            {key: index.get(key) for key in ("format", "version")} if isinstance(index, dict) else type(index).__name__
        )
        raise DataError(
            f"data.path: {file} is {got}; needs {FORMAT} version {VERSION}. Make it with `fp8train prepare`."
        )
    if odd := _odd_keys(index):
        raise DataError(f"data.path: {file} is damaged ({', '.join(odd)} missing or odd). Prepare the folder again.")
    return index


def _odd_keys(index: dict[str, Any]) -> list[str]:
    """Keys of an index.json that prepare would have written otherwise."""
    odd = [key for key, kind in INDEX_TYPES.items() if not isinstance(index.get(key, ...), kind)]
    if not odd and index["dtype"] != token_dtype(index["vocab_size"]).name:
        odd.append("dtype")  # the same bytes as other numbers would be other tokens, and signed ones negative
    shards = index["shards"] if "shards" not in odd else []
    whole = [isinstance(meta, dict) and _is_shard(meta) for meta in shards]
    return odd if whole and all(whole) else list(dict.fromkeys([*odd, "shards"]))


def _is_shard(meta: dict[str, Any]) -> bool:
    typed = all(isinstance(meta.get(key), kind) for key, kind in SHARD_TYPES.items())
    return typed and bool(meta["bin_crc32"]) == (meta["tokens"] > 0)


def shard_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that made the shards of a folder."""
    index = read_index(folder)
    if index["tokenizer"] == "bytes":
        return build_tokenizer("bytes")
    return build_tokenizer(str(folder / index["tokenizer"]), index["separator_token"])


def open_shards(folders: list[Path], tokenizer: Tokenizer, *, verify: bool = False) -> Corpus:
    """Map the shards of one or several folders into memory.

    Args:
        tokenizer: that of training; its hash must be that of the shards.
        verify: compare every checksum; otherwise sizes, the .idx and the first and last block of each .bin.

    Raises:
        DataError: a folder that is none of ours, unfinished, damaged, or made with another tokenizer.
    """
    segments: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    hashes: list[np.ndarray] = []
    largest = 0
    for folder in folders:
        index = read_index(folder)
        if index["tokenizer_hash"] != tokenizer.hash:
            raise DataError(
                f"data.path: {folder} was prepared with another tokenizer ({index['tokenizer']}, "
                f"{index['vocab_size']} ids) than {tokenizer.name} ({tokenizer.vocab_size} ids). Prepare it again with "
                "that one, or train in its own: data.tokenizer=auto."
            )
        largest = max(largest, index["max_token_id"])
        for meta in index["shards"]:
            tokens, sizes, digests = _map_shard(folder, meta, index, verify)
            segments.append(tokens)
            lengths.append(sizes)
            hashes.append(digests)
    counts = [len(sizes) for sizes in lengths]
    return Corpus(
        segments=segments,
        segment=np.repeat(np.arange(len(segments), dtype=np.int32), counts),
        starts=np.concatenate([np.cumsum(sizes) - sizes for sizes in lengths]),
        lengths=np.concatenate(lengths),
        hashes=np.concatenate(hashes),
        name=", ".join(map(str, folders)),
        tokenizer=tokenizer,
        max_token_id=largest,
    )


def _map_shard(
    folder: Path, meta: dict[str, Any], index: dict[str, Any], verify: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, lengths int64, hashes uint64) of one shard."""
    dtype = np.dtype(index["dtype"]).newbyteorder("<")
    data, side = folder / f"{meta['name']}.bin", folder / f"{meta['name']}.idx"
    for file, needed in ((data, meta["tokens"] * dtype.itemsize), (side, meta["documents"] * 12)):
        got = file.stat().st_size if file.is_file() else None
        if got != needed:
            state = "is missing" if got is None else f"has {got} bytes"
            raise DataError(
                f"data.path: {file} {state}; needs {needed} bytes (truncated or foreign). Delete index.json and "
                "prepare again."
            )
    content = side.read_bytes()
    if zlib.crc32(content) != meta["idx_crc32"]:
        raise _damaged(side, "differs from its checksum")
    documents = meta["documents"]
    sizes = np.frombuffer(content, dtype="<u4", count=documents).astype(np.int64)
    hashes = np.frombuffer(content, dtype="<u8", count=documents, offset=4 * documents).astype(np.uint64)
    if sizes.sum() != meta["tokens"]:
        raise _damaged(side, f"divides {sizes.sum()} tokens; {data.name} has {meta['tokens']}")
    if meta["tokens"] == 0:
        return np.empty(0, dtype=dtype), sizes, hashes
    tokens = np.memmap(data, dtype=dtype, mode="r")
    _compare_blocks(data, tokens, meta["bin_crc32"], index["block_bytes"], verify)
    return tokens, sizes, hashes


def _compare_blocks(file: Path, tokens: np.ndarray, checksums: list[int], block_bytes: int, verify: bool) -> None:
    step = block_bytes // tokens.dtype.itemsize
    blocks = range(len(checksums)) if verify else sorted({0, len(checksums) - 1})
    for block in blocks:
        if zlib.crc32(tokens[block * step : (block + 1) * step].data) != checksums[block]:
            raise _damaged(file, f"differs from its checksum in block {block}")


def _damaged(file: Path, what: str) -> DataError:
    return DataError(f"data.path: {file} {what} (damaged or foreign). Delete it and index.json and prepare again.")
