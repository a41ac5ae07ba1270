"""Runs that diverged in a comparison: what they make of the verdict, the numbers, the console and the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fp8train.errors import ConfigError
from fp8train.report import build_report
from fp8train.report.run_record import RunRecord, read_run
from fp8train.report.summary import summary
from tests.run_folders import verdict_of, words_of, write_diverged_run, write_run


def arms_of(folder: Path, diverged: dict[str, Sequence[int]], **options: Any) -> dict[str, dict[int, RunRecord]]:
    """Three seeds of BF16 and of blockwise, 0.01 % above it; those of `diverged` ended early."""
    arms: dict[str, dict[int, RunRecord]] = {"bf16": {}, "blockwise": {}}
    for seed in (1, 2, 3):
        for arm, runs in arms.items():
            facts = {"recipe": arm, "seed": seed, "init_hash": f"seed {seed}"}
            loss = 2.25 * (1 + 0.01 * seed) * (1.0001 if arm == "blockwise" else 1)
            path = folder / arm / f"seed_{seed}"
            if seed in diverged.get(arm, ()):
                runs[seed] = read_run(write_diverged_run(path, **facts, **options))
            else:
                runs[seed] = read_run(write_run(path, eval_loss=loss, **facts))
    return arms


@pytest.mark.parametrize(
    ("bf16", "blockwise", "status", "reason"),
    [
        ([], [2], "diverged", "BF16, with the same weights and tokens, did not diverge in seed 2"),
        ([], [1, 2, 3], "diverged", "did not diverge in seeds 1, 2, 3"),
        ([1], [1, 3], "diverged", "did not diverge in seed 3"),
        ([2], [2], "inconclusive", "since BF16 diverged too, the settings may be the cause"),
        ([1], [2], "inconclusive", "since BF16 diverged too"),
        ([2], [], "inconclusive", "since BF16 diverged, the settings may be the cause"),
        ([], [], "equivalent", "lies within"),
    ],
    ids=["arm once", "arm always", "arm more often", "same seed", "other seeds", "baseline alone", "none"],
)
def test_verdict_of_an_arm_that_diverged(
    tmp_path: Path, bf16: list[int], blockwise: list[int], status: str, reason: str
) -> None:
    verdict = verdict_of(arms_of(tmp_path, {"bf16": bf16, "blockwise": blockwise}))
    assert verdict["status"] == verdict["comparisons"]["blockwise"]["test"]["status"] == status
    assert reason in verdict["reason"]
    json.dumps(verdict, allow_nan=False)


def test_headline_counts_and_one_caveat_says_which_seed_diverged_at_which_step_and_for_what(tmp_path: Path) -> None:
    verdict = verdict_of(arms_of(tmp_path, {"blockwise": [2]}, skipped_steps=10))
    assert verdict["sentence"] == "FP8 blockwise diverged in 1 of 3 seeds, BF16 in none."
    of_arm = [line for line in verdict["caveats"] if "FP8 blockwise" in line]
    assert of_arm == ["FP8 blockwise: seed 2 diverged at step 17 (loss is nan)."], (
        "neither its count nor its steps again"
    )
    assert words_of(verdict).count("1 of 3 seeds") == 1
    (numbers,) = verdict["numbers"]
    assert (
        numbers.startswith("+0.01 % held-out loss (90 % interval") and "over the 2 seeds that both finished" in numbers
    )
    run = verdict["arms"]["blockwise"]["runs"][1]
    assert run["diverged"] == {"step": 17, "reason": "loss is nan"} and run["steps"] == 26


def test_numbers_are_of_the_seeds_that_both_finished(tmp_path: Path) -> None:
    some = verdict_of(arms_of(tmp_path / "some", {"bf16": [1], "blockwise": [2]}))["comparisons"]["blockwise"]
    assert (some["test"]["count"], some["test"]["gaps"]) == (1, [None, None, pytest.approx(0.01)])
    assert some["mean"]["heldout_gap"]["percent"] == pytest.approx(0.01)
    assert some["speed"]["raw"]["count"] == 1 and some["test"]["quantity"] == "held-out loss"
    for pair in some["seeds"][:2]:  # each has an evaluation on the way to its end, which is no result
        assert pair["heldout_gap"]["percent"] is None and pair["tokens_per_second_ratio"] is None
    none = verdict_of(arms_of(tmp_path / "none", {"blockwise": [1, 2, 3]}))["comparisons"]["blockwise"]
    assert none["mean"]["heldout_gap"]["percent"] is None and none["test"]["count"] == 0


@pytest.mark.parametrize("seeds", [[2], [1, 2, 3]], ids=["one", "all"])
def test_console_and_report_say_it(tmp_path: Path, seeds: list[int]) -> None:
    arms = arms_of(tmp_path, {"blockwise": seeds})
    verdict = verdict_of(arms)
    text, report = summary(verdict, arms), build_report(verdict, arms)
    words = f"FP8 blockwise diverged in {len(seeds)} of 3 seeds"
    assert f"\nDiverged: {words}, BF16 in none." in text and text.count("seed 2 diverged at step 17 (loss is nan)") == 1
    assert text.count("  diverged  ") >= 1 and "mean of 3 seeds, of those that did not diverge" in text
    assert words in report and ">Diverged<" in report and "Thin: runs that diverged" in report


def test_baseline_that_diverged_everywhere_still_gets_a_report(tmp_path: Path) -> None:
    arms = arms_of(tmp_path, {"bf16": [1, 2, 3], "blockwise": [1, 2, 3]}, step=1)
    verdict = verdict_of(arms)
    assert verdict["status"] == "inconclusive" and "BF16: seed 1 diverged at step 1 (" in summary(verdict, arms)
    assert "diverged in 3 of 3 seeds" in build_report(verdict, arms)


def test_run_that_diverged_on_larger_steps_is_refused(tmp_path: Path) -> None:
    arms = arms_of(tmp_path, {"blockwise": [2]})
    arms["blockwise"][2].train.columns["tokens_seen"] *= 2
    with pytest.raises(ConfigError, match="tokens a step differ: bf16 has 4,096, blockwise has 8,192"):
        verdict_of(arms)


def test_run_that_was_stopped_by_a_signal_is_no_run_that_diverged(tmp_path: Path) -> None:
    assert read_run(write_run(tmp_path / "run", finished=False, stopped_by="SIGTERM", diverged=None)).diverged is None
