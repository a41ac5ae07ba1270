"""Errors that a user can act on. Each message is one line: who, what was got, what is needed, the remedy."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Sequence


class UserError(Exception):
    """Something that the user can put right. Commands print its message on one line and exit with status 2."""


class ConfigError(UserError, ValueError):
    """A configuration value, file or argument that cannot be honoured."""


class RecipeError(ConfigError):
    """A recipe document that is malformed or does not fit the model."""


class DataError(ConfigError):
    """Training data that is missing, empty, damaged or does not fit the model."""


class CheckpointError(UserError):
    """A checkpoint or run folder that cannot be read or written."""


class BackendError(UserError, RuntimeError):
    """A backend that this machine cannot run."""


class TrainingError(RuntimeError):
    """Training that started and could not go on. Commands exit with status 1."""


class DivergedError(TrainingError):
    """Training whose loss or gradient norm is not finite any more; the same run would come to it again.

    step: the first of the steps in a row that were not finite. reason: what is not finite, as "loss is nan".
    """

    def __init__(self, message: str, step: int = 0, reason: str = "") -> None:
        super().__init__(message)
        self.step, self.reason = step, reason


def nearest(word: str, choices: Sequence[str]) -> str:
    """The choices most like `word`, ready to follow a semicolon: 'nearest: a, b' or 'choices: all of them'."""
    return _near(word, choices) or f"choices: {', '.join(choices)}"


def one_of(word: str, choices: Sequence[str]) -> str:
    """As `nearest`, where a few choices had better be seen whole: 'needs one of a, b, c; nearest: b'."""
    near = _near(word, choices)
    return f"needs one of {', '.join(choices)}" + (f"; {near}" if near else "")


def _near(word: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, choices, n=3, cutoff=0.5)
    return f"nearest: {', '.join(near)}" if near else ""


def exit_code(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Run a command's main(argv) and turn its errors into an exit status.

    Args:
        main: the command; returns 0, or 1 for a result that is bad but not an error.
        argv: arguments; None takes those of the process.

    Returns:
        int: main's own status; 2 for a UserError, 1 for a TrainingError (one line on stderr), 130 for Ctrl-C.
    """
    try:
        return main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        sys.stderr.write(f"fp8train: error: {_one_line(error)}\n")
        return 2
    except TrainingError as error:
        sys.stderr.write(f"fp8train: failed: {_one_line(error)}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("fp8train: interrupted\n")
        return 130


def printable(text: str) -> str:
    """Text for a terminal, with the control characters that names in files of others may hold written out."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: ascii(found[0])[1:-1], text)


def _one_line(error: Exception) -> str:
    return printable(" ".join(str(error).split()))
