"""Time FP8 against BF16, interleaved in one process: `fp8train bench SUBJECT key=value ...`.

fp8train bench step model=quickstart recipe=blockwise rounds=20     one training step, against BF16 or baseline=unfused
fp8train bench linear rows=2048 in_features=1024 out_features=1024   forward and backward of one linear
fp8train bench gemm rows=[4096] gemms=[fprop]                        GEMMs alone, every backend that runs here
fp8train bench quantize cases=[both]                                 quantisers against a copy
fp8train bench telemetry model=quickstart                            a sampled step against a plain one
fp8train bench host                                                  time on the host of a converted linear
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

from fp8train.arguments import nearest
from fp8train.distributed import World, init
from fp8train.errors import ConfigError, exit_code

SUBJECTS = ("step", "linear", "gemm", "quantize", "telemetry", "host")


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
    with init(timeout_seconds=60.0) as world:
        return run(argv[1:], world)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
