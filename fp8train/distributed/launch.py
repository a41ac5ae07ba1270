"""The outermost frame of a command that torchrun may have started."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import cast

import torch.distributed as dist

from fp8train.distributed.world import read_rendezvous
from fp8train.errors import ConfigError, TrainingError, UserError, exit_code

Main = Callable[[Sequence[str]], int]

# torchrun takes the earliest error as the root cause, in whole seconds, and ends the other ranks within one.
YIELD_SECONDS = 3.0


def rank_exit_code(main: Main, argv: Sequence[str] | None = None) -> int:
    """errors.exit_code for a command that torchrun may have started.

    Under torchrun an error of any rank is also written where torchrun reads it, so that its report names the rank that
    failed first and shows its message; the one line on stderr comes from rank 0 only.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return exit_code(main, argv)
    from torch.distributed.elastic.multiprocessing.errors import record  # slow to import, wanted under torchrun only

    recorded = cast(Main, record(_yield_to_first_error(main)))
    if read_rendezvous(os.environ)[0] == 0:
        return exit_code(recorded, argv)
    try:
        return recorded(sys.argv[1:] if argv is None else argv)
    except (UserError, TrainingError) as error:
        time.sleep(YIELD_SECONDS)  # as soon as one rank ends torchrun ends the others, and rank 0 is to say why
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        return 130


def check_single(command: str) -> None:
    """Refuse several ranks in a command that has no part for each of them, where they would do and write all of it.

    Raises:
        ConfigError: torchrun started this process beside others.
    """
    ranks = read_rendezvous(os.environ)[1]
    if ranks > 1:
        raise ConfigError(
            f"{command}: got {ranks} ranks; needs one process. Leave torchrun out, and unset RANK and WORLD_SIZE."
        )


def _yield_to_first_error(main: Main) -> Main:
    """A rank whose peer has gone lets the peer's error be the first; its own is one line."""

    def run(argv: Sequence[str]) -> int:
        try:
            return main(argv)
        except RuntimeError as error:
            if not _peer_is_gone(error):
                raise
            time.sleep(YIELD_SECONDS)
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            late = "time" in reason.lower() and "out" in reason.lower()
            what = "has not come within parallel.timeout_seconds" if late else "is gone"
            remedy = "Its own error, if it has one, says why; raise the timeout if it is slow." if late else ""
            raise TrainingError(
                f"distributed: another rank {what}: {reason} {remedy or 'Its own error says why.'}"
            ) from error

    return run


def _peer_is_gone(error: RuntimeError) -> bool:
    """Whether a collective failed because of another rank; gloo raises a bare RuntimeError."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo" in str(error))
