"""Command `prepare`: tokenise a source into token shards, in parallel; a second call goes on where a killed one was.

fp8train prepare data=text data.path='corpus/*.txt' data.tokenizer=tokenizer.json out=DIR workers=8
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

import yaml

from fp8train import _layout
from fp8train.arguments import parse_arguments
from fp8train.data import huggingface
from fp8train.data.config import DataConfig
from fp8train.data.corpus import encode
from fp8train.data.shards import finished_shard, write_index, write_shard
from fp8train.data.sources import Piece, plan_pieces, read_piece
from fp8train.data.tokenizers import Tokenizer, build_tokenizer
from fp8train.errors import DataError, exit_code
from fp8train.whole_file import remove_leftovers, write_whole

Report = Callable[[str], None]
DECIDING_KEYS = {
    "kind", "path", "text_key", "document_bytes", "hf_name", "hf_subset", "hf_split", "hf_revision", "hf_streaming",
}  # fmt: skip


@dataclass(kw_only=True, slots=True)
class PrepareConfig:
    """fp8train prepare: tokenise a source into a folder of token shards for data=tokens.

    out: folder to write; an unfinished one of the same preparation is continued.
    workers: processes; null takes one per CPU. The shards are the same for any number.
    shard_bytes: text per shard.
    data: source and tokenizer, as for training.
    """

    out: Path
    workers: int | None = None
    shard_bytes: int = 1 << 26
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise DataError(f"workers: is {self.workers}; needs at least 1. Leave it out for one per CPU.")
        if self.shard_bytes < 1:
            raise DataError(f"shard_bytes: is {self.shard_bytes}; needs at least 1. Leave it out for 64 MiB of text.")


def prepare(config: PrepareConfig, report: Report = lambda line: None) -> dict[str, Any]:
    """Write token shards; go on with what an interrupted call left.

    Args:
        report: gets one line per finished shard.

    Returns:
        dict: content of index.json: totals, tokenizer, shards.

    Raises:
        DataError: bad source or tokenizer, a folder in use or of another preparation, a folder that cannot be written.
    """
    source = config.data
    source.check_read()
    if source.kind in ("tokens", "mix"):
        raise DataError(
            f"data.kind: is {source.kind}; prepare needs stdlib, text, jsonl or hf. "
            "Prepare each source into its own folder and mix the folders in training."
        )
    tokenizer = build_tokenizer(source.tokenizer, source.separator)
    if source.streamed and config.workers not in (None, 1):
        raise DataError(f"workers: is {config.workers}; a stream is read in order by one. Set workers=1 or stream off.")
    pieces = [] if source.streamed else plan_pieces(source, config.shard_bytes)
    folder = config.out
    try:
        with _locked(folder):
            _compare_plan(folder, _plan(config, pieces, tokenizer))
            if source.streamed:
                shards = _write_stream(folder, config, tokenizer, report)
            else:
                shards = _write_pieces(folder, config, pieces, tokenizer, report)
            if not sum(shard["documents"] for shard in shards):
                raise DataError("data: its documents are all empty; needs text. Give other files.")
            index = write_index(folder, shards, tokenizer)
            remove_leftovers(folder)
    except OSError as error:
        raise DataError(
            f"out: {folder} cannot be written ({error.strerror or error}). Free space or correct the path; "
            "the same command goes on where it stopped."
        ) from error
    return index


def main(argv: Sequence[str]) -> int:
    """Command line: `data=KIND data.KEY=VALUE out=DIR workers=N`."""
    from fp8train.distributed import check_single  # needs torch, which the workers start without

    check_single("prepare")
    config = parse_arguments(_expand_group(argv), PrepareConfig)
    started = time.perf_counter()
    index = prepare(config, report=lambda line: print(line, flush=True))
    print(
        f"prepared {config.out}: {index['documents']:,} documents, {index['tokens']:,} tokens, "
        f"{len(index['shards'])} shards, vocabulary {index['vocab_size']:,}, {time.perf_counter() - started:.1f} s"
    )
    size = f"model.vocab_size={index['vocab_size']}"
    print(f"train on it with: data=tokens data.path={config.out} {size} (which model.init_from has by itself)")
    return 0


def _expand_group(argv: Sequence[str]) -> list[str]:
    """Replace data=NAME by the values in configs/data/NAME.yaml, which later arguments override."""
    arguments: list[str] = []
    for argument in argv:
        if not argument.startswith("data="):
            arguments.append(argument)
            continue
        name = argument.removeprefix("data=")
        file = _layout.folder("configs") / "data" / f"{name}.yaml"
        if not file.is_file():
            known = ", ".join(sorted(path.stem for path in file.parent.glob("*.yaml")))
            raise DataError(f"arguments: data={name} is not known; needs one of {known}. Correct the name.")
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        arguments[:0] = [f"data.{key}={json.dumps(value)}" for key, value in values.items()]
    return arguments


def _plan(config: PrepareConfig, pieces: Sequence[Piece], tokenizer: Tokenizer) -> dict[str, Any]:
    """What decides the bytes of the shards; a second call must agree with it."""
    names = sorted({file for piece in pieces for file in piece.files})
    names += [str(file) for file in huggingface.local_files(config.data)] if config.data.kind == "hf" else []
    stats = {name: Path(name).stat() for name in names}
    return {
        "source": {key: value for key, value in asdict(config.data).items() if key in DECIDING_KEYS},
        "files": [[str(Path(name).resolve()), stats[name].st_size, stats[name].st_mtime_ns] for name in names],
        "pieces": [[piece.start, piece.stop, len(piece.files), piece.document_bytes] for piece in pieces],
        "shard_bytes": config.shard_bytes,
        "tokenizer_hash": tokenizer.hash,
    }


def _compare_plan(folder: Path, plan: dict[str, Any]) -> None:
    file = folder / "plan.json"
    if not file.is_file():
        others = sorted(
            path.name for path in folder.iterdir() if path.name != ".lock" and not path.name.endswith(".tmp")
        )
        if others:
            raise DataError(
                f"out: {folder} holds other files ({', '.join(others[:3])}); needs an empty folder. Choose another."
            )
        write_whole(file, json.dumps(plan, indent=1))
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            f"out: {file} is damaged ({error}); needs what a preparation wrote. Delete the folder or choose another."
        ) from error
    different = [key for key in plan if before.get(key) != json.loads(json.dumps(plan[key]))]
    if plan["source"]["kind"] == "hf" and not before.get("files") and "files" in different:
        different.remove("files")  # earlier versions did not note those of a dataset
    if different:
        raise DataError(
            f"out: {folder} was begun with other values of {', '.join(different)} (see plan.json); needs the same. "
            "Delete the folder or choose another."
        )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; the lock goes with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"out: {folder} is being written by another prepare. Wait for it or choose another."
            ) from error
        yield


def _write_pieces(
    folder: Path, config: PrepareConfig, pieces: Sequence[Piece], tokenizer: Tokenizer, report: Report
) -> list[dict[str, Any]]:
    """Write the shards that are missing; shard number = piece number, so the bytes do not depend on who wrote it."""
    shards = {n: meta for n in range(len(pieces)) if (meta := finished_shard(folder, n, tokenizer)) is not None}
    missing = [number for number in range(len(pieces)) if number not in shards]
    if shards:
        report(f"going on: {len(shards)} of {len(pieces)} shards are there")
    workers = min(config.workers or os.cpu_count() or 1, len(missing))
    started, tokens = time.perf_counter(), 0
    for number, meta in _written(folder, config, pieces, tokenizer, missing, workers):
        shards[number] = meta
        tokens += meta["tokens"]
        rate = tokens / (time.perf_counter() - started)
        report(
            f"shard {number}: {meta['documents']:,} documents, {meta['tokens']:,} tokens; "
            f"{len(shards)} of {len(pieces)} shards, {rate:,.0f} tokens/s"
        )
    return [shards[number] for number in range(len(pieces))]


def _written(
    folder: Path, config: PrepareConfig, pieces: Sequence[Piece], tokenizer: Tokenizer, missing: list[int], workers: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(shard number, what its .json holds), as they get done."""
    if workers <= 1:
        for number in missing:
            documents = read_piece(config.data, pieces[number])
            yield number, write_shard(folder, number, encode(documents, tokenizer), tokenizer)
        return
    # spawn: a forked child would inherit the pipes of its siblings and outlive a killed parent.
    context = multiprocessing.get_context("spawn")
    processes: dict[Connection, Any] = {}
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, folder, config.data), daemon=True)
            process.start()
            theirs.close()
            processes[ours] = process
        waiting = iter(missing)
        for connection in processes:
            number = next(waiting)
            connection.send((number, pieces[number]))
        left = len(missing)
        while left:
            for connection in cast(list[Connection], wait(list(processes))):
                yield _answer(connection, processes[connection])
                left -= 1
                following = next(waiting, None)
                if following is not None:
                    connection.send((following, pieces[following]))
    finally:
        for connection, process in processes.items():
            connection.close()
            process.terminate()
            process.join()


