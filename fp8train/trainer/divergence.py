"""When training has diverged, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Callable

from fp8train.errors import DivergedError
from fp8train.optim import OptimConfig
from fp8train.trainer.progress import Progress
from fp8train.trainer.step import StepResult
from fp8train.units import finite

SHARE_WINDOW = 100  # steps that optim.max_nonfinite_share is of
TOLD = (3, 10, 20, 30, 40)  # skipped steps among them at which the console says so


def count_step(progress: Progress, result: StepResult, warn: Callable[[str], None]) -> None:
    """Take a step into the counts of skipped ones; `warn` takes a line as they become many."""
    step = progress.step
    progress.loss = finite(result.loss)
    progress.nonfinite_in_a_row = 0 if result.updated else progress.nonfinite_in_a_row + 1
    progress.recent_skips = [one for one in progress.recent_skips if one > step - SHARE_WINDOW]
    if len(progress.recent_skips) < progress.told_skips / 2:
        progress.told_skips = 0
    if result.updated:
        return
    progress.skipped_steps += 1
    progress.recent_skips.append(step)
    count = len(progress.recent_skips)
    if count in TOLD and count > progress.told_skips:
        progress.told_skips = count
        last = min(step, SHARE_WINDOW)
        warn(f"step {step}: {count} of the last {last} steps were skipped, since loss or gradient was not finite")


def check_diverged(progress: Progress, result: StepResult, limits: OptimConfig, *, fp8: bool) -> None:
    """End the run after so many steps that were not finite, in a row or of the last SHARE_WINDOW; the same decision on
    every rank.

    Args:
        progress, result: of the step that was made last.
        limits: max_nonfinite_steps and max_nonfinite_share are read.
        fp8: whether a linear of the model is not in BF16, for the remedy.

    Raises:
        DivergedError: with the first of those steps, and what is not finite.
    """
    row, recent = progress.nonfinite_in_a_row, progress.recent_skips
    if row >= limits.max_nonfinite_steps:
        count, first = f"{row} steps in a row", progress.step - row + 1
    elif not result.updated and len(recent) > limits.max_nonfinite_share * SHARE_WINDOW:
        count, first = f"{len(recent)} of the last {min(progress.step, SHARE_WINDOW)} steps", recent[0]
    else:
        return
    reason = f"loss is {result.loss}" if not math.isfinite(result.loss) else f"gradient norm is {result.grad_norm}"
    raise DivergedError(
        f"train: {count} had a loss or gradient norm that is not finite, up to step {progress.step} "
        f"(loss {result.loss}, norm {result.grad_norm}); needs finite ones. {remedy(fp8=fp8)}.",
        first,
        reason,
    )


def remedy(*, fp8: bool) -> str:
    """What may help a run that diverged; BF16 only where the run is not in it already."""
    return "Lower optim.lr, look at the data, or try recipe=bf16" if fp8 else "Lower optim.lr or look at the data"
