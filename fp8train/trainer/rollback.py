"""The request to undo steps."""

from __future__ import annotations


class RollBack(Exception):
    """What after_step raises, on every rank alike, to go back to the last checkpoint of the run.

    Args:
        reason: for the console.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
