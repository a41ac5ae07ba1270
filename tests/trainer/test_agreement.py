from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml

from fp8train import compare
from fp8train.distributed import World
from fp8train.errors import UserError
from fp8train.recipe import load_recipe
from fp8train.trainer import Trainer, agreement
from tests.distributed.ranks import own_folders, run_ranks
from tests.tiny_run import tiny_arguments, tiny_config

STEPS = ("steps=2", "optim.warmup_steps=0")


def told(folder: Path, world: World, *overrides: str, every: tuple[str, ...] = ()) -> str:
    """What a rank is told where rank 1 is started with overrides of its own."""
    config = tiny_config(folder, *STEPS, *every, *(overrides if world.rank == 1 else ()))
    with pytest.raises(UserError) as refused:
        Trainer(config, world).run()
    return str(refused.value)


def refusals(world: World) -> dict[str, str]:
    """What this rank is told of each thing in which rank 1 is not like rank 0."""
    found = {}
    with own_folders(world) as shared:
        text = Path(tiny_config(shared).data.path).read_bytes()
        Path("own.txt").write_bytes(text[: -1000 * world.rank or None])
        Path("own.yaml").write_text(yaml.safe_dump(load_recipe("bf16" if world.rank else "blockwise").document))
        if world.main:
            Path("one.txt").write_bytes(text)
        for name, overrides in {
            "rate": ("optim.lr=0.1",),
            "several": ("seed=2", "micro_batch_samples=1", "global_batch_tokens=1024"),
            "recipe": ("recipe=bf16",),
            "refused alone": ("micro_batch_samples=8",),
        }.items():
            found[name] = told(shared, world, *overrides)
        found["compare"] = _comparison(shared, world)
        found["recipe file"] = told(shared, world, every=("recipe=own.yaml",))
        found["text"] = told(shared, world, every=("data.path=own.txt",))
        found["no text"] = told(shared, world, every=("data.path=one.txt",))
        found["backend"] = _other_backend(shared, world)
        assert not (world.main and (shared / "run").exists()), "nothing is left of a run that was refused"
        config = tiny_config(shared, *STEPS, f"time_limit_seconds={100 + world.rank}")
        assert Trainer(config, world).run().finished
    return found


def _comparison(folder: Path, world: World) -> str:
    """The same of a comparison, whose arms are other files under one name."""
    arguments = ["compare.arms=[bf16,own.yaml]", *STEPS]
    agreement.init = lambda *_: nullcontext(world)  # this rank is in its world already
    with pytest.raises(UserError) as refused:
        compare.main([*tiny_arguments(folder), *arguments])
    return str(refused.value)


def _other_backend(folder: Path, world: World) -> str:
    """The same command on machines that choose another backend."""

    def assemble(config: Any, *arguments: Any, **options: Any) -> Any:
        config.backend = "reference" if world.rank == 1 else "dequant_bf16"
        return original(config, *arguments, **options)

    original, agreement.assemble = agreement.assemble, assemble
    try:
        return told(folder, world)
    finally:
        agreement.assemble = original


def test_ranks_that_differ_are_refused_on_every_rank_by_the_name_of_what_differs(tmp_path: Path):
    one, two = run_ranks(refusals, 2, tmp_path)
    assert one == two
    command = "needs the same on every rank. Give every node the same command, recipe files and versions."
    assert one["rate"] == f"distributed: rank 1 has optim.lr=0.1, rank 0 has 0.003; {command}"
    several = "seed=2, rank 0 has 1, as well as another global_batch_tokens and micro_batch_samples; "
    assert one["several"] == f"distributed: rank 1 has {several}{command}"
    assert one["recipe"].startswith("distributed: rank 1 has recipe=bf16, rank 0 has blockwise")
    assert one["refused alone"].startswith("distributed: rank 1 has micro_batch_samples=8, rank 0 has None;")
    assert one["recipe file"].startswith("distributed: rank 1 has the meaning of recipe own.yaml=")
    assert one["compare"].startswith("distributed: rank 1 has the meaning of recipe own.yaml=")
    assert one["text"].startswith("distributed: rank 1 has the fingerprint of the data=")
    assert one["no text"].startswith("on rank 1, not on rank 0: ") and "one.txt" in one["no text"]
    assert one["backend"].startswith(
        "distributed: rank 1 has layers.0.self_attn.q_proj=fp8 by reference, rank 0 has fp8 by dequant_bf16, as well as"
    )
