"""When training has diverged, and what to do about it."""

from __future__ import annotations

import math

from fp8train.errors import DivergedError
from fp8train.trainer.progress import Progress
from fp8train.trainer.step import StepResult


def check_diverged(progress: Progress, result: StepResult, most_steps: int, *, fp8: bool) -> None:
    """End the run after so many steps in a row that were not finite; the same decision on every rank.

    Args:
        progress, result: of the step that was made last.
        most_steps: optim.max_nonfinite_steps.
        fp8: whether a linear of the model is not in BF16, for the remedy.

    Raises:
        DivergedError: with the first of those steps, and what is not finite.
    """
    count = progress.nonfinite_in_a_row
    if count < most_steps:
        return
    reason = f"loss is {result.loss}" if not math.isfinite(result.loss) else f"gradient norm is {result.grad_norm}"
    raise DivergedError(
        f"train: loss or gradient norm was not finite in {count} steps in a row, up to step {progress.step} "
        f"(loss {result.loss}, norm {result.grad_norm}); needs finite ones. {remedy(fp8=fp8)}.",
        progress.step - count + 1,
        reason,
    )


def remedy(*, fp8: bool) -> str:
    """What may help a run that diverged; BF16 only where the run is not in it already."""
    return "Lower optim.lr, look at the data, or try recipe=bf16" if fp8 else "Lower optim.lr or look at the data"
