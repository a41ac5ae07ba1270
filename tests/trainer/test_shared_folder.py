from __future__ import annotations

import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch.distributed as dist

from fp8train import compare
from fp8train.checkpoint import checkpoint_path
from fp8train.distributed import World
from fp8train.errors import CheckpointError, ConfigError
from fp8train.trainer import Trainer, agreement, shared_folder
from tests.distributed.ranks import own_folders, run_ranks
from tests.tiny_run import tiny_arguments, tiny_config, tiny_train


def told_of_checkpoints(world: World) -> dict[str, str]:
    """What a rank is told where rank 1 sees no checkpoint, or another one, or a part of it, under rank 0's path."""
    shared_folder.WAIT_SECONDS = 0.1
    found = {}
    with own_folders(world) as shared:
        if world.main:
            for seed in (1, 2):
                tiny_train(shared, "steps=2", run=f"run{seed}")
        dist.barrier()
        for name in ("missing", "stale", "cut"):
            own = Path(name)
            if world.main or name != "missing":
                stale = world.rank == 1 and name == "stale"
                shutil.copytree(checkpoint_path(shared / ("run2" if stale else "run1"), 2), own)
            if world.rank == 1 and name == "cut":
                os.truncate(own / "model.safetensors", 1000)
            config = tiny_config(shared, "steps=4", f"resume={own}", run="new")
            with pytest.raises(CheckpointError) as refused:
                Trainer(config, world).run()
            found[name] = str(refused.value)
        whole = tiny_config(shared, "steps=4", f"resume={shared / 'run1'}", run="new")
        assert Trainer(whole, world).run().finished
    return found


def test_ranks_that_see_another_checkpoint_do_not_resume(tmp_path: Path):
    one, two = run_ranks(told_of_checkpoints, 2, tmp_path)
    host = os.uname().nodename
    end = f" on rank 1 (of {host}); needs the same weights on every rank. {shared_folder.REMEDY}"
    assert one == two == {
        "missing": f"resume: missing of rank 0 is not there{end}",
        "stale": f"resume: stale of rank 0 has another state.json{end}",
        "cut": f"resume: cut of rank 0 has another model.safetensors{end}",
    }  # fmt: skip


def told_of_folders(world: World) -> list[str]:
    """What a rank is told of run folders that each machine has of its own, and of one that is there for both."""
    shared_folder.WAIT_SECONDS = 0.1
    found = []
    with own_folders(world) as shared:
        config = tiny_config(shared, "steps=2", "run_dir=below/run")
        with pytest.raises(ConfigError) as refused:
            Trainer(config, world).run()
        found.append(str(refused.value))
        assert not (world.main and Path("below").exists()), "what was made for a refused run is gone"
        agreement.init = lambda *_: nullcontext(world)  # this rank is in its world already
        Path("comparison").mkdir()
        with pytest.raises(ConfigError) as refused:
            compare.main([*tiny_arguments(shared), "steps=2", "run_dir=comparison"])
        found.append(str(refused.value))
        (shared / "run").mkdir(exist_ok=True)
        shared_folder.check_shared(shared / "run", world)
        dist.barrier()
        assert not list((shared / "run").iterdir()) and not list(Path("comparison").iterdir())
    return found


def test_a_run_folder_that_some_rank_does_not_see_is_refused_before_anything_is_trained(tmp_path: Path):
    one, two = run_ranks(told_of_folders, 2, tmp_path)
    end = f" of rank 0 is not there on rank 1 (of {os.uname().nodename}); needs to be the same for all. "
    texts = [f"run_dir: {path}{end}{shared_folder.REMEDY}" for path in ("below/run", "comparison")]
    assert one == two == texts
