"""A file that is replaced as a whole: whoever reads it, after a kill too, finds all of the old or all of the new."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that has its name, and is on the disk, when the block ends; after an error nothing is left of it.

    Raises:
        OSError: it cannot be written.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two processes may be at it
    try:
        with fresh.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except BaseException:  # half a file takes room that the next attempt may need
        with contextlib.suppress(OSError):  # the folder itself may be what cannot be written
            fresh.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file as a whole; text in UTF-8.

    Raises:
        OSError: it cannot be written.
    """
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def remove_leftovers(folder: Path) -> None:
    """Remove what processes left that were killed while they wrote files as a whole: for whoever alone writes there.

    Raises:
        OSError: one cannot be removed.
    """
    for leftover in folder.glob(".*.[0-9]*.tmp"):
        leftover.unlink(missing_ok=True)
