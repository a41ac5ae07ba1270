"""Requests to stop: SIGTERM and SIGUSR1 (a scheduler about to take the machine) and the time limit."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Context in which SIGTERM and SIGUSR1 only leave a note; a second one acts as it would have without us.

    Args:
        time_limit_seconds: counted from here; None is no limit.
    """

    def __init__(self, time_limit_seconds: float | None = None) -> None:
        self._limit = time_limit_seconds
        self._started = time.monotonic()
        self._signal: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def reason(self) -> str | None:
        """Why training should stop after the current step, such as "SIGTERM"; None to go on."""
        if self._signal is not None:
            return self._signal
        if self._limit is not None and time.monotonic() - self._started >= self._limit:
            return f"the time limit of {self._limit:g} s"
        return None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python hands signals to the main thread alone
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_error: object) -> None:
        self._restore()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
