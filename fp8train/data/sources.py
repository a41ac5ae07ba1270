"""Sources of documents. A source is cut into pieces, by its content alone, for one reader or many workers.

A document is UTF-8 bytes, never empty. Files are read in sorted order; each piece yields its documents in file order.
"""

from __future__ import annotations

import glob
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fp8train.data import huggingface
from fp8train.data.config import SourceConfig
from fp8train.errors import DataError

STDLIB_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
FEW_FILES = 32  # fewer text files than this are cut, so that some text can be held out
FEWEST_PIECES = 64  # of a corpus of few files: 5 % of them is 3
LARGEST_CUT_BYTES = 65536
SMALLEST_CUT_BYTES = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A part of a source: whole files, a range of bytes of one JSON lines file, or a range of rows of a dataset.

    files: what to read, in order (kind hf: empty).
    start, stop: range of bytes (jsonl; a line belongs to the piece in which it begins) or of rows (hf); stop None
        means the end.
    document_bytes: size at which text files are cut; None keeps them whole.
    """

    files: tuple[str, ...] = ()
    start: int = 0
    stop: int | None = None
    document_bytes: int | None = None


def plan_pieces(source: SourceConfig, piece_bytes: int, texts: Sequence[Path] = ()) -> list[Piece]:
    """Cut a source into pieces of about piece_bytes of input.

    Args:
        source: any kind but tokens and mix.
        piece_bytes: size of a piece; a text file is never divided between pieces.
        texts: files of all text sources of a mix, which are to be cut alike (else a text in two of them could end up
            on both sides of the held-out split); none: those of this source.

    Raises:
        DataError: a path that leads to nothing, an empty file.
    """
    if source.kind == "hf":
        return [Piece(start=start, stop=stop) for start, stop in huggingface.row_ranges(source, piece_bytes)]
    files = source_files(source)
    sizes = [file.stat().st_size for file in files]
    if source.kind == "jsonl":
        return [
            Piece(files=(str(file),), start=start, stop=min(start + piece_bytes, size))
            for file, size in zip(files, sizes, strict=True)
            for start in range(0, size, piece_bytes)
        ]
    cut = None
    if source.kind == "text":
        cut = source.document_bytes or cut_size(texts or files)
    return [Piece(files=group, document_bytes=cut) for group in _group(files, sizes, piece_bytes)]


def read_piece(source: SourceConfig, piece: Piece) -> Iterator[bytes]:
    """Documents of a piece, in order.

    Raises:
        DataError: text that is not UTF-8 (file and byte offset), a line that is not a JSON object with the text
            (file:line).
    """
    if source.kind == "hf":
        yield from huggingface.read_rows(source, piece.start, piece.stop)
    elif source.kind == "jsonl":
        for file in piece.files:
            yield from _jsonl_documents(Path(file), source.text_key, piece.start, piece.stop)
    else:
        for file in piece.files:
            content = Path(file).read_bytes()
            if source.kind == "stdlib":  # a handful of modules declares another encoding; stdlib_files left them out
                yield content
                continue
            check_utf8(content, file)
            yield from _cut(content, piece.document_bytes)


def source_files(source: SourceConfig) -> list[Path]:
    """Files of a stdlib, text or jsonl source, sorted, without those that hold nothing.

    Raises:
        DataError: no path, a path or glob that leads to no file, a named file that is empty, nothing but empty files.
    """
    if source.kind == "stdlib":
        return stdlib_files()
    if not source.paths:
        raise DataError(
            f"data.path: is not given; data.kind={source.kind} needs a file, a glob or a list of them. Add "
            "data.path=FILE."
        )
    found: dict[Path, Path] = {}  # what it leads to -> the first path to it
    for entry in source.paths:
        path = Path(entry)
        if path.is_file():
            if path.stat().st_size == 0:
                raise DataError(f"data.path: {entry} is empty; needs text. Remove it or give another file.")
            found.setdefault(path.resolve(), path)
            continue
        if path.is_dir():
            raise DataError(
                f"data.path: {entry} is a folder; needs files or a glob. For all files in it: data.path='{entry}/**/*'."
            )
        matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
        matches = [match for match in matches if match.is_file()]
        if not matches:
            what = "matches no file" if glob.has_magic(str(path)) else "does not exist"
            raise DataError(
                f"data.path: {entry} {what}; needs a readable file. Correct the path (relative to {Path.cwd()})."
            )
        for match in sorted(match for match in matches if match.stat().st_size > 0):
            found.setdefault(match.resolve(), match)
    if not found:
        raise DataError(
            f"data.path: the files of {', '.join(source.paths)} are all empty; needs text. Give other files."
        )
    return sorted(found.values())


def stdlib_files() -> list[Path]:
    """Modules of the running interpreter's standard library that are UTF-8, without tests, sorted by path.

    Raises:
        DataError: the library has no .py files (a zipped or frozen Python).
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for parent, folders, names in os.walk(root):
        folders[:] = [folder for folder in folders if folder not in STDLIB_LEFT_OUT]  # prunes the walk
        for name in names:
            file = Path(parent, name)
            if file.suffix == ".py" and file.is_file() and _is_utf8(file.read_bytes()):
                files.append(file)
    if not files:
        raise DataError(
            f"data.kind=stdlib: {root} holds no .py files; needs a Python with its source. Use data=text "
            "data.path=FILE."
        )
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())


