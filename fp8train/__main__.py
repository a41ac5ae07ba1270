"""`python -m fp8train NAME ...`, the same as the installed command `fp8train NAME ...`."""

from __future__ import annotations

import sys

from fp8train.cli import COMMANDS, main
from fp8train.errors import exit_code


def run() -> int:
    """Entry point of the installed command; returns the exit status."""
    if not set(sys.argv[1:2]) & COMMANDS.keys():
        return exit_code(main)
    from fp8train.distributed import rank_exit_code  # imports torch, as commands do and help does not

    return rank_exit_code(main)


if __name__ == "__main__":
    raise SystemExit(run())
