"""Checkpoints that are written while training goes on, by all ranks."""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fp8train.checkpoint import Content, Retention, TrainingState, checkpoint_path
from fp8train.checkpoint.content import own_part, part_of, parts_of
from fp8train.checkpoint.files import begin_folder, discard_folder, target_of
from fp8train.checkpoint.writing import finish, write_tensors
from fp8train.distributed import World
from fp8train.distributed.agreement import on_every_rank, on_main
from fp8train.errors import CheckpointError
from fp8train.shards import is_sharded
from fp8train.trainer.host_memory import free_host_bytes
from fp8train.trainer.shared_folder import REMEDY, appears
from fp8train.units import bytes_text

T = TypeVar("T")

POLL_SECONDS = 0.05
ABORT_SECONDS = 30.0  # that a run which is aborted gives a checkpoint, and one that fails parts that do not grow


class Saver:
    """Writes the checkpoints of a run: each rank its part, while training goes on. All ranks make the same calls.

    A part is copied to the host and written from there by a thread; of a model that is not sharded only where the hosts
    have memory for the copy, else training waits. As a context manager it gives what is being written, when an error
    ends the run, the time to become whole.

    Args:
        background: False: training waits for every checkpoint.
        tell: says a line to the user.

    Attributes:
        saved: the last checkpoint that is whole. seconds: for which training has waited for checkpoints.
    """

    def __init__(self, run_dir: Path, world: World, background: bool, tell: Callable[[str], None]) -> None:
        self._run_dir, self._world, self._background, self._tell = run_dir, world, background, tell
        self._told = False  # that it waits
        self._given_up = threading.Event()
        self._folder = Path()  # in which it is being written
        self._part: Future[None] | None = None  # of this rank, as long as the checkpoint is being written
        self._whole: Future[Path] | None = None  # on rank 0, in the background
        self.saved = Path()
        self.seconds = 0.0

    @property
    def failed(self) -> str | None:
        """A reason to stop where what is being written has failed, for `settle` to say how; None otherwise."""
        begun = [future for future in (self._part, self._whole) if future is not None and future.done()]
        return "a checkpoint cannot be written" if any(future.exception() is not None for future in begun) else None

    def save(self, step: int, content: Content, state: TrainingState, retention: Retention) -> None:
        """Begin to write a checkpoint, once the one before is whole.

        Args:
            content: as content_of gave it on this rank.
            state: of this rank; that of rank 0 is written.

        Raises:
            CheckpointError: on every rank; this one or the one before cannot be written.
        """
        self.settle()
        begun, world = time.monotonic(), self._world
        parts = parts_of(content, world.world_size)
        part = part_of(world.rank, world.world_size, parts)
        target = checkpoint_path(self._run_dir, step)
        folder = self._folder = on_main(world, lambda: begin_folder(target), patient=True)
        background = self._background and self._has_room(content, None if part is None else parts)
        own = own_part(content, part, parts, copy=background)

        def write() -> None:
            if part is None:
                return
            if not appears(folder):
                raise CheckpointError(f"checkpoint {target}: the folder of rank 0 is not to be seen; {REMEDY}")
            write_tensors(folder, own, part, parts)

        self._finish = partial(finish, folder, self._run_dir, step, state, parts, retention, self._wait)
        self._part = _begun(write, background)
        self._whole = _begun(self._finish, True) if world.main and background else None
        self.seconds += time.monotonic() - begun
        if not background:
            self.settle()

    def settle(self) -> None:
        """Wait until the checkpoint that is being written, if there is one, is whole.

        Raises:
            CheckpointError: on every rank; it cannot be written, and nothing of it is left.
        """
        if self._part is None:
            return
        begun, part, whole = time.monotonic(), self._part, self._whole
        try:
            on_every_rank(self._world, part.result, patient=True)
            self.saved = on_main(self._world, self._finish if whole is None else whole.result, patient=True)
        except Exception:  # not Ctrl-C, after which __exit__ still gives it time
            self._part = None
            self._give_up(whole)
            raise
        self._part = self._whole = None
        self.seconds += time.monotonic() - begun

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        if self._part is None:
            return
        begun: list[Future[Any]] = [future for future in (self._part, self._whole) if future is not None]
        if kind is KeyboardInterrupt:
            if wait(begun, 0).not_done:
                self._tell(f"a checkpoint is being written: it has {ABORT_SECONDS:g} s to become whole")
            wait(begun, ABORT_SECONDS)
        else:
            wait([self._part])
            before = -1  # parts of other ranks may take longer, but not those of a rank that is gone
            while (written := self._written()) > before and wait(begun, ABORT_SECONDS).not_done:
                before = written
        self._give_up(self._whole)

    def _give_up(self, whole: Future[Path] | None) -> None:
        """Leave nothing of a checkpoint that is not whole."""
        self._given_up.set()
        if self._world.main:
            wait([] if whole is None else [whole])
            discard_folder(self._folder)

    def _written(self) -> int:
        """Bytes of tensors in the folder of the checkpoint that is being written; 0 when it has got its name."""
        try:
            return sum(path.stat().st_size for path in self._folder.glob("*.safetensors"))
        except FileNotFoundError:
            return 0

    def _wait(self) -> None:
        if self._given_up.wait(POLL_SECONDS):
            target = target_of(self._folder)
            raise CheckpointError(f"checkpoint {target}: a part of it is missing; needs every rank to write.")

    def _has_room(self, content: Content, parts: int | None) -> bool:
        """Whether every host has memory for copies of the parts that its ranks write; parts: None: this rank has none.

        Those of a sharded model are made whole in the memory of the host anyway.
        """
        if is_sharded(content.weights.values()):
            return True
        own = platform.node(), 0 if parts is None else content.bytes // parts, free_host_bytes()
        every = self._world.all_gather_object(own)
        for host in dict.fromkeys(name for name, _, _ in every):
            needed = sum(bytes_ for name, bytes_, _ in every if name == host)
            free = min((free for name, _, free in every if name == host and free is not None), default=needed)
            if needed > free:
                if not self._told:
                    self._tell(
                        f"training waits for checkpoints: {host} has {bytes_text(free)} of memory free, and a copy to "
                        f"write from takes {bytes_text(needed)}"
                    )
                self._told = True
                return False
        return True


def _begun(action: Callable[[], T], background: bool) -> Future[T]:
    """What an action gives or raises, at once or from a thread, which does not keep the process alive."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:  # whoever asks for the result gets it
            future.set_exception(error)

    if background:
        threading.Thread(target=run, name="checkpoint", daemon=True).start()
    else:
        run()
    return future
