"""Documents from Hugging Face `datasets`: hub or local files, stored or streamed. Imported when used."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fp8train.data.config import SourceConfig
from fp8train.errors import DataError

BUILDERS = {
    ".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text", ".arrow": "arrow",
}  # fmt: skip
ROWS_PER_READ = 256


def row_ranges(source: SourceConfig, piece_bytes: int) -> list[tuple[int, int]]:
    """Ranges of rows of about piece_bytes each, by the stored size; the same for any number of workers."""
    dataset = load(source)
    rows = len(dataset)
    if rows == 0:
        raise DataError(
            f"data: {name_of(source)} has no rows in split {source.hf_split}; needs text. Set data.hf_split=SPLIT."
        )
    pieces = max(1, -(-int(dataset.data.nbytes) // piece_bytes))
    step = -(-rows // pieces)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def read_rows(source: SourceConfig, start: int, stop: int | None) -> Iterator[bytes]:
    """Texts of rows start .. stop-1 of a stored dataset; empty and null ones are passed over."""
    dataset = load(source)
    stop = len(dataset) if stop is None else stop
    for first in range(start, stop, ROWS_PER_READ):
        try:
            texts = dataset[first : min(first + ROWS_PER_READ, stop)][source.text_key]
        except Exception as error:  # a damaged file may load, and hold text that is none
            raise _unreadable(source, f"from row {first:,} on", error) from error
        for offset, text in enumerate(texts):
            document = _encode(text, source, f"{first + offset:,}")
            if document:
                yield document


def stream(source: SourceConfig, dataset: Any, seed: int | None, epoch: int) -> Iterator[bytes]:
    """Texts of a streamed dataset, from load(source), in the order of (seed, epoch); seed None does not shuffle."""
    if source.hf_shuffle_buffer and seed is not None:
        dataset = dataset.shuffle(seed=seed, buffer_size=source.hf_shuffle_buffer)
    dataset.set_epoch(epoch)
    rows, number = iter(dataset), 0
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # pyarrow, json and the network have theirs
            raise _unreadable(source, f"after {number:,} rows in the order of this pass", error) from error
        if row is None:
            return
        if source.text_key not in row:
            raise _no_key(source, list(row))
        document = _encode(row[source.text_key], source, f"{number:,} in the order of this pass")
        number += 1
        if document:
            yield document


def load(source: SourceConfig) -> Any:
    """The dataset itself: datasets.Dataset, or IterableDataset when streaming.

    Raises:
        DataError: the package is missing, no name, not found, not reachable, no such split or column.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "data.kind=hf: needs the package datasets, which is not installed. pip install 'fp8train[hf]'."
        ) from error
    if not source.paths and source.hf_name is None:
        raise DataError(
            "data.kind=hf: neither data.hf_name nor data.path is given; needs one. Add data.hf_name=OWNER/NAME or "
            "data.path=FILES."
        )
    try:
        dataset = _open(datasets, source)
    except Exception as error:  # the package, its readers and the network raise what they like
        raise DataError(
            f"data.kind=hf: {name_of(source)} cannot be loaded ({_reason(error)}). Correct the name, path or file, or "
            "check the network."
        ) from error
    columns = dataset.column_names
    if columns is not None and source.text_key not in columns:
        raise _no_key(source, columns)
    return dataset


def local_files(source: SourceConfig) -> list[Path]:
    """Files on this machine that data.path names, sorted; those in a folder that save_to_disk wrote too."""
    found: set[Path] = set()
    for entry in source.paths:
        path = Path(entry)
        matches = [path] if path.exists() else [Path(match) for match in glob.glob(str(path), recursive=True)]
        for match in matches:
            found.update(match.rglob("*") if match.is_dir() else [match])
    own = ("cache-", "tmp")  # what `datasets` adds to a saved folder when somebody maps or filters it
    return sorted(file for file in found if file.is_file() and not file.name.startswith(own) and file.suffix != ".lock")


