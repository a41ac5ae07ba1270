"""Steps that are not finite: counted, told of, and too many of them end the run, in a row or not."""

from __future__ import annotations

import math

import pytest

from fp8train.errors import DivergedError
from fp8train.optim import OptimConfig
from fp8train.trainer.console import norm_text, progress_line
from fp8train.trainer.divergence import check_diverged, count_step
from fp8train.trainer.progress import Progress
from fp8train.trainer.step import StepResult


def fed(pattern: list[bool], **limits: float) -> tuple[Progress, list[str]]:
    """Progress after steps of which those with True were skipped."""
    progress, told = Progress(), list[str]()
    for skipped in pattern:
        progress.step += 1
        norm = math.nan if skipped else 1.0
        result = StepResult(loss=3.0, grad_norm=norm, valid_tokens=1, updated=not skipped, stop=False)
        count_step(progress, result, told.append)
        check_diverged(progress, result, OptimConfig(**limits), fp8=True)  # type: ignore[arg-type]
    return progress, told


def test_four_of_five_steps_end_the_run_although_never_ten_in_a_row() -> None:
    with pytest.raises(DivergedError, match=r"51 of the last 63 steps had a loss .*, up to step 63") as error:
        fed([n % 5 != 4 for n in range(100)])
    assert (error.value.step, error.value.reason) == (1, "gradient norm is nan")


def test_only_the_last_hundred_steps_count_and_the_share_is_the_users() -> None:
    every_other = [n % 2 == 0 for n in range(400)]
    progress, told = fed(every_other)  # 50 of 100 is not more than the half
    assert progress.skipped_steps == 200 and len(progress.recent_skips) == 50
    assert told[:2] == [
        f"step {step}: {count} of the last {step} steps were skipped, since loss or gradient was not finite"
        for step, count in ((5, 3), (19, 10))
    ]
    with pytest.raises(DivergedError, match="31 of the last 61 steps"):
        fed(every_other, max_nonfinite_share=0.3)


def test_the_same_share_of_skipped_steps_is_told_once_until_it_falls() -> None:
    _, told = fed([n % 40 == 0 for n in range(2000)])
    assert len(told) == 1
    _, told = fed([n % 40 == 0 and not 400 < n < 700 for n in range(1200)])
    assert len(told) == 2


def test_ten_in_a_row_end_it_as_before() -> None:
    with pytest.raises(DivergedError, match="10 steps in a row had a loss .*, up to step 15"):
        fed([False] * 5 + [True] * 10)


def test_the_line_of_a_step_says_that_it_was_skipped() -> None:
    row = {"step": 3, "loss": 4.108, "lr": 1e-3, "grad_norm": math.nan, "step_seconds": 0.1, "tokens_per_second": 100.0}
    assert "loss 4.108 (skipped) lr 1.0e-03 gnorm nan" in progress_line(row | {"skipped": True}, 10, None)
    assert "(skipped)" not in progress_line(row, 10, None)


@pytest.mark.parametrize(
    ("norm", "text"),
    [(0.81, "0.81"), (12.3456, "12.35"), (0.000412, "0.000412"), (351795168.0, "3.52e+08"), (0, "0.00")],
)
def test_a_norm_shows_its_digits(norm: float, text: str) -> None:
    assert norm_text(norm) == text
