"""One live run in one folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fp8train.distributed import World
from fp8train.distributed.agreement import on_main
from fp8train.errors import CheckpointError, UserError
from fp8train.trainer.shared_folder import check_shared
from fp8train.whole_file import remove_leftovers

LOCK_FILE = ".lock"


@contextmanager
def lock_run_folder(run_dir: str | Path) -> Iterator[Callable[[], None]]:
    """Hold a run folder, made if need be, for this process; gives a check that it still does. On rank 0 only.

    The lock is the kernel's (flock), so that it ends with the process, however that ends. On a file system without
    flock the process id and host in the file decide. The file is removed at the end.

    Raises:
        CheckpointError: a live run holds the folder, or it cannot be written to; from the check: the folder has been
            removed or renamed, or has become another run's.
    """
    run_dir = Path(run_dir)
    path = run_dir / LOCK_FILE
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(path)
        remove_leftovers(run_dir)
    except OSError as error:
        raise CheckpointError(
            f"run_dir: {run_dir} cannot be written to: {error.strerror or error}; needs a writable folder. "
            "Give another run_dir."
        ) from error

    def check() -> None:
        if not _is_at(descriptor, path):
            raise CheckpointError(
                f"run_dir: {run_dir} is not this run's any more: it has been removed, renamed or given to another run; "
                "needs it to save what was trained. Leave the folder of a live run alone."
            )

    try:
        yield check
    finally:
        with contextlib.suppress(OSError):  # of a folder that cannot be written any more
            if _is_at(descriptor, path):  # else it is another run's
                path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path) -> int:
    """Open and lock the file; its descriptor."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(descriptor, path)
            # a run that has just ended may have removed the file between our open and our lock
            if _is_at(descriptor, path):
                holder = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, holder, 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one that has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _lock(descriptor: int, path: Path) -> None:
    """Take the lock or raise CheckpointError."""
    holder = _holder(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _in_use(path, holder) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise
        if holder and not _is_dead(holder):
            raise _in_use(path, holder) from error


def _holder(descriptor: int) -> dict[str, Any]:
    """Who wrote the file; empty if nobody has, or not to its end."""
    try:
        content = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether a holder is known to be gone; one on another host is taken to live."""
    if holder.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _in_use(path: Path, holder: dict[str, Any]) -> CheckpointError:
    who = f"process {holder['pid']} on {holder['host']}" if {"pid", "host"} <= set(holder) else "another process"
    return CheckpointError(
        f"run_dir: {path.parent} is in use by {who}; needs a folder of its own. Give another run_dir or wait for "
        f"that run; if it is gone, delete {path}."
    )


@contextmanager
def claimed(run_dir: Path, world: World) -> Iterator[Callable[[], None]]:
    """Inside, no other process can train in the folder, which every rank sees; folders made for a refused run go again.

    Gives what rank 0 calls before it writes: lock_run_folder's check.
    """
    made = [path for path in (run_dir, *run_dir.parents) if world.main and not path.exists()]
    try:
        with ExitStack() as stack:
            held: list[Callable[[], None]] = []
            on_main(world, lambda: held.append(stack.enter_context(lock_run_folder(run_dir))))
            check_shared(run_dir, world)
            yield held[0] if held else lambda: None
    except UserError:
        _remove_empty(made)
        raise


def _remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders, given innermost first, up to the first that is gone or holds something."""
    for folder in folders:
        if not folder.is_dir() or any(folder.iterdir()):
            return
        folder.rmdir()
