"""What a comparison must not say: precision blamed for other settings, speed of runs that shared a machine, steps that
were only logged, noise that is no placebo's, curves over steps without a loss.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from fp8train.config import RunConfig, config_to_dict
from fp8train.errors import ConfigError
from fp8train.report import build_report
from fp8train.report.results import drawn
from fp8train.report.run_record import Arms, read_run
from fp8train.report.summary import summary
from tests.run_folders import ENVIRONMENT, verdict_of, words_of, write_run


def edited(path: Path, name: str, **changes: object) -> Path:
    """A run folder with other values in one of its files."""
    file = path / name
    content = yaml.safe_load(file.read_text()) | changes
    file.write_text(yaml.safe_dump(content) if file.suffix == ".yaml" else json.dumps(content))
    return path


def arms_of(folder: Path, **changes: object) -> Arms:
    """A BF16 run, and a blockwise run with changes to its configuration."""
    fp8 = edited(write_run(folder / "fp8", recipe="blockwise"), "config.yaml", **changes)
    return {"bf16": {1: read_run(write_run(folder / "bf16"))}, "blockwise": {1: read_run(fp8)}}


def test_runs_with_another_learning_rate_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"optim.lr differs: bf16 has 0.001, blockwise has 0.0001; needs the same"):
        verdict_of(arms_of(tmp_path, optim={"lr": 1e-4}))


def test_a_run_whose_first_steps_had_another_is_refused(tmp_path: Path) -> None:
    arms = arms_of(tmp_path)
    early = edited(tmp_path / "fp8", "config.yaml", optim={"lr": 5e-3}) / "config.yaml"
    early.rename(tmp_path / "fp8" / "config.until_step_30.yaml")
    (tmp_path / "fp8" / "config.yaml").write_text((tmp_path / "bf16" / "config.yaml").read_text())
    assert sorted(read_run(tmp_path / "fp8").optimizers) == [30, float("inf")]
    arms = {"bf16": arms["bf16"], "blockwise": {1: read_run(tmp_path / "fp8")}}
    with pytest.raises(ConfigError, match=r"optim.lr differs until step 30: bf16 has 0.001, blockwise has 0.005"):
        verdict_of(arms)


def test_a_key_that_one_does_not_know_counts_as_the_same(tmp_path: Path) -> None:
    assert verdict_of(arms_of(tmp_path, optim={"lr": 1e-3, "new": 1}))["status"] == "indicative"


def test_keys_of_every_seed_are_compared(tmp_path: Path) -> None:
    arms = {
        arm: {seed: read_run(write_run(tmp_path / f"{arm}{seed}", recipe=arm, seed=seed)) for seed in (1, 2)}
        for arm in ("bf16", "blockwise")
    }
    arms["blockwise"][2] = read_run(edited(tmp_path / "blockwise2", "config.yaml", compile=True))
    report = build_report(verdict_of(arms), arms)
    table = report.partition("What differs between the arms")[2].partition("</table>")[0]
    assert "compile" in table and "true" in table.lower() and "seed" not in table.lower().partition("</thead>")[2]


def test_speed_of_runs_that_shared_a_device_is_not_quoted(tmp_path: Path) -> None:
    shared, alone = (ENVIRONMENT | {"runs_on_device": number} for number in (2, 1))
    for number, (base, other) in enumerate([(shared, shared), (alone, shared), (alone, alone)]):
        arms = {
            "bf16": {1: read_run(write_run(tmp_path / f"bf16-{number}", environment=base))},
            "blockwise": {1: read_run(write_run(tmp_path / f"fp8-{number}", recipe="blockwise", environment=other))},
        }
        verdict = verdict_of(arms, parallel=1)
        report, doubt = build_report(verdict, arms), verdict["comparisons"]["blockwise"]["speed"]["not_quoted"]
        assert (doubt is None) == (number == 2) == ("of the comparison shared their device" not in report)
        assert ("up to 1 beside each" in report) == (number != 2) == ("Loss over time" not in report)


def test_speed_of_two_versions_of_the_program_is_not_quoted(tmp_path: Path) -> None:
    old, new = (ENVIRONMENT | {"git_commit": letter * 40} for letter in "ab")
    bf16 = write_run(tmp_path / "bf16", environment=old)
    for number, (other, doubted) in enumerate([(new, True), (old, False), (ENVIRONMENT | {"git_commit": None}, False)]):
        fp8 = write_run(tmp_path / f"fp8-{number}", recipe="blockwise", environment=other)
        verdict = verdict_of({"bf16": {1: read_run(bf16)}, "blockwise": {1: read_run(fp8)}})
        words = "commit of fp8train BF16 aaaaaaaaaaaa, FP8 blockwise bbbbbbbbbbbb"
        assert (words in words_of(verdict)) == doubted


@pytest.mark.parametrize(
    ("change", "words", "memory_too"),
    [
        ({"parallel": {"strategy": "fsdp"}}, "parallel BF16 ddp, FP8 blockwise fsdp", True),
        ({"compile": True}, "compile BF16 False, FP8 blockwise True", True),
        ({"activation_checkpointing": "full"}, "activation_checkpointing BF16 none, FP8 blockwise full", True),
        ({"micro_batch_samples": 2}, "micro-batch BF16 8, FP8 blockwise 2", True),
        ({"weight_copies": "one"}, "weight_copies BF16 both, FP8 blockwise one", True),
        ({"fused": "never"}, "fused BF16 auto, FP8 blockwise never", False),
        ({"backend": "reference"}, "backend BF16 auto, FP8 blockwise reference", False),
        ({"deterministic": True}, "deterministic BF16 False, FP8 blockwise True", False),
        ({"log": {"skip_steps": 2}}, "log.skip_steps BF16 5, FP8 blockwise 2", False),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_speed_and_memory_of_arms_that_were_run_in_other_ways_are_not_quoted(
    tmp_path: Path, change: dict, words: str, memory_too: bool
) -> None:
    way = config_to_dict(RunConfig())  # 8 sequences a step
    del way["optim"], way["model"]
    folders = [write_run(tmp_path / recipe, recipe=recipe) for recipe in ("bf16", "blockwise")]
    for folder in folders:
        edited(folder, "config.yaml", **way)
    alike = {folder.name: {1: read_run(folder)} for folder in folders}
    assert "its peak memory." in verdict_of(alike)["numbers"][0]
    edited(folders[1], "config.yaml", **change)
    arms = {folder.name: {1: read_run(folder)} for folder in folders}
    verdict = verdict_of(arms)
    comparison, reason = verdict["comparisons"]["blockwise"], f"the arms ran in other ways, {words}"
    assert comparison["speed"]["not_quoted"] == reason
    assert comparison["memory"]["not_quoted"] == (reason if memory_too else None)
    what = "speed and memory" if memory_too else "speed"
    assert f"{what.capitalize()} not comparable: {reason}" in words_of(verdict)
    report, text = build_report(verdict, arms), summary(verdict, arms)
    assert reason in report
    assert ("(1.00x)" in text.partition("peak memory")[2]) != memory_too


def test_speed_of_a_run_that_changed_its_number_of_ranks_is_not_quoted(tmp_path: Path) -> None:
    arms = arms_of(tmp_path)
    for name in ("bf16", "fp8"):
        edited(tmp_path / name, "environment.json", world_size=1)
    for step, ranks in ((10, 2), (4, 4)):
        early = tmp_path / "fp8" / f"environment.until_step_{step}.json"
        early.write_text(json.dumps(ENVIRONMENT | {"world_size": ranks, "host": None}))
    arms = {"bf16": {1: read_run(tmp_path / "bf16")}, "blockwise": {1: read_run(tmp_path / "fp8")}}
    speed = verdict_of(arms)["comparisons"]["blockwise"]["speed"]
    assert speed["not_quoted"] == "ranks of FP8 blockwise changed during a run, 4 then 2 then 1"


def test_a_way_that_an_earlier_version_did_not_record_counts_as_the_same(tmp_path: Path) -> None:
    arms = arms_of(tmp_path, compile=True, parallel={"strategy": "fsdp"}, micro_batch_samples=None)
    assert "its peak memory." in verdict_of(arms)["numbers"][0]


@pytest.mark.parametrize(("shard_ranks", "doubted"), [(8, False), (4, True)])
def test_null_shards_over_the_number_of_ranks(tmp_path: Path, shard_ranks: int, doubted: bool) -> None:
    for name, over in (("bf16", None), ("fp8", shard_ranks)):
        folder = write_run(tmp_path / name, recipe="bf16" if over is None else "blockwise")
        edited(folder, "config.yaml", parallel={"strategy": "fsdp", "shard_ranks": over})
        edited(folder, "environment.json", world_size=8)
    arms = {"bf16": {1: read_run(tmp_path / "bf16")}, "blockwise": {1: read_run(tmp_path / "fp8")}}
    words = "Speed and memory not comparable: the arms ran in other ways, parallel.shard_ranks BF16 8, FP8 blockwise 4"
    assert (words in words_of(verdict_of(arms))) == doubted


@pytest.mark.parametrize(("strategy", "ranks", "doubted"), [("fsdp", 2, True), ("fsdp", 1, False), ("ddp", 2, False)])
def test_what_sharded_runs_gather_bears_on_their_speed(
    tmp_path: Path, strategy: str, ranks: int, doubted: bool
) -> None:
    """A run that does not say gathered FP32; one rank gathers nothing."""
    for name, more in (("bf16", {}), ("blockwise", {"gather": "operands"})):
        folder = write_run(tmp_path / name, recipe=name)
        edited(folder, "config.yaml", parallel={"strategy": strategy, **more})
        edited(folder, "environment.json", world_size=ranks)
    arms = {name: {1: read_run(tmp_path / name)} for name in ("bf16", "blockwise")}
    assert ("parallel.gather BF16 fp32, FP8 blockwise operands" in words_of(verdict_of(arms))) == doubted


def test_steps_are_those_of_the_run_not_of_its_last_logged_row(tmp_path: Path) -> None:
    arms = arms_of(tmp_path)
    for name in ("bf16", "fp8"):
        edited(tmp_path / name, "result.json", steps=47)
    arms = {"bf16": {1: read_run(tmp_path / "bf16")}, "blockwise": {1: read_run(tmp_path / "fp8")}}
    verdict = verdict_of(arms)
    assert verdict["arms"]["bf16"]["runs"][0]["steps"] == 47 and "after 47 steps" in verdict["numbers"][0]


def test_other_noise_than_the_shipped_one_is_no_placebo(tmp_path: Path) -> None:
    arms = arms_of(tmp_path) | {"noisy": {1: read_run(write_run(tmp_path / "noisy", recipe="placebo"))}}
    assert verdict_of(arms)["placebo"] == "noisy"
    text = (tmp_path / "noisy" / "recipe.yaml").read_text().replace("0.0265", "0.49")
    (tmp_path / "noisy" / "recipe.yaml").write_text(text)
    arms |= {"noisy": {1: read_run(tmp_path / "noisy")}}
    verdict = verdict_of(arms)
    assert verdict["placebo"] is None and verdict["sentence"] == "2 arms against BF16: 2 indicative."  # judged too
    said = summary(verdict, arms)
    assert "\n\n2 arms against BF16: " in said, "no status of one arm before what is said of all"
    assert "\nnoisy, indicative: " in said, "a name is as it was given"


def test_the_smoothed_curve_has_gaps_where_there_is_no_loss() -> None:
    curve = drawn(np.array([4.0, np.nan, 2.0, np.nan]))
    assert np.isnan(curve).tolist() == [False, True, False, True] and curve[2] == pytest.approx(3.8)
