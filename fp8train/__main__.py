"""`python -m fp8train NAME ...`, the same as the installed command `fp8train NAME ...`."""

from __future__ import annotations

from fp8train.cli import main
from fp8train.errors import exit_code


def run() -> int:
    """Entry point of the installed command; returns the exit status."""
    return exit_code(main)


if __name__ == "__main__":
    raise SystemExit(run())
