"""Where what is built or measured on a machine is kept for later processes."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """Folder of the user's that outlives the process; with a read-only home, or without one, one of this process's."""
    try:
        path = Path.home() / ".cache" / "fp8train"
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except (OSError, RuntimeError):
        return _folder_of_process(tempfile.gettempdir())


@functools.cache
def _folder_of_process(parent: str) -> Path:
    """The same at every call, so that what was checked or built once in this process stays so."""
    return Path(tempfile.mkdtemp(prefix="fp8train-", dir=parent))