def cut_size(files: Sequence[Path]) -> int | None:
    """Size at which text files are cut: None for many files, else a power of two that gives at least FEWEST_PIECES."""
    if len(files) >= FEW_FILES:
        return None
    even = max(SMALLEST_CUT_BYTES, sum(file.stat().st_size for file in files) // FEWEST_PIECES)
    return min(LARGEST_CUT_BYTES, 1 << (even.bit_length() - 1))


def check_utf8(content: bytes, where: str) -> None:
    """Raises DataError with the offset of the first byte that is not UTF-8."""
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"data.path: {where} is not UTF-8 at byte {error.start} (0x{content[error.start]:02x}); needs UTF-8 text."
            f"{_packed_hint(content)} Convert it, for example with iconv -t UTF-8."
        ) from error


def _packed_hint(content: bytes) -> str:
    """A hint where a file begins like one of gzip, zip or zstd."""
    packed = content[:2] in (b"\x1f\x8b", b"PK") or content[:4] == b"\x28\xb5\x2f\xfd"
    return " It looks compressed: unpack it." if packed else ""


def _is_utf8(content: bytes) -> bool:
    """Whether content is UTF-8 and not empty."""
    try:
        return bool(content.decode())
    except UnicodeDecodeError:
        return False


def _group(files: Sequence[Path], sizes: Sequence[int], piece_bytes: int) -> Iterator[tuple[str, ...]]:
    group: list[str] = []
    filled = 0
    for file, size in zip(files, sizes, strict=True):
        if group and filled + size > piece_bytes:
            yield tuple(group)
            group, filled = [], 0
        group.append(str(file))
        filled += size
    yield tuple(group)


def _cut(content: bytes, document_bytes: int | None) -> Iterator[bytes]:
    """Cut after the last line end within document_bytes; a longer line is cut between two characters."""
    start = 0
    while document_bytes is not None and len(content) - start > document_bytes:
        stop = content.rfind(b"\n", start, start + document_bytes) + 1
        if stop <= start:
            stop = start + document_bytes
            while stop < len(content) and content[stop] & 0xC0 == 0x80:  # a continuation byte of UTF-8
                stop += 1
        yield content[start:stop]
        start = stop
    if start < len(content):
        yield content[start:]


def _jsonl_documents(file: Path, key: str, start: int, stop: int | None) -> Iterator[bytes]:
    """Texts of the lines that begin in [start, stop); blank lines, empty texts and nulls are passed over."""
    with file.open("rb") as lines:
        if start > 0:
            lines.seek(start - 1)
            lines.readline()
        while stop is None or lines.tell() < stop:
            offset = lines.tell()
            line = lines.readline()
            if not line:
                return
            if line.strip():
                document = _text_of_line(line, file, offset, key)
                if document:
                    yield document


def _text_of_line(line: bytes, file: Path, offset: int, key: str) -> bytes:
    try:
        record = json.loads(line.decode().removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        packed = _packed_hint(line if offset == 0 else b"")
        raise DataError(
            f"data.path: {file} is not UTF-8 at byte {offset + error.start}; needs UTF-8 JSON lines.{packed} Convert "
            "it, for example with iconv -t UTF-8."
        ) from error
    except json.JSONDecodeError as error:
        raise _line_error(
            file, offset, f"is not JSON ({error.msg} at column {error.colno})", "Correct or delete the line"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of more digits than Python reads, or brackets too deep
        raise _line_error(file, offset, f"cannot be read ({error})", "Correct or delete the line") from error
    if not isinstance(record, dict) or key not in record:
        got = (
            f"has the keys {', '.join(map(repr, record))}"
            if isinstance(record, dict)
            else f"is a {type(record).__name__}"
        )
        raise _line_error(file, offset, f"{got}; needs an object with {key!r}", "Set data.text_key=KEY")
    text = record[key]
    if text is None:
        return b""
    if not isinstance(text, str):
        raise _line_error(
            file,
            offset,
            f"has a {type(text).__name__} under {key!r}; needs text",
            "Correct the line or set data.text_key=KEY",
        )
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise _line_error(
            file, offset, f"holds half a surrogate pair at character {error.start}", "Correct the line"
        ) from error


def _line_error(file: Path, offset: int, what: str, remedy: str) -> DataError:
    with file.open("rb") as content:
        line, left = 1, offset
        while left > 0:
            chunk = content.read(min(left, 1 << 20))
            line += chunk.count(b"\n")
            left -= len(chunk)
    return DataError(f"data.path: {file}:{line} {what}. {remedy}.")
