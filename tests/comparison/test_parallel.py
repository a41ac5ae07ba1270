"""Runs in processes of their own: what is said of one that ends without a result."""

from __future__ import annotations

import signal

import pytest

from fp8train.comparison.parallel import _ending


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (1, "ended with status 1. Its output says why."),
        (-signal.SIGKILL, "was ended by SIGKILL, which another process sent, e.g. the system for lack of memory"),
        (-signal.SIGSEGV, "crashed (SIGSEGV)."),
    ],
    ids=["status", "killed", "crash"],
)
def test_end_of_a_process_is_named_with_its_cause(code: int, words: str) -> None:
    assert _ending(code).startswith(words)
