"""The verdict: numbers worked out by hand, refusals of what cannot be compared, and never more than one seed can
say.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fp8train.errors import ConfigError
from fp8train.report import build_report
from fp8train.report.comparable import SHARED_FACTS, check_comparable
from fp8train.report.conclusion import interval_text
from fp8train.report.run_record import Arms, RunRecord, Table, read_run
from fp8train.report.statistics import seeds_needed
from fp8train.report.summary import summary
from fp8train.report.trajectory import ema, heldout_gap, relative_loss_error
from fp8train.report.verdict import measures
from tests.run_folders import ENVIRONMENT, FACTS, verdict_of, words_of, write_run

STEPS = 40
LOSSES = 2.2 + 3.3 * np.exp(-np.arange(STEPS) / 12)


def table(steps: list[int], **columns: list[float]) -> Table:
    return Table(steps=np.array(steps), columns={name: np.array(values) for name, values in columns.items()})


def pair(tmp_path: Path, **changes: Any) -> Arms:
    """A BF16 run and a blockwise run that is 1 % above it at every step, and 0.01 nats above it held out."""
    options = {"recipe": "blockwise", "losses": LOSSES * 1.01, "eval_loss": 2.26, "tokens_per_second": 30_000.0}
    bf16 = write_run(tmp_path / "bf16", losses=LOSSES, eval_loss=2.25)
    fp8 = write_run(tmp_path / "fp8", **(options | {"memory_bytes": 1.05e9} | changes))
    return {"bf16": {1: read_run(bf16)}, "blockwise": {1: read_run(fp8)}}


def test_ema_by_hand_and_over_a_gap() -> None:
    values = np.array([1.0, 2.0, math.nan, 3.0])
    assert ema(values).tolist() == pytest.approx([1.0, 1.1, 1.1, 1.29])
    assert math.isnan(ema(np.array([math.nan, 1.0]))[0])


def test_relative_loss_error_by_hand() -> None:
    base = table([1, 2, 3], loss=[4.0, 2.0, 2.0])
    other = table([1, 2, 3], loss=[4.0, 2.2, 1.9])
    smooth_base, smooth_other = [4.0, 3.8, 3.62], [4.0, 3.82, 3.628]
    error = relative_loss_error(base, other)
    assert error["final_percent"] == pytest.approx(-5.0)
    assert error["ema_final_percent"] == pytest.approx(100 * (smooth_other[2] / smooth_base[2] - 1))
    assert error["ema_max_percent"] == pytest.approx(100 * (smooth_other[1] / smooth_base[1] - 1))
    assert (error["ema_max_step"], error["steps"]) == (2, 3)


def test_largest_error_is_a_magnitude() -> None:
    error = relative_loss_error(table([1, 2], loss=[2.0, 2.0]), table([1, 2], loss=[1.0, 2.0]))
    assert error["ema_max_percent"] == pytest.approx(50.0) and error["ema_final_percent"] < 0


def test_only_steps_that_both_logged_are_paired() -> None:
    error = relative_loss_error(table([1, 2, 3], loss=[2.0, math.nan, 2.0]), table([1, 2, 4], loss=[2.0, 9.0, 9.0]))
    assert error["steps"] == 1 and error["final_percent"] == 0.0


def test_heldout_gap_is_that_of_the_last_common_evaluation() -> None:
    base = table([10, 20], eval_loss=[3.0, 2.0], bits_per_byte=[4.0, 3.0])
    other = table([10, 20, 30], eval_loss=[3.0, 2.1, 1.0], bits_per_byte=[4.0, 3.2, 1.0])
    gap = heldout_gap(base, other)
    assert gap == {
        "step": 20,
        "nats": pytest.approx(0.1),
        "percent": pytest.approx(5.0),
        "bits_per_byte": pytest.approx(0.2),
    }


@pytest.mark.parametrize(("log", "kept"), [({}, 35), ({"log": {"skip_steps": 2}}, 38)], ids=["default", "as set"])
def test_first_steps_of_every_process_are_left_out_of_the_speed(tmp_path: Path, log: dict[str, Any], kept: int) -> None:
    run = read_run(write_run(tmp_path / "run"))
    run.config |= log
    values = run.train.columns["tokens_per_second"]
    assert measures(run)["timed_steps"] == kept and measures(run)["tokens_per_second"] == np.median(values[-kept:])
    run.train.columns["process_step"] = np.append(np.arange(1.0, 31.0), np.arange(1.0, 11.0))  # resumed at step 30
    first = STEPS - kept
    values[[*range(first), *range(30, 30 + first)]] = 1.0  # slow starts
    assert measures(run)["timed_steps"] == STEPS - 2 * first and measures(run)["tokens_per_second_p10"] > 1e4


def test_verdict_of_a_known_pair(tmp_path: Path) -> None:
    verdict = verdict_of(pair(tmp_path))
    comparison = verdict["comparisons"]["blockwise"]
    assert comparison["mean"] == {key: value for key, value in comparison["mean"].items() if value is not None}
    error, gap = comparison["mean"]["relative_loss_error"], comparison["mean"]["heldout_gap"]
    assert (error["final_percent"], error["ema_final_percent"], error["ema_max_percent"]) == pytest.approx((1, 1, 1))
    assert gap["nats"] == pytest.approx(0.01) and gap["percent"] == pytest.approx(100 * 0.01 / 2.25)
    assert gap["bits_per_byte"] == pytest.approx(0.01 / math.log(2))
    assert comparison["mean"]["tokens_per_second_ratio"] == pytest.approx(0.75, rel=0.02)  # 2 % noise on each step
    assert comparison["mean"]["peak_memory_ratio"] == pytest.approx(0.75)
    run = verdict["arms"]["blockwise"]["runs"][0]
    assert (run["eval_loss"], run["eval_loss_bf16"], run["steps"]) == (2.26, pytest.approx(2.259), STEPS)
    assert run["train_loss"] == pytest.approx(LOSSES[-1] * 1.01) and run["peak_memory_bytes"] == 1.05e9
    assert 0.9 < run["fp8_flops_share"] < 1 and verdict["arms"]["bf16"]["runs"][0]["fp8_flops_share"] == 0


@pytest.mark.parametrize("gap", [0.0, 0.5, -0.5], ids=["none", "worse", "better"])
def test_one_seed_is_indicative_and_never_more(tmp_path: Path, gap: float) -> None:
    verdict = verdict_of(pair(tmp_path, losses=LOSSES, eval_loss=2.25 + gap))
    assert verdict["status"] == "indicative" and "one seed" in verdict["reason"]


def test_sentence_says_gap_losses_speed_and_memory(tmp_path: Path) -> None:
    verdict = verdict_of(pair(tmp_path))
    (text,) = verdict["numbers"]
    assert verdict["sentence"] == "FP8 blockwise ended 0.44 % above BF16, in one seed."
    assert text.startswith("+0.44 % held-out loss (2.2600 against 2.2500 nats per token) after 40 steps, at 0.7")
    assert text.endswith("x BF16's tokens per second and 0.75x its peak memory.")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"speed_spread": 1.5, "tokens_per_second": 1e6}, r"FP8 blockwise's steps varied 16x"),
        (
            {"speed_spread": 0.15, "tokens_per_second": 42e3},
            r"FP8 blockwise's steps varied 1\.\d+x, more than the arms",
        ),
        ({"speed_spread": 0.15, "tokens_per_second": 80e3}, None),
        ({"speed_spread": 0.02, "tokens_per_second": 40e3}, None),
    ],
    ids=["busy machine", "overlap", "apart", "equally fast"],
)
def test_speed_that_steps_do_not_bear_out_is_not_quoted(
    tmp_path: Path, change: dict[str, float], reason: str | None
) -> None:
    arms = pair(tmp_path, **change)
    verdict = verdict_of(arms)
    speed, text = verdict["comparisons"]["blockwise"]["speed"], summary(verdict, arms) + build_report(verdict, arms)
    assert speed["raw"]["mean"] > 0 and speed["time_to_loss"]["mean"] > 0, "the figures are kept"
    assert (speed["not_quoted"] is None) == (reason is None) == ("BF16's tokens per second" in verdict["numbers"][0])
    if reason is not None:
        words = rf"at 0.75x BF16's peak memory\. .*Speed not comparable: {reason}"
        assert re.search(words, words_of(verdict)) and re.search(reason, speed["not_quoted"])
        for key in ("raw", "time_to_loss"):
            ratio = f"{speed[key]['mean']:.2f}"
            assert f"{ratio}x" not in text and f"{ratio}\u00d7" not in text, (
                "in neither the console's text nor the report"
            )
    assert ("not comparable" in text) == (reason is not None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"torch_threads": 2}, "threads of torch BF16 1, FP8 blockwise 2"),
        ({"device": {"name": "GPU"}}, "device BF16 CPU, 2 cores, FP8 blockwise GPU"),
        ({"host": "b", "torch": "2.14.0"}, "host BF16 a, FP8 blockwise b; torch BF16 2.13.0, FP8 blockwise 2.14.0"),
        ({"world_size": 2}, "ranks BF16 1, FP8 blockwise 2"),
    ],
    ids=["threads", "device", "host and torch", "ranks"],
)
def test_speed_of_arms_on_unlike_machines_is_not_quoted(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    both = ENVIRONMENT | {"torch_threads": 1, "host": "a", "world_size": 1}
    base = read_run(write_run(tmp_path / "bf16", environment=both))
    other = read_run(write_run(tmp_path / "fp8", recipe="blockwise", environment=both | change))
    verdict = verdict_of(arms := {"bf16": {1: base}, "blockwise": {1: other}})
    reason = f"the arms ran on other machines or software, {words}"
    assert verdict["comparisons"]["blockwise"]["speed"]["not_quoted"] == reason
    what = "speed and memory" if change.keys() & {"device", "world_size"} else "speed"
    assert f"{what.capitalize()} not comparable: {reason}." in verdict["caveats"]
    report = build_report(verdict, arms)
    assert "the environment differs in" in report and "so is the environment" not in report
    for key in change:
        assert re.search(rf"the environment differs in .*{key}[.a-z]* \(bf16: .*, blockwise: ", report), key


def test_date_and_command_do_not_tell_machines_apart(tmp_path: Path) -> None:
    base = read_run(write_run(tmp_path / "bf16"))
    environment = ENVIRONMENT | {"date": "2025-11-21", "command": ["fp8train", "compare"], "torch_threads": None}
    other = read_run(write_run(tmp_path / "fp8", recipe="blockwise", environment=environment))
    verdict = verdict_of(arms := {"bf16": {1: base}, "blockwise": {1: other}})
    assert verdict["comparisons"]["blockwise"]["speed"]["not_quoted"] is None
    assert "Every other key is the same, and so is the environment." in build_report(verdict, arms)


@pytest.mark.parametrize(
    ("eval_loss", "words"),
    [(2.24, "0.44 % below BF16"), (2.25, "level with BF16")],
    ids=["better", "equal"],
)
def test_sentence_gives_the_direction(tmp_path: Path, eval_loss: float, words: str) -> None:
    assert words in verdict_of(pair(tmp_path, eval_loss=eval_loss))["sentence"]


def test_diverged_arm_is_said_and_stays_strict_json(tmp_path: Path) -> None:
    losses = LOSSES.copy()
    losses[3:] = np.nan
    verdict = verdict_of(pair(tmp_path, losses=losses, eval_loss=math.nan))
    json.dumps(verdict, allow_nan=False)
    run = verdict["arms"]["blockwise"]["runs"][0]
    assert run["nonfinite_losses"] == STEPS - 3 and run["train_loss"] is None and run["eval_loss"] is None
    assert verdict["comparisons"]["blockwise"]["mean"]["heldout_gap"]["nats"] is None
    assert verdict["sentence"] == "FP8 blockwise diverged in 1 of 1 seed, BF16 in none."
    assert "FP8 blockwise: seed 1 diverged at step 40 (held-out loss is not finite)." in verdict["caveats"]


def test_arm_that_never_had_a_finite_loss_cannot_be_held_against_the_other(tmp_path: Path) -> None:
    arms = pair(tmp_path, losses=np.full(STEPS, np.nan), eval_loss=math.nan)
    verdict = verdict_of(arms)
    assert verdict["sentence"] == "FP8 blockwise diverged in 1 of 1 seed, BF16 in none."
    assert "FP8 blockwise: seed 1 diverged at step 40 (held-out loss is not finite)." in verdict["caveats"]


@pytest.mark.parametrize(
    ("percent", "sentence"),
    [
        ([1.0], "FP8 blockwise ended 1.00 % above BF16 in training loss, in one seed."),
        ([0.1, 0.11], "FP8 blockwise is equivalent to BF16 within 0.25 % in training loss."),
        ([1.0, 1.1], "FP8 blockwise is worse than BF16 by more than 0.25 % in training loss."),
        ([-1.0, -1.1], "FP8 blockwise is better than BF16 by more than 0.25 % in training loss."),
        ([1.0, -1.0], "Whether FP8 blockwise matches BF16 within 0.25 % in training loss is open."),
    ],
    ids=["one seed", "equal", "worse", "better", "open"],
)
def test_without_evaluation_the_training_loss_is_compared_and_named(
    tmp_path: Path, percent: list[float], sentence: str
) -> None:
    arms: dict[str, dict[int, RunRecord]] = {"bf16": {}, "blockwise": {}}
    for seed, above in enumerate(percent, start=1):
        for arm, runs in pair(tmp_path / str(seed), losses=LOSSES * (1 + above / 100)).items():
            arms[arm][seed] = dataclasses.replace(runs[1], evals=runs[1].evals.empty())
    verdict = verdict_of(arms)
    assert verdict["sentence"] == sentence
    assert verdict["numbers"][0].startswith(
        f"{np.mean(percent):+.2f} % smoothed training loss (".replace("+0.00", "0.00")
    )


@pytest.mark.parametrize("fact", SHARED_FACTS)
def test_runs_that_differ_in_a_shared_fact_are_refused(tmp_path: Path, fact: str) -> None:
    other = 999 if fact == "tokens_seen" else "x" * 16
    with pytest.raises(ConfigError, match=f"compare: {SHARED_FACTS[fact]} differs: bf16 has .*, blockwise has"):
        verdict_of(pair(tmp_path, **{fact: other}))


def test_run_that_does_not_say_a_shared_fact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not say its initial weights"):
        verdict_of(pair(tmp_path, init_hash=None))


def test_comparable_runs_give_their_shared_facts(tmp_path: Path) -> None:
    runs: dict[str, RunRecord] = {arm: seeds[1] for arm, seeds in pair(tmp_path).items()}
    assert check_comparable(runs) == {**FACTS, "tokens_seen": STEPS * 4096}


def seeds_of(folder: Path, gaps: dict[str, list[float]], **changes: Any) -> dict[str, dict[int, RunRecord]]:
    """BF16 and further arms, each with a held-out gap in percent for every seed; `changes` are those of blockwise."""
    count = len(next(iter(gaps.values())))
    arms: dict[str, dict[int, RunRecord]] = {"bf16": {}} | {arm: {} for arm in gaps}
    for seed in range(1, count + 1):
        for arm in arms:
            loss = 2.25 * (1 + 0.01 * seed) * (1 + (gaps[arm][seed - 1] if arm in gaps else 0) / 100)
            options = changes if arm == "blockwise" else {}
            options = {"recipe": arm, "eval_loss": loss, "seed": seed, "init_hash": f"seed {seed}"} | options
            arms[arm][seed] = read_run(write_run(folder / arm / f"seed_{seed}", **options))
    return arms


@pytest.mark.parametrize(
    ("gaps", "status", "words"),
    [
        (
            [0.01, -0.02, 0.03],
            "equivalent",
            "FP8 blockwise is equivalent to BF16 within 0.25 %.",
        ),
        ([0.9, 1.0, 1.1], "inferior", "FP8 blockwise is worse than BF16 by more than 0.25 %."),
        ([-0.9, -1.0, -1.1], "superior", "FP8 blockwise is better than BF16 by more than 0.25 %."),
        ([0.3, -0.2, 0.1], "inconclusive", "Whether FP8 blockwise matches BF16 within 0.25 % is open."),
    ],
    ids=["equal", "worse", "better", "open"],
)
def test_several_seeds_are_tested_together(tmp_path: Path, gaps: list[float], status: str, words: str) -> None:
    verdict = verdict_of(seeds_of(tmp_path, {"blockwise": gaps}))
    test = verdict["comparisons"]["blockwise"]["test"]
    assert (verdict["status"], test["status"], test["gaps"]) == (status, status, pytest.approx(gaps))
    assert verdict["sentence"] == words and len(words.split()) <= 12 and "over 3 seeds)" in verdict["numbers"][0]
    assert verdict["numbers"][0].startswith(f"{np.mean(gaps):+.2f} % held-out loss (90 % interval ")
    assert (test["mean"], test["sd"]) == pytest.approx((np.mean(gaps), np.std(gaps, ddof=1)))
    json.dumps(verdict, allow_nan=False)


def test_undecided_comparison_says_how_many_more_seeds(tmp_path: Path) -> None:
    verdict = verdict_of(seeds_of(tmp_path, {"blockwise": [0.3, -0.2, 0.1]}))
    test = verdict["comparisons"]["blockwise"]["test"]
    assert test["seeds_needed_if_equal"] == seeds_needed(0.0, test["sd"], 0.25)
    assert test["seeds_needed"] == seeds_needed(test["mean"], test["sd"], 0.25) > test["seeds_needed_if_equal"]
    assert f"about {test['seeds_needed_if_equal'] - 3} more seeds would decide it" in verdict["reason"]


def test_placebo_stands_beside_the_verdict_and_is_not_the_verdict(tmp_path: Path) -> None:
    gaps = {"placebo": [0.1, -0.1, 0.3], "blockwise": [0.2, 0.1, 0.3]}
    verdict = verdict_of(seeds_of(tmp_path, gaps))
    assert (verdict["placebo"], verdict["primary"]) == ("placebo", "blockwise")
    assert verdict["arms"]["placebo"]["noise"] == 0.0265 and verdict["arms"]["placebo"]["label"] == "placebo"
    beside = verdict["comparisons"]["blockwise"]["against_placebo"]
    assert beside["mean"] == pytest.approx(np.mean([0.1, 0.2, 0.0])) and beside["low"] < beside["high"]
    placebo = verdict["comparisons"]["placebo"]
    assert placebo["against_placebo"] is None
    said = f"Of the placebo, which shows chance alone, the interval is {interval_text(placebo['test'])}."
    assert said in verdict["caveats"] and "placebo" not in verdict["sentence"] + verdict["numbers"][0]


@pytest.mark.parametrize(
    ("other", "status", "reason"),
    [([0.02, 0.0, 0.01], "equivalent", "lies within"), ([0.9, 1.0, 1.1], "mixed", "rowwise: the 90 % interval of the")],
    ids=["alike", "unlike"],
)
def test_status_of_several_arms_is_that_of_all_of_them(
    tmp_path: Path, other: list[float], status: str, reason: str
) -> None:
    verdict = verdict_of(seeds_of(tmp_path, {"blockwise": [0.01, -0.02, 0.03], "rowwise": other}))
    assert verdict["comparisons"]["blockwise"]["test"]["status"] == "equivalent"
    assert verdict["status"] == status and reason in verdict["reason"]


def test_seed_that_diverged_leaves_nothing_equivalent(tmp_path: Path) -> None:
    arms = seeds_of(tmp_path, {"blockwise": [0.0, 0.01, -0.01]})
    arms["blockwise"][2] = read_run(
        write_run(tmp_path / "diverged", recipe="blockwise", eval_loss=math.nan, init_hash="seed 2")
    )
    verdict = verdict_of(arms)
    assert verdict["status"] == "diverged"
    assert verdict["reason"] == "BF16, with the same weights and tokens, did not diverge in seed 2"
    assert re.search(r"^0\.00 % held-out loss \(90 % .* over the 2 seeds that both finished\)", verdict["numbers"][0])


def test_time_to_loss_charges_speed_with_the_tokens_that_the_arm_needs_more(tmp_path: Path) -> None:
    arms = pair(tmp_path, losses=LOSSES, tokens_per_second=80_000.0)
    found = verdict_of(arms)["comparisons"]["blockwise"]
    assert found["seeds"][0]["tokens_to_loss"]["common"]["ratio"] == 1.0
    assert found["mean"]["time_to_loss_ratio"] == found["mean"]["tokens_per_second_ratio"]
    assert found["speed"]["raw"]["mean"] == pytest.approx(2.0, rel=0.02) and found["speed"]["raw"]["low"] is None
    slower = pair(tmp_path / "slower", losses=LOSSES * 1.05, tokens_per_second=80_000.0)
    found = verdict_of(slower)["comparisons"]["blockwise"]["seeds"][0]
    ratio = found["tokens_to_loss"]["common"]["ratio"]
    assert ratio > 1.05 and found["time_to_loss_ratio"] == pytest.approx(found["tokens_per_second_ratio"] / ratio)


def test_speed_has_an_interval_across_seeds(tmp_path: Path) -> None:
    arms = seeds_of(tmp_path, {"blockwise": [0.0, 0.0, 0.0]}, tokens_per_second=30_000.0)
    raw = verdict_of(arms)["comparisons"]["blockwise"]["speed"]["raw"]
    assert raw["mean"] == pytest.approx(0.75, rel=0.02) and raw["low"] <= raw["mean"] <= raw["high"]
    assert raw["confidence"] == 0.95


def test_two_by_two_table_separates_weights_from_arithmetic(tmp_path: Path) -> None:
    arms = pair(tmp_path, eval_loss=2.26)
    crossed = {"blockwise": {1: {"baseline_weights": 2.2575}}}
    table = verdict_of(arms, crossed=crossed)["comparisons"]["blockwise"]["seeds"][0]["crossed"]
    assert (table["baseline_in_baseline"], table["arm_in_arm"]) == (2.25, 2.26)
    assert table["weights_nats"] == pytest.approx(2.259 - 2.25), "the fake evaluates FP8 weights in BF16 as 0.001 lower"
    assert table["arithmetic_nats"] == pytest.approx(0.0075)
    without = verdict_of(arms)["comparisons"]["blockwise"]["seeds"][0]["crossed"]
    assert without["arithmetic_nats"] is None and without["weights_nats"] is not None


def test_measures_of_a_run_without_result_or_coverage_are_none(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for name in ("result.json", "coverage.json"):
        (folder / name).unlink()
    run = measures(read_run(folder))
    assert run["peak_memory_bytes"] is None and run["fp8_flops_share"] is None and run["eval_loss"] == 2.25
