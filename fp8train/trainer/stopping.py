"""Requests to stop: SIGTERM and SIGUSR1 (a scheduler about to take the machine), SIGHUP (a terminal that is gone),
Ctrl-C and the time limit."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from fp8train.checkpoint import open_checkpoint
from fp8train.errors import CheckpointError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
SAME_SECONDS = 30.0
STDERR = 2


class StopRequest:
    """Context in which SIGNALS only leave a note; a second one acts as it would have without us.

    But not SIGTERM, SIGUSR1 or SIGHUP within SAME_SECONDS of the first: a scheduler signals every process of a job, and
    torchrun hands on to its ranks what it got. A SIGINT or SIGHUP that is ignored, as in a job that a shell script put
    into the background or that nohup began, stays ignored.

    Args:
        time_limit_seconds: counted from here; None is no limit.
        tell: say on stderr what Ctrl-C does and what it does again; a process that multiprocessing started leaves that
            to its parent, which got the signal too.
        asked: who asks to stop by other means than a signal; None while nobody does.
    """

    def __init__(
        self,
        time_limit_seconds: float | None = None,
        *,
        tell: bool = True,
        asked: Callable[[], str | None] | None = None,
    ) -> None:
        self._tell = tell and multiprocessing.parent_process() is None
        self._asked = asked
        self._limit = time_limit_seconds
        self._started = time.monotonic()
        self._signal: str | None = None
        self._noted = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def reason(self) -> str | None:
        """Why training should stop after the current step, such as "SIGTERM"; None to go on."""
        if self._signal is not None:
            return self._signal
        if self._limit is not None and time.monotonic() - self._started >= self._limit:
            return f"the time limit of {self._limit:g} s"
        return None if self._asked is None else self._asked()

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python hands signals to the main thread alone
            ignored = [s for s in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(s) is signal.SIG_IGN]
            numbers = [number for number in SIGNALS if number not in ignored]
            self._previous = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_error: object) -> None:
        self._restore()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        """Handler of SIGNALS, of the second too: one taken off while a signal waits for it would lose that signal."""
        if self._signal is not None:
            if number == signal.SIGINT or time.monotonic() - self._noted >= SAME_SECONDS:
                self._restore()
                os.kill(os.getpid(), number)
            return
        self._signal, self._noted = signal.Signals(number).name, time.monotonic()
        if number == signal.SIGINT and self._tell:
            with contextlib.suppress(OSError):  # written past sys.stderr, which may be in the middle of a line
                os.write(STDERR, b"\nCtrl-C: finishing the step and saving; press again to abort\n")

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


@contextlib.contextmanager
def told_when_aborted(run_dir: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """Where Ctrl-C ends what is inside, says what is left in the run folder."""
    try:
        yield
    except KeyboardInterrupt:
        try:
            step = open_checkpoint(run_dir, check_content=False).step
        except CheckpointError:
            tell(f"aborted: nothing saved in {run_dir}")
        else:
            tell(f"aborted: the same command goes on from step {step}")
        raise
