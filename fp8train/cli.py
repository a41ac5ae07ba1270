"""The command `fp8train NAME ...`: finds fp8train/NAME.py and runs it; nothing else is imported: --help is quick."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import fp8train
from fp8train.errors import ConfigError, nearest

COMMANDS = {
    "train": "train a model; resumes by itself",
    "compare": "train in BF16 and in FP8, same weights and data, and report the difference",
    "explain": "show the precision of every GEMM of every linear, and the rule that decided it",
    "prepare": "tokenise text into shards that training maps from disk",
    "eval": "score a checkpoint on held-out text: nats, bits per byte, perplexity",
    "generate": "print sample text from a checkpoint",
    "export": "write a checkpoint as a Hugging Face folder",
    "doctor": "examine a model and its configuration: what must not change is changed, and compared",
    "sensitivity": "measure what FP8 does to the loss and gradients, one GEMM of one linear at a time",
    "search": "write a recipe that keeps the most sensitive linears in BF16",
    "replay": "run the step that went wrong again in FP8, BF16 and FP32, and name the cause",
    "bench": "measure speed and memory, interleaved, with spread",
}


def main(argv: Sequence[str]) -> int:
    """Run one command.

    Args:
        argv: its name, then its arguments; none, -h or --help lists the commands.

    Raises:
        ConfigError: no command of that name; the nearest is named.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        sys.stdout.write(_usage())
        return 0
    if argv[0] == "--version":
        sys.stdout.write(f"fp8train {fp8train.__version__}\n")
        return 0
    name, *arguments = argv
    if name not in COMMANDS:
        raise ConfigError(
            f"unknown command {name!r}; {nearest(name, list(COMMANDS))}. `fp8train --help` describes them."
        )
    return importlib.import_module(f"fp8train.{name}").main(arguments)


def _usage() -> str:
    lines = ["usage: fp8train COMMAND [key=value ...]", "", "commands:"]
    lines += [f"  {name:11s} {purpose}" for name, purpose in COMMANDS.items()]
    lines += [
        "",
        "`fp8train COMMAND --help` lists the keys of a command; `python -m fp8train.COMMAND` is the same command.",
    ]
    return "\n".join(lines) + "\n"