def _answer(connection: Connection, process: Any) -> tuple[int, dict[str, Any]]:
    try:
        answer = connection.recv()
    except (EOFError, ConnectionResetError) as error:
        process.join()
        raise DataError(
            f"workers: a worker ended with status {process.exitcode} (out of memory?). Set fewer workers; "
            "the same command goes on where it stopped."
        ) from error
    if isinstance(answer, Exception):
        raise answer
    return answer


def _work(connection: Connection, folder: Path, source: DataConfig) -> None:
    """A worker: writes the shards it is told to until the pipe closes, which it also does when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tokenizer = build_tokenizer(source.tokenizer, source.separator)
    while True:
        try:
            number, piece = connection.recv()
        except EOFError:
            return
        try:
            # document by document, in one thread: workers share the CPUs
            documents = encode(read_piece(source, piece), tokenizer, batch_bytes=1)
            answer: object = (number, write_shard(folder, number, documents, tokenizer))
        except Exception as error:  # whatever it is, the parent says it
            answer = error
        try:
            connection.send(answer)
        except BrokenPipeError:
            return


def _write_stream(folder: Path, config: PrepareConfig, tokenizer: Tokenizer, report: Report) -> list[dict[str, Any]]:
    """Shards of a stream, one after the other; finished ones are skipped in the stream by their number of documents."""
    shards: list[dict[str, Any]] = []
    while (meta := finished_shard(folder, len(shards), tokenizer)) is not None:
        shards.append(meta)
    done = sum(shard["documents"] for shard in shards)
    documents = huggingface.stream(config.data, huggingface.load(config.data), None, 0)
    if done:
        started = time.perf_counter()
        done = sum(1 for _ in itertools.islice(documents, done))
        report(
            f"going on after {len(shards)} shards: skipped {done:,} documents in {time.perf_counter() - started:.1f} s"
        )
    for first in documents:
        text = _take_bytes(itertools.chain([first], documents), config.shard_bytes)
        shards.append(write_shard(folder, len(shards), encode(text, tokenizer), tokenizer))
        report(f"shard {len(shards) - 1}: {shards[-1]['documents']:,} documents, {shards[-1]['tokens']:,} tokens")
    return shards


def _take_bytes(documents: Iterator[bytes], limit: int) -> Iterator[bytes]:
    """Documents until they hold `limit` bytes together."""
    taken = 0
    while taken < limit:
        document = next(documents, None)
        if document is None:
            return
        taken += len(document)
        yield document


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
