"""The request to undo steps."""

from __future__ import annotations


class RollBack(Exception):
    """What after_step raises, on every rank alike, to go back to the last checkpoint of the run.

    Args:
        watcher: name of the one that raises it: it keeps its state, all others take back the checkpoint's.
        reason: for the console.
    """

    def __init__(self, watcher: str, reason: str) -> None:
        super().__init__(reason)
        self.watcher = watcher
        self.reason = reason
