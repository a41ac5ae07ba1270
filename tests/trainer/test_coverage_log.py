"""What a run says of its GEMMs is of all its steps, each once, however often it was interrupted."""

from __future__ import annotations

from pathlib import Path

import yaml

from fp8train.checkpoint import open_checkpoint
from fp8train.distributed import World
from fp8train.recipe import load_recipe
from fp8train.trainer import Trainer
from fp8train.trainer.progress import saved_progress
from tests.distributed.ranks import own_folders, run_ranks
from tests.tiny_run import tiny_config, tiny_train


def counts(coverage: dict) -> dict[str, dict]:
    return {row["fqn"]: row["gemms"] for row in coverage["linears"]}


def test_a_run_that_goes_on_counts_the_steps_of_before(tmp_path: Path) -> None:
    whole = tiny_train(tmp_path, "steps=5", run="whole")
    tiny_train(tmp_path, "steps=2", "eval.every=1", run="parts")
    parts = tiny_train(tmp_path, "steps=5", run="parts")
    assert counts(parts.coverage) == counts(whole.coverage)
    assert parts.fp8_flops_share == whole.fp8_flops_share > 0


def test_activation_checkpointing_does_not_change_the_share(tmp_path: Path) -> None:
    plain, full = (tiny_train(tmp_path, "steps=1", f"activation_checkpointing={c}", run=c) for c in ("none", "full"))
    assert plain.fp8_flops_share == full.fp8_flops_share > 0


def test_a_run_that_begins_at_the_checkpoint_of_another_counts_its_own(tmp_path: Path) -> None:
    tiny_train(tmp_path, "steps=2", run="first")
    checkpoint = tmp_path / "first" / "checkpoints" / "step_00000002"
    own = counts(tiny_train(tmp_path, "steps=3", f"resume={checkpoint}", run="second").coverage)
    once = counts(tiny_train(tmp_path, "steps=1", run="once").coverage)
    assert own == once


OPTIONS = ("steps=4", "checkpoint.every=2")


def scheduled(folder: Path) -> str:
    """A recipe whose second half runs in BF16."""
    path = folder / "half.yaml"
    path.write_text(yaml.safe_dump(load_recipe("blockwise").document | {"schedule": [{"at": 0.5, "use": "bf16"}]}))
    return f"recipe={path}"


def on_fewer_ranks(world: World) -> dict:
    """Coverage of a run whose first half was of two ranks in FP8, and whose second is of one in BF16."""
    with own_folders(world) as shared:
        recipe = world.broadcast_object(scheduled(shared) if world.main else "")
        trainer = Trainer(tiny_config(shared, recipe, *OPTIONS), world)
        assert not trainer.run(lambda: "half" if trainer.progress.step >= 1 else None).finished
        return tiny_train(shared, recipe, *OPTIONS).coverage if world.main else {}


def test_a_run_that_goes_on_with_fewer_ranks_counts_the_rows_of_all_that_there_were(tmp_path: Path) -> None:
    whole = tiny_train(tmp_path, scheduled(tmp_path), *OPTIONS).coverage
    parts, _ = run_ranks(on_fewer_ranks, 2, tmp_path)
    assert parts["fp8_flops_share"] == whole["fp8_flops_share"] > 0
    gemm = counts(parts)["layers.0.mlp.up_proj"]["fprop"]
    assert gemm["fp8_rows"] == gemm["other_rows"] == 2 * 512


def test_counts_of_an_earlier_version_are_of_one_of_the_ranks_that_the_checkpoint_names(tmp_path: Path) -> None:
    tiny_train(tmp_path, "steps=2")
    state = open_checkpoint(tmp_path / "run").state
    of_all = saved_progress(state).coverage
    assert of_all == state.progress["coverage"]
    del state.progress["coverage_of_all_ranks"]
    state.random_states.append(state.random_states[0])
    up_proj = saved_progress(state).coverage["layers.0.mlp.up_proj"]["fprop"]
    assert up_proj == [2 * number for number in of_all["layers.0.mlp.up_proj"]["fprop"]] == [4, 0, 4 * 512, 0]
