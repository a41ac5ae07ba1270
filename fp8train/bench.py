"""Time FP8 against BF16, interleaved in one process: `fp8train bench SUBJECT key=value ...`.

fp8train bench step model=quickstart recipe=blockwise rounds=20     one training step, against BF16 or baseline=unfused
fp8train bench linear rows=2048 in_features=1024 out_features=1024   forward and backward of one linear
fp8train bench gemm rows=[4096] gemms=[fprop]                        GEMMs alone, every backend that runs here
fp8train bench quantize cases=[both]                                 quantisers against a copy
fp8train bench telemetry model=quickstart                            a sampled step against a plain one
fp8train bench host                                                  time on the host of a converted linear
fp8train bench entries write=true                                    launch entries of our GEMMs on this very GPU

Benches that are started together take turns with lock=FILE: each computes while it holds the lock, and is ended if that
takes longer than limit_seconds=N.
"""

from __future__ import annotations

import fcntl
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from fp8train.arguments import take_arguments
from fp8train.distributed import World, init
from fp8train.errors import ConfigError, exit_code, nearest

SUBJECTS = ("step", "linear", "gemm", "quantize", "telemetry", "host", "entries")


def main(argv: Sequence[str]) -> int:
    """Time the subject that the first argument names and print a table.

    Returns:
        int: 0; 1 where a contestant's result was wrong.

    Raises:
        ConfigError: no such subject, or a value that does not fit.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    if argv[0] not in SUBJECTS:
        raise ConfigError(f"bench: got {argv[0]!r}; {nearest(argv[0], SUBJECTS)}.")
    run: Callable[[Sequence[str], World], int] = import_module(f"fp8train.benchmarks.{argv[0]}").run
    turn, rest = take_arguments(argv[1:], Turn)
    with _turn(turn), init(timeout_seconds=60.0) as world:
        return run(rest, world)


@dataclass(kw_only=True, slots=True)
class Turn:
    """When a bench may compute, and for how long.

    lock: file that it locks meanwhile; null: at once
    limit_seconds: after which it is ended by SIGALRM; null: none
    """

    lock: Path | None = None
    limit_seconds: int | None = None

    def __post_init__(self) -> None:
        if self.limit_seconds is not None and self.limit_seconds < 1:
            raise ConfigError(f"bench: limit_seconds is {self.limit_seconds}; needs at least 1, or null.")


@contextmanager
def _turn(turn: Turn) -> Iterator[None]:
    with ExitStack() as stack:
        if turn.lock is not None:
            try:
                file = stack.enter_context(turn.lock.open("a"))
            except OSError as error:
                raise ConfigError(f"bench: lock {turn.lock} cannot be opened: {error}. Name a file.") from error
            fcntl.flock(file, fcntl.LOCK_EX)
        signal.alarm(turn.limit_seconds or 0)
        stack.callback(signal.alarm, 0)
        yield


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
