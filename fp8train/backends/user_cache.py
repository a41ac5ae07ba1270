"""Where what is built or measured on a machine is kept for later processes."""

from __future__ import annotations

import functools
import logging
import os
import stat
import tempfile
from pathlib import Path

LOG = logging.getLogger("fp8train")


def cache_folder() -> Path:
    """Folder of the user's that outlives the process; one of this process's where there is no home, a read-only one, or
    where another user could put in what this one would run: HOME may be a folder of all, such as /tmp in a container.
    """
    try:
        path = Path.home() / ".cache" / "fp8train"
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            user = os.fstat(file.fileno()).st_uid  # as NFS has it, which may give all that is written to one user
        return path if _is_own(path, user) else _folder_of_process(tempfile.gettempdir())
    except (OSError, RuntimeError):
        return _folder_of_process(tempfile.gettempdir())


@functools.cache
def _is_own(path: Path, user: int) -> bool:
    """Whether only this user, and root, can write to the folder; root may use anybody's, as in a container.

    user: to whom a file belongs that this process writes there.
    """
    status, what = path.stat(), ""
    if user != status.st_uid and os.geteuid() != 0:
        what = f"belongs to user {status.st_uid}"
    elif status.st_mode & stat.S_IWOTH:
        what = "can be written to by every user"
    elif status.st_uid == user and status.st_mode & stat.S_IWGRP:  # made under umask 002, as were the files in it
        try:
            path.chmod(stat.S_IRWXU)
        except OSError as error:
            what = f"can be written to by its group, and stays so ({error.strerror or error})"
    if what:
        LOG.warning(
            "cache: %s %s; needs to be of user %d alone, since code is loaded from it. Delete it, or set HOME to a "
            "folder of your own; until then every process builds and checks its kernels anew",
            path, what, user,
        )  # fmt: skip
    return not what


@functools.cache
def _folder_of_process(parent: str) -> Path:
    """The same at every call, so that what was checked or built once in this process stays so."""
    return Path(tempfile.mkdtemp(prefix="fp8train-", dir=parent))
