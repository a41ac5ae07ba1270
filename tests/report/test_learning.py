"""A baseline that learned too little: no gap means anything, and every text says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fp8train.config_sections import LogConfig
from fp8train.report import build_report
from fp8train.report.comparable import LEAST_TIMED
from fp8train.report.learning import LEAST_FALL, LEAST_STEPS, learning
from fp8train.report.run_record import Arms, read_run
from fp8train.report.statistics import interval
from fp8train.report.summary import summary
from tests.run_folders import verdict_of, write_run

SKIPPED = LogConfig().skip_steps
GAPS = {"equivalent": [0.01, -0.02, 0.03], "inferior": [0.9, 1.0, 1.1], "superior": [-0.9, -1.0, -1.1]}


def measured(start: float | None, end: float | None, *, steps: int = 300, held_out: bool = True) -> dict[str, Any]:
    losses = {"eval_loss": end if held_out else None, "train_loss_ema": 9.0 if held_out else end}
    return {"first_train_loss": start, "first_eval_loss": None, **losses, "steps": steps, "tokens_seen": 1000 * steps}


def arms_of(folder: Path, gaps: list[float], *, start: float, steps: int = 40) -> Arms:
    """BF16 and blockwise, one seed for every gap in percent: losses fall from `start`, held out BF16 ends at 2.25."""
    arms: dict[str, dict[int, Any]] = {"bf16": {}, "blockwise": {}}
    for seed, gap in enumerate(gaps, start=1):
        for arm in arms:
            loss = 2.25 * (1 + gap / 100 * (arm == "blockwise"))
            losses = np.linspace(start, 2.25, steps)
            options = {"recipe": arm, "seed": seed, "init_hash": f"seed {seed}", "losses": losses, "eval_loss": loss}
            arms[arm][seed] = read_run(write_run(folder / arm / f"seed_{seed}", **options))
    return arms


def test_fall_and_margin_by_hand() -> None:
    found = learning("BF16", [measured(5.5, 2.0), measured(5.6, 2.2)], 0.25)
    fall = interval([3.5, 3.4])
    assert (found["start"], found["end"], found["fell"]) == pytest.approx((5.55, 2.1, 3.45))
    assert (found["low"], found["high"]) == pytest.approx((fall.low, fall.high))
    assert (found["margin"], found["needed"]) == pytest.approx((0.0025 * 2.1, 0.025 * 2.1))
    assert found["doubt"] is None and found["in_short"] is None
    assert found["scope"] == (
        "Over 300 steps (300,000 tokens) BF16's loss fell by 3.4500 nats per token, from 5.5500 at the first logged "
        "step (training loss) to 2.1000 at the end (held-out loss)."
    )


def test_what_was_held_out_is_compared_with_itself_where_it_was_scored_at_the_start() -> None:
    """Whether the first batch is harder than the held-out text is no matter of learning."""
    runs = [measured(2.8743, 2.6086) | {"first_eval_loss": 2.6087}, measured(2.9, 2.6) | {"first_eval_loss": 2.6001}]
    found = learning("BF16", runs, 0.25)
    assert found["fell"] == pytest.approx(0.0001) and found["doubt"] is not None
    assert "from 2.6044 before the first step to 2.6043 at the end (held-out loss)" in found["scope"]
    assert learning("BF16", [runs[0], measured(2.9, 2.6)], 0.25)["fell"] == pytest.approx(0.28285), "not of every run"


@pytest.mark.parametrize(
    ("margins", "enough"), [(1.01, True), (0.99, False), (0.0, False), (-1.0, False)], ids=["above", "below", "0", "up"]
)
def test_fall_of_one_run_is_held_against_ten_margins(margins: float, enough: bool) -> None:
    found = learning("BF16", [measured(2.0 + margins * LEAST_FALL * 0.005, 2.0)], 0.25)
    assert (found["doubt"] is None) == enough and found["low"] is None
    if not enough:
        moved = f"fell by only {found['fell']:.4f}" if margins >= 0 else f"rose by {-found['fell']:.4f}"
        assert found["doubt"].startswith(
            f"BF16's loss {moved} nats per token; it must fall by 0.0500, 10 times the margin"
        )
        assert found["doubt"].endswith("; train for more steps" if margins >= 0 else "; lower optim.lr")


def test_fall_that_varies_between_seeds_counts_by_its_lower_end() -> None:
    found = learning("BF16", [measured(start, 2.0) for start in (2.0, 2.1, 2.2)], 0.25)
    assert found["fell"] == pytest.approx(0.1) and found["fell"] > found["needed"] > found["low"]
    assert found["doubt"] is not None and "(90 % interval -0.0686 to +0.2686)" in found["in_short"]


@pytest.mark.parametrize("steps", [1, LEAST_STEPS - 1, LEAST_STEPS])
def test_few_steps_are_too_few_however_far_the_loss_fell(steps: int) -> None:
    found = learning("BF16", [measured(5.5, 2.0), measured(5.5, 2.1, steps=steps)], 0.25)
    assert found["steps"] == steps and (found["doubt"] is None) == (steps == LEAST_STEPS)
    if steps < LEAST_STEPS:
        assert f"a verdict needs {LEAST_STEPS}; train for more steps" in found["doubt"]


def test_without_evaluation_the_smoothed_training_loss_is_the_end() -> None:
    found = learning("BF16", [measured(5.5, 2.0, held_out=False)], 0.25)
    assert (found["end"], found["quantity"]) == (2.0, "smoothed training loss")


def test_baseline_without_a_finite_loss_learned_nothing_known() -> None:
    found = learning("BF16", [measured(5.5, 2.0), measured(None, 2.0)], 0.25)
    assert found["fell"] is None and found["doubt"] is not None and "not finite" in found["scope"]


@pytest.mark.parametrize("gaps", [*GAPS.values(), [0.01]], ids=[*GAPS, "one seed"])
def test_no_conclusion_from_a_baseline_that_learned_nothing(tmp_path: Path, gaps: list[float]) -> None:
    arms = arms_of(tmp_path, gaps, start=2.251)
    verdict = verdict_of(arms)
    test = verdict["comparisons"]["blockwise"]["test"]
    assert verdict["status"] == test["status"] == "undecided" and test["seeds_needed"] is None
    assert verdict["sentence"] == "This comparison cannot tell FP8 blockwise from BF16."
    assert verdict["numbers"][0].startswith(f"{test['mean']:+.2f} % held-out loss (")
    text = summary(verdict, arms)
    assert "\n- BF16's loss fell by only 0.0010 nats per token" in text and text.endswith(verdict["learning"]["scope"])
    report = build_report(verdict, arms)
    for words in ("equivalent to", "better than", "worse than BF16", "level with", "ended", "is equivalent, one"):
        assert words not in text and words not in report, words
    assert '<span class="status">Undecided</span>' in report and "BF16's loss fell by only 0.0010" in report
    json.dumps(verdict, allow_nan=False)


@pytest.mark.parametrize(("status", "gaps"), GAPS.items(), ids=GAPS)
def test_baseline_that_learned_gets_its_conclusion_with_its_scope(
    tmp_path: Path, status: str, gaps: list[float]
) -> None:
    arms = arms_of(tmp_path, gaps, start=5.5)
    verdict = verdict_of(arms)
    assert verdict["status"] == status and " over 3 seeds) after 40 steps, at " in verdict["numbers"][0]
    scope = "Over 40 steps (163,840 tokens) BF16's loss fell by 3.2500 nats per token, from 5.5000"
    assert scope in summary(verdict, arms) and scope in build_report(verdict, arms)


def test_seed_that_diverged_is_the_reason_even_where_nothing_was_learned(tmp_path: Path) -> None:
    arms = arms_of(tmp_path, [0.0, 0.01], start=2.251)
    arms["blockwise"][2].evals.columns["eval_loss"][-1] = np.nan  # type: ignore[index]
    verdict = verdict_of(arms)
    assert verdict["status"] == "diverged" and "did not diverge in seed 2" in verdict["reason"]


@pytest.mark.parametrize(
    ("steps", "quoted"), [(1, False), (SKIPPED + LEAST_TIMED - 1, False), (SKIPPED + LEAST_TIMED, True)]
)
def test_speed_of_a_few_steps_is_not_quoted(tmp_path: Path, steps: int, quoted: bool) -> None:
    arms = arms_of(tmp_path, [0.0, 0.0], start=5.5, steps=steps)
    verdict = verdict_of(arms)
    doubt = verdict["comparisons"]["blockwise"]["speed"]["not_quoted"]
    assert (doubt is None) == quoted == ("x BF16's tokens per second" in verdict["numbers"][0])
    if not quoted:
        timed = "0 logged steps" if steps == 1 else f"{LEAST_TIMED - 1} logged steps"
        assert doubt == f"BF16 was timed over {timed} after its first ones (log.skip_steps), fewer than {LEAST_TIMED}"
        assert doubt in summary(verdict, arms) and doubt in build_report(verdict, arms)
