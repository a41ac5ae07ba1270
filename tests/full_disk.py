"""A disk that fills up while a file is written."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
from collections.abc import Iterator
from unittest import mock


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """write(2) fails in the middle of a file, as on a full disk: no file may grow beyond `size` bytes.

    Meanwhile neither this process nor a child writes bytecode: Python 3.11 keeps a file of it that was cut off
    (python/cpython#126606), and every later import of that module fails.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with (
            mock.patch.object(sys, "dont_write_bytecode", True),
            mock.patch.dict(os.environ, PYTHONDONTWRITEBYTECODE="1"),
        ):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
