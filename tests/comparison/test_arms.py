"""The runs of a comparison: which arms and seeds are planned, which plans are refused before anything trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from fp8train.comparison.arms import plan_arms
from fp8train.config import config_to_dict
from fp8train.errors import ConfigError, RecipeError, UserError
from tests.run_folders import write_run
from tests.tiny_comparison import configuration


def test_default_arms_are_bf16_and_the_recipe_each_in_its_own_run_folder(tmp_path: Path) -> None:
    plan = plan_arms(configuration(tmp_path / "out", "seed=7"))
    assert [(run.arm, run.config.recipe, run.config.seed, run.config.resume) for run in plan] == [
        ("bf16", "bf16", 7, "auto"),
        ("blockwise", "blockwise", 7, "auto"),
    ]
    assert [run.config.run_dir for run in plan] == [
        str(tmp_path / "out" / "arms" / arm / "seed_7") for arm in ("bf16", "blockwise")
    ]
    first, second = (config_to_dict(run.config) for run in plan)
    assert {key for key in first if first[key] != second[key]} == {"recipe", "run_dir"}


def test_seeds_run_as_pairs(tmp_path: Path) -> None:
    plan = plan_arms(configuration(tmp_path, "seed=3", "compare.seeds=2", "compare.arms=[bf16,blockwise,rowwise]"))
    assert [run.label for run in plan] == [
        f"{arm} seed {seed}" for seed in (3, 4) for arm in ("bf16", "blockwise", "rowwise")
    ]


def test_recipe_of_a_file_is_an_arm_named_after_the_file(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("version: 1\nrules:\n  - {match: '*', use: fp32}\n")
    assert [run.arm for run in plan_arms(configuration(tmp_path / "out", f"recipe={recipe}"))] == ["bf16", "mine"]


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["recipe=bf16"], ConfigError, "recipe bf16 is the same as the arm bf16; needs arms that differ"),
        (["compare.arms=[bf16]", "recipe=bf16"], ConfigError, "needs at least two recipes"),
        (["compare.arms=[bf16,rowwise]"], ConfigError, "recipe is blockwise, but compare.arms are bf16, rowwise"),
        (["compare.arms=[bf16,blockwise,blockwise]"], ConfigError, "blockwise is the same as the arm blockwise"),
        (["recipe=blokwise"], RecipeError, "blockwise"),
        (["compare.margin_percent=0"], ConfigError, "needs more than 0"),
        (["resume=elsewhere/step_1"], ConfigError, "needs auto or never"),
    ],
    ids=["the baseline again", "one arm", "recipe not among arms", "arm twice", "typo", "margin", "resume"],
)
def test_plan_that_cannot_be_honoured_is_refused_before_anything_is_written(
    tmp_path: Path, overrides: Sequence[str], error: type[UserError], message: str
) -> None:
    with pytest.raises(error, match=message):
        plan_arms(configuration(tmp_path / "out", *overrides))
    assert not (tmp_path / "out").exists()


def test_same_recipe_under_another_file_name_is_refused(tmp_path: Path) -> None:
    copied = tmp_path / "copied.yaml"
    copied.write_text("version: 1\nrules:\n  - {match: '*', use: bf16}\n")
    with pytest.raises(ConfigError, match="is the same as the arm"):
        plan_arms(configuration(tmp_path / "out", f"compare.arms=[bf16,{copied}]", f"recipe={copied}"))


def test_another_recipe_under_the_name_of_an_arm_is_refused_as_that(tmp_path: Path) -> None:
    named = tmp_path / "bf16.yaml"
    named.write_text("version: 1\nrules:\n  - {match: '*', use: fp32}\n")
    with pytest.raises(ConfigError, match="has the name of the arm bf16; needs one of its own. Rename the file"):
        plan_arms(configuration(tmp_path / "out", f"compare.arms=[bf16,{named}]", f"recipe={named}"))


def test_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="is the folder of a run"):
        plan_arms(configuration(run))
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        plan_arms(configuration(file))
    compared = tmp_path / "compared"
    (compared / "arms").mkdir(parents=True)
    with pytest.raises(ConfigError, match="resume=never; needs an empty one"):
        plan_arms(configuration(compared, "resume=never"))


def test_one_seed_needs_no_placebo_and_a_placebo_can_be_asked_for(tmp_path: Path) -> None:
    assert [run.arm for run in plan_arms(configuration(tmp_path, "recipe=placebo", "compare.seeds=2"))][:2] == [
        "bf16",
        "placebo",
    ]
    assert [run.arm for run in plan_arms(configuration(tmp_path))] == ["bf16", "blockwise"]


def test_parallel_runs_under_torchrun_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="under torchrun with 2 ranks; needs 1 there"):
        plan_arms(configuration(tmp_path / "out", "compare.parallel=2"), ranks=2)


def test_an_arm_that_cannot_run_is_refused_before_the_first_one_trains(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("version: 1\nrules:\n  - {match: 'nothing.like.this', use: fp32}\n  - {match: '*', use: bf16}\n")
    for override in (f"recipe={broken}", "backend=te"):
        with pytest.raises(UserError):
            plan_arms(configuration(tmp_path / "out", override))
    assert not (tmp_path / "out").exists()


def test_an_arm_that_several_ranks_cannot_train_is_refused_before_the_first_one_trains(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"got 256; needs a multiple of seq_len x ranks = 64 x 3"):
        plan_arms(configuration(tmp_path / "out"), ranks=3)
