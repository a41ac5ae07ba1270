"""Where what is built or measured on a machine is kept for later processes."""

from __future__ import annotations

import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """Folder of the user's that outlives the process; with a read-only home, or without one, a folder that does not."""
    try:
        path = Path.home() / ".cache" / "fp8train"
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except (OSError, RuntimeError):
        return Path(tempfile.mkdtemp(prefix="fp8train-"))