def identity(source: SourceConfig, *, by_path: bool = False) -> str:
    """What a stream is made of: files by name and size, wherever they lie, and how they are read.

    by_path: as earlier versions had it, by the paths as given.
    """
    files: Any = [] if by_path else [(file.name, file.stat().st_size) for file in local_files(source)]
    files = files or source.paths
    return repr([
        source.hf_name, source.hf_subset, source.hf_split, source.hf_revision, files, source.text_key,
        source.hf_shuffle_buffer,
    ])  # fmt: skip


def name_of(source: SourceConfig) -> str:
    """What the user called the dataset."""
    return ", ".join(source.paths) or str(source.hf_name)


def _open(datasets: Any, source: SourceConfig) -> Any:
    paths = source.paths
    folders = [path for path in paths if Path(path).is_dir()]
    if folders:
        return _saved(datasets, source, folders, paths)
    name = source.hf_name or _builder(Path(paths[0]))
    if name is None:
        raise ValueError(
            f"no reader for files named {Path(paths[0]).name}; set data.hf_name to json, parquet, csv, text or arrow"
        )
    return datasets.load_dataset(
        name,
        source.hf_subset,
        split=source.hf_split,
        revision=source.hf_revision,
        streaming=source.hf_streaming,
        data_files=paths or None,
    )


def _saved(datasets: Any, source: SourceConfig, folders: list[str], paths: list[str]) -> Any:
    """The dataset in a folder that save_to_disk wrote."""
    folder = folders[0]
    if not any((Path(folder) / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise ValueError(f"{folder} is a folder, and not one of save_to_disk; name its files: data.path='{folder}/*'")
    if len(paths) > 1:
        raise ValueError("a saved dataset is given with another path; give one, and put several in a mix")
    for key in ("hf_name", "hf_subset", "hf_revision"):
        if getattr(source, key) is not None:
            raise ValueError(f"data.{key} is given, which a saved dataset has no use for; leave it out")
    stored = datasets.load_from_disk(folder)
    splits = stored if isinstance(stored, datasets.DatasetDict) else {str(stored.split or "train"): stored}
    if source.hf_split not in splits and not (len(splits) == 1 and source.hf_split == "train"):
        raise ValueError(f"no split {source.hf_split!r}; there are {', '.join(splits)}")
    chosen = splits.get(source.hf_split, next(iter(splits.values()))).with_format(None)
    return chosen.to_iterable_dataset() if source.hf_streaming else chosen


def _reason(error: BaseException) -> str:
    """First lines of an error and of what caused it."""
    text = (str(error).splitlines() or [""])[0] or type(error).__name__
    cause = error.__cause__
    return text if cause is None or str(cause) in text else f"{text}: {_reason(cause)}"


def _builder(file: Path) -> str | None:
    packed = file.suffix in (".gz", ".zst", ".bz2", ".xz")
    return BUILDERS.get(Path(file.stem).suffix if packed else file.suffix)


def _encode(text: Any, source: SourceConfig, row: str) -> bytes:
    """UTF-8 of a text; of a null nothing, as of an empty one."""
    if text is None:
        return b""
    if not isinstance(text, str):
        raise DataError(
            f"data: row {row} of {name_of(source)} has a {type(text).__name__} under {source.text_key!r}; needs "
            "text. Set data.text_key=COLUMN."
        )
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"data: row {row} of {name_of(source)} holds half a surrogate pair at character {error.start}; needs "
            "text. Correct it."
        ) from error


def _unreadable(source: SourceConfig, where: str, error: Exception) -> DataError:
    return DataError(
        f"data: {name_of(source)} cannot be read {where} ({_reason(error)}). Correct the file, or check the network."
    )


def _no_key(source: SourceConfig, columns: list[str]) -> DataError:
    return DataError(
        f"data: {name_of(source)} has the columns {', '.join(columns)}; needs {source.text_key!r}. Set "
        "data.text_key=COLUMN."
    )
