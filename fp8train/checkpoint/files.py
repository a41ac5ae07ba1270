"""Files of a checkpoint folder: written whole and durable, or not at all; checked when they are read.

A folder is written under a temporary name beside its own: each rank that has a part flushes its files to the disk, then
a record of them; rank 0 adds the rest, then the marker with the sizes and CRC-32 of all others, and renames the folder.
A folder without a good marker is no checkpoint.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fp8train.errors import CheckpointError
from fp8train.whole_file import write_whole

MARKER = "COMPLETE"
FORMAT = "fp8train checkpoint"
VERSION = 1
TEMPORARY = ".tmp"  # suffix of a folder that is being written, or removed
OLD = ".old"  # before it, of one that is removed
PIECE_BYTES = 1 << 24
READERS = 8  # files that are compared with their checksums at a time

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """bytes: size of a file. crc32: checksum of its content, 8 hexadecimal digits (1.6 GB/s; SHA-256 0.2 GB/s)."""

    bytes: int
    crc32: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Marker:
    """step: of the checkpoint. sequence: grows with each save in a run folder. files: name -> record, of all others."""

    step: int
    sequence: int
    files: dict[str, FileRecord]


class FolderWriter:
    """Adds files to a folder, keeping the record of each for the marker."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: dict[str, FileRecord] = {}

    def write(self, name: str, pieces: Iterator[bytes | memoryview]) -> None:
        """Write a file from pieces and flush it to the disk."""
        size = crc = 0
        with open(self.folder / name, "wb") as file:
            for piece in pieces:
                file.write(piece)
                crc = zlib.crc32(piece, crc)
                size += len(piece)
            file.flush()
            os.fsync(file.fileno())
        self.records[name] = FileRecord(bytes=size, crc32=f"{crc:08x}")

    def write_json(self, name: str, content: Any) -> None:
        """Write plain values as JSON."""
        self.write(name, iter([json.dumps(content, indent=1).encode()]))

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write a safetensors file; one tensor at a time is copied to the CPU.

        Source: safetensors format (https://github.com/huggingface/safetensors#format): 8 bytes of header size, JSON
        header padded with spaces to 8 bytes, then the tensors without gaps.
        """
        self.write(name, _safetensors(tensors, metadata))


def begin_folder(target: Path) -> Path:
    """Make a temporary folder in which `target` is written.

    Each has another name: for a minute another machine may see, under the name that an earlier one had, the checkpoint
    that it has become (NFS).
    """
    folder = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}{TEMPORARY}")
    with _told(target):
        folder.mkdir(parents=True)
    return folder


def target_of(folder: Path) -> Path:
    """The checkpoint that is written, or was replaced, in a temporary folder."""
    return folder.with_name(folder.name.split(".")[1])


@contextmanager
def part_of_folder(folder: Path, number: int) -> Iterator[FolderWriter]:
    """Adds files to a temporary folder; when the block ends, a record of them, by which whole_folder knows of them.

    Raises:
        CheckpointError: the disk is full or the place cannot be written to.
    """
    with _told(target_of(folder)):
        writer = FolderWriter(folder)
        yield writer
        records = {name: asdict(record) for name, record in writer.records.items()}
        write_whole(_record_of(folder, number), json.dumps(records))


@contextmanager
def whole_folder(
    folder: Path, step: int, sequence: int, parts: int, wait: Callable[[], None]
) -> Iterator[FolderWriter]:
    """A temporary folder once all parts are in it; it gets its name, complete with its marker, when the block ends.

    What had that name before is untouched until then.

    Args:
        wait: called again and again until the records of all parts are there; raises to give up.

    Raises:
        CheckpointError: the disk is full or the place cannot be written to.
    """
    target = target_of(folder)
    replaced = _leaving(target)
    with _told(target):
        writer = FolderWriter(folder)
        for record in (_record_of(folder, number) for number in range(parts)):
            while not record.exists():
                wait()
            own = json.loads(record.read_bytes())
            writer.records |= {name: FileRecord(**values) for name, values in own.items()}
            record.unlink()
        yield writer
        marker = Marker(step=step, sequence=sequence, files=dict(writer.records))
        writer.write_json(MARKER, {"format": FORMAT, "version": VERSION, **asdict(marker)})
        _sync_folder(folder)
        if target.exists():
            _remove(replaced)
            target.rename(replaced)
        folder.rename(target)
        _sync_folder(target.parent)
        _remove(replaced)


def discard_folder(folder: Path) -> None:
    """Remove what begin_folder has made, as far as that can be."""
    shutil.rmtree(folder, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a checkpoint; cut off half-way it leaves a temporary name, which the next save clears away."""
    if folder.exists():
        _remove(_leaving(folder))
        folder.rename(_leaving(folder))
        _remove(_leaving(folder))


def take_back(parent: Path) -> None:
    """Clear away what a killed process left, and give those checkpoints their name that are whole and lack it.

    That is one which a save of the same step was about to replace, or that was about to get its name.

    Raises:
        CheckpointError: the place cannot be written to.
    """
    leftovers = sorted(parent.glob(f".*{TEMPORARY}"), key=lambda path: path.name.endswith(f"{OLD}{TEMPORARY}"))
    for leftover in leftovers:  # new ones before those that they were to replace
        target = target_of(leftover)
        try:
            if not target.exists():
                verify(leftover, read_marker(leftover))
                leftover.rename(target)
        except (CheckpointError, OSError):  # cut off while it was written or removed
            continue
    with _told(parent):  # it may be as large as a checkpoint, for which the run needs the room
        clear_temporary(parent)


def clear_temporary(parent: Path) -> None:
    """Remove what a killed process left half-written or half-removed."""
    for leftover in parent.glob(f".*{TEMPORARY}"):
        _remove(leftover)


def read_marker(folder: Path) -> Marker:
    """Marker of a checkpoint folder.

    Raises:
        CheckpointError: none (writing was cut off, or it is another program's folder), damaged, or of another version.
    """
    path = folder / MARKER
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder}: has no {MARKER} file; needs a checkpoint that fp8train wrote to its end. Take another one."
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); take another checkpoint.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: is not of fp8train; needs a checkpoint that fp8train wrote. Take another one.")
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: has version {content.get('version')}; needs {VERSION}. Read it with the fp8train that wrote it."
        )
    try:
        files = {name: FileRecord(**record) for name, record in content["files"].items()}
        return Marker(step=int(content["step"]), sequence=int(content["sequence"]), files=files)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: is damaged ({error!r}); take another checkpoint.") from error


