"""Whether every rank sees the folder of the run, and the checkpoint that it goes on from."""

from __future__ import annotations

import platform
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from fp8train.checkpoint import Checkpoint
from fp8train.checkpoint.files import read_marker
from fp8train.distributed import World
from fp8train.distributed.agreement import on_main, ranks_text
from fp8train.errors import CheckpointError, ConfigError
from fp8train.trainer.run_folder import write_file

WAIT_SECONDS = 30.0  # a network file system may show another machine's new file as late as that
REMEDY = "run_dir needs to be on a file system that every rank sees."


def check_shared(run_dir: Path, world: World) -> None:
    """Refuse a run folder that is not the same for all ranks: rank 0 writes a file there, and the others look for it.

    Args:
        run_dir: is there on rank 0.

    Raises:
        ConfigError: on every rank; names those that do not see it.
        CheckpointError: rank 0 cannot write there.
    """
    if world.world_size == 1:
        return
    file = run_dir / f".seen_by_every_rank_{on_main(world, lambda: uuid.uuid4().hex)}"
    try:
        on_main(world, lambda: write_file(file, ""))
        seen = _everywhere(world, lambda: "" if appears(file) else "is not there")
    finally:
        if world.main:
            file.unlink(missing_ok=True)
    if (fault := _fault(seen)) is not None:
        raise ConfigError(f"run_dir: {run_dir} of rank 0 {fault}; needs to be the same for all. {REMEDY}")


def check_same_checkpoint(found: Checkpoint, world: World) -> None:
    """Refuse a checkpoint that is another on some rank, by its record of checksums and the sizes of its files.

    Args:
        found: on rank 0, whose content was compared with its checksums there.

    Raises:
        CheckpointError: on every rank; names those that have another, or none.
    """
    if world.world_size == 1:
        return
    wanted = on_main(world, lambda: _record(found.path))
    seen = _everywhere(world, lambda: _apart(found.path, wanted))
    if (fault := _fault(seen)) is not None:
        raise CheckpointError(f"resume: {found.path} of rank 0 {fault}; needs the same weights on every rank. {REMEDY}")


def _everywhere(world: World, look: Callable[[], str]) -> list[tuple[str, str]]:
    """(what is wrong, name of the machine) of every rank, in rank order."""
    return world.all_gather_object((look(), platform.node()))


def _fault(seen: Sequence[tuple[str, str]]) -> str | None:
    """What is wrong on which ranks, in words; None where nothing is."""
    first = next((what for what, _ in seen if what), None)
    if first is None:
        return None
    ranks = [rank for rank, (what, _) in enumerate(seen) if what == first]
    return f"{first} on {ranks_text(ranks)} (of {seen[ranks[0]][1]})"


def appears(path: Path) -> bool:
    """Whether the file is there, or comes within WAIT_SECONDS."""
    until = time.monotonic() + WAIT_SECONDS
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def _record(folder: Path) -> dict[str, str]:
    """File of a checkpoint -> checksum by its record, and size."""
    files = read_marker(folder).files.items()
    return {name: f"{record.crc32}, {(folder / name).stat().st_size} bytes" for name, record in files}


def _apart(folder: Path, wanted: dict[str, str]) -> str:
    """How the checkpoint that this rank sees differs from rank 0's; nothing where it does not."""
    if not appears(folder):
        return "is not there"
    try:
        own = _record(folder)
    except (CheckpointError, OSError):
        return "is not whole"
    names = sorted(name for name in own.keys() | wanted.keys() if own.get(name) != wanted.get(name))
    return f"has another {', '.join(names)}" if names else ""
