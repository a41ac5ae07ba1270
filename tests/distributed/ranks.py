"""Run a function on several gloo ranks of this machine and collect what each returns."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch.distributed as dist

ROOT = Path(__file__).parents[2]


def run_ranks(function: Callable[[Any], Any], world_size: int, folder: Path, timeout_seconds: float = 240) -> list[Any]:
    """Results of function(world) on every rank, in rank order; `function` is at the top level of a test module.

    One process imports everything and forks the ranks: importing torch is most of what a rank costs.
    """
    module, name = function.__module__, function.__name__
    subprocess.run(
        [sys.executable, "-m", "tests.distributed.ranks", module, name, str(world_size), str(folder)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=timeout_seconds, check=True,
    )  # fmt: skip
    return [pickle.loads((folder / f"rank{rank}").read_bytes()) for rank in range(world_size)]


@contextmanager
def own_folders(world: Any) -> Iterator[Path]:
    """Each rank stands in a folder of its own, as on machines without a common file system; gives one that all see."""
    with tempfile.TemporaryDirectory() as made:
        shared = Path(world.broadcast_object(made))
        before = Path.cwd()
        own = shared / f"machine{world.rank}"
        own.mkdir()
        os.chdir(own)
        try:
            yield shared
            dist.barrier()
        finally:
            os.chdir(before)


def rendezvous(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The variables that torchrun would set."""
    values = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in values.items()}}


@contextmanager
def free_port() -> Iterator[int]:
    """A TCP port that nobody listens on, and that the system gives to nobody else who asks for a free one.

    A listener that names it, and sets SO_REUSEADDR as torch's store does, can have it.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def _rank(function: Callable[[Any], Any], folder: Path, environment: dict[str, str]) -> None:
    """What a forked rank does; never returns."""
    from fp8train.distributed import init

    os.environ.update(environment)
    status = 1
    try:
        with init(60, "cpu") as world:
            result = function(world)
        (folder / f"rank{world.rank}").write_bytes(pickle.dumps(result))
        status = 0
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def _main(module: str, name: str, world_size: str, folder: str) -> int:
    function = getattr(import_module(module), name)
    children = []
    with free_port() as port:
        for rank in range(int(world_size)):
            child = os.fork()
            if child == 0:
                _rank(function, Path(folder), rendezvous(rank, int(world_size), port))
            children.append(child)
        return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)


if __name__ == "__main__":
    raise SystemExit(_main(*sys.argv[1:]))