def verify(folder: Path, marker: Marker) -> None:
    """Compare every file with its size and checksum.

    Raises:
        CheckpointError: names the first file that is missing or differs.
    """
    pool = ThreadPoolExecutor(READERS)
    try:
        for fault in pool.map(lambda name: _fault(folder / name, marker.files[name]), marker.files):
            if fault is not None:
                raise fault
    finally:
        pool.shutdown(cancel_futures=True)


def _fault(path: Path, record: FileRecord) -> CheckpointError | None:
    """What is wrong with a file."""
    try:
        size = path.stat().st_size
        same = size == record.bytes and _crc32(path) == record.crc32
    except OSError as error:
        return CheckpointError(f"{path}: cannot be read ({error.strerror}); take another checkpoint.")
    if same:
        return None
    what = f"has {size} bytes of {record.bytes}" if size != record.bytes else "differs from its checksum"
    return CheckpointError(f"{path}: {what}; needs the file as it was written. Take another checkpoint.")


def read_json(path: Path) -> Any:
    """Plain values of a JSON file.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); take another checkpoint.") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (private memory maps of the file) and metadata of a safetensors file.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); take another checkpoint.") from error


def _safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """Content of a safetensors file, in pieces."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        assert tensor.dtype in _DTYPES, f"{name} is {tensor.dtype}: FP8 is derived state and stays out of state dicts"
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        content = tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data
        for begin in range(0, len(content), PIECE_BYTES):
            yield content[begin : begin + PIECE_BYTES]


@contextmanager
def _told(target: Path) -> Iterator[None]:
    """An error of the disk inside is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {target}: cannot be written: {error.strerror or error}; needs a writable run_dir with space "
            "for a whole checkpoint. Earlier ones are untouched: make room or give another run_dir, then resume."
        ) from error


def _record_of(folder: Path, number: int) -> Path:
    return folder / f"part_{number:05d}.json"


def _crc32(path: Path) -> str:
    crc = 0
    with open(path, "rb") as file:
        while piece := file.read(PIECE_BYTES):
            crc = zlib.crc32(piece, crc)
    return f"{crc:08x}"


def _leaving(folder: Path) -> Path:
    """Temporary name of a folder that is being removed."""
    return folder.with_name(f".{folder.name}{OLD}{TEMPORARY}")


def _remove(path: Path) -> None:
    if path.is_dir():
        try:
            shutil.rmtree(path)
        except OSError as error:  # NFS keeps a file that some process has open; the next save removes what is left
            if error.errno not in (errno.ENOTEMPTY, errno.EBUSY):
                raise
    elif path.exists():
        path.unlink()


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
