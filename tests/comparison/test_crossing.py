from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from fp8train.comparison.crossing import cross_evaluate
from fp8train.distributed import World
from fp8train.errors import CheckpointError
from tests.distributed.ranks import own_folders, run_ranks
from tests.tiny_run import tiny_train


def evaluations(world: World) -> tuple[dict, str]:
    """What a rank finds where only rank 1 sees the runs, and what it is told where only rank 0 does."""
    folders = {recipe: {1: Path(recipe)} for recipe in ("bf16", "blockwise")}
    with own_folders(world) as shared:
        if world.rank == 1:
            for runs in folders.values():
                (runs[1] / "checkpoints").mkdir(parents=True)
        without = cross_evaluate(Path("crossed.json"), folders, world, print)
        dist.barrier()
        for recipe in folders:
            if world.main:
                tiny_train(shared, "steps=2", f"recipe={recipe}", f"run_dir={recipe}")
            else:
                (Path(recipe) / "checkpoints").rmdir()
        with pytest.raises(CheckpointError) as refused:
            cross_evaluate(Path("crossed.json"), folders, world, print)
    return without, str(refused.value)


def test_ranks_that_do_not_see_the_runs_end_together(tmp_path: Path):
    one, two = run_ranks(evaluations, 2, tmp_path)
    assert one == two
    assert one[0] == {} and one[1].startswith("on rank 1, not on rank 0: checkpoint bf16: ")
