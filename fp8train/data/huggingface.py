"""Documents from Hugging Face `datasets`: hub or local files, stored or streamed. Imported when used."""

from __future__ import annotations

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
    """Texts of rows start .. stop-1 of a stored dataset; empty ones are passed over."""
    dataset = load(source)
    stop = len(dataset) if stop is None else stop
    for first in range(start, stop, ROWS_PER_READ):
        rows = dataset[first : min(first + ROWS_PER_READ, stop)]
        for offset, text in enumerate(rows[source.text_key]):
            document = _encode(text, source, first + offset)
            if document:
                yield document


def stream(source: SourceConfig, dataset: Any, seed: int | None, epoch: int) -> Iterator[bytes]:
    """Texts of a streamed dataset, from load(source), in the order of (seed, epoch); seed None does not shuffle."""
    if source.hf_shuffle_buffer and seed is not None:
        dataset = dataset.shuffle(seed=seed, buffer_size=source.hf_shuffle_buffer)
    dataset.set_epoch(epoch)
    for number, row in enumerate(dataset):
        if source.text_key not in row:
            raise _no_key(source, list(row))
        document = _encode(row[source.text_key], source, number)
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
    except (OSError, ValueError, TypeError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"data.kind=hf: {name_of(source)} cannot be loaded ({reason}). Correct the name or path, or check the "
            "network."
        ) from error
    columns = dataset.column_names
    if columns is not None and source.text_key not in columns:
        raise _no_key(source, columns)
    return dataset


def name_of(source: SourceConfig) -> str:
    """What the user called the dataset."""
    return ", ".join(source.paths) or str(source.hf_name)


def _open(datasets: Any, source: SourceConfig) -> Any:
    paths = [str(Path(path).expanduser()) for path in source.paths]
    if len(paths) == 1 and (Path(paths[0]) / "state.json").is_file():  # written by save_to_disk
        stored = datasets.load_from_disk(paths[0])
        return stored.to_iterable_dataset() if source.hf_streaming else stored
    if len(paths) == 1 and (Path(paths[0]) / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(paths[0])
        if source.hf_split not in splits:
            raise ValueError(f"no split {source.hf_split!r}; there are {', '.join(splits)}")
        return splits[source.hf_split].to_iterable_dataset() if source.hf_streaming else splits[source.hf_split]
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


def _builder(file: Path) -> str | None:
    packed = file.suffix in (".gz", ".zst", ".bz2", ".xz")
    return BUILDERS.get(Path(file.stem).suffix if packed else file.suffix)


def _encode(text: Any, source: SourceConfig, row: int) -> bytes:
    if not isinstance(text, str):
        raise DataError(
            f"data: row {row} of {name_of(source)} has a {type(text).__name__} under {source.text_key!r}; needs "
            "text. Set data.text_key=COLUMN."
        )
    return text.encode()


def _no_key(source: SourceConfig, columns: list[str]) -> DataError:
    return DataError(
        f"data: {name_of(source)} has the columns {', '.join(columns)}; needs {source.text_key!r}. Set "
        "data.text_key=COLUMN."
    )
