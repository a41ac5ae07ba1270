"""An alarm on several ranks: what one of them meets demotes the same linear on all, and they go on alike."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml

from fp8train.nn.linear import Float8Linear
from fp8train.recipe import load_recipe
from fp8train.shards import whole
from fp8train.trainer import Trainer
from fp8train.trainer.console import Console
from tests.distributed.ranks import run_ranks
from tests.tiny_run import tiny_config

BROKEN = "layers.0.mlp.down_proj"


def trained(world: Any, strategy: str) -> dict[str, Any]:
    """A run of two ranks in which, on rank 1 alone, one FP8 linear gives infinities in one sequence from step 3 on."""
    folder = Path(world.broadcast_object(tempfile.mkdtemp() if world.main else ""))
    recipe = folder / "recipe.yaml"
    if world.main:
        beside = {"alarm": {"on": ["nonfinite"]}, "swiglu": {"smooth": True}}  # weights of others scale BROKEN's input
        recipe.write_text(yaml.safe_dump(load_recipe("blockwise").document | beside))
        tiny_config(folder)  # writes the text
    dist.barrier()
    options = (f"recipe={recipe}", f"parallel={strategy}", "checkpoint.every=2", "steps=5", "fused=never")
    warnings: list[str] = []
    console = Console(enabled=False)
    console.warn = warnings.append  # type: ignore[method-assign]
    config = tiny_config(folder, *options, "data.holdout_fraction=0", "micro_batch_samples=2")
    trainer = Trainer(config, world, console)
    honest = Float8Linear.forward

    def forward(self: Float8Linear, x: Any) -> Any:
        y = honest(self, x)
        target = trainer.model.get_submodule(BROKEN) if hasattr(trainer, "model") else None
        broken = self is target and world.rank == 1 and trainer.progress.step >= 2 and self.precision.any_fp8
        return y + math.inf if broken else y

    Float8Linear.forward = forward  # type: ignore[method-assign]
    try:
        result = trainer.run()
    finally:
        Float8Linear.forward = honest  # type: ignore[method-assign]
    events = [json.loads(line) for line in (folder / "run" / "events.jsonl").read_text().splitlines()]
    dumps = sorted((folder / "run" / "blackbox").glob("*/dump.json"))
    return {
        "events": events,
        "bad_ranks": [json.loads(dump.read_text())["statistics"]["bad_ranks"] for dump in dumps],
        "weights": [whole(p.detach()).double().sum().item() for p in trainer.model.parameters()],
        "demoted": [name for name, linear in trainer.model.named_modules()
                    if isinstance(linear, Float8Linear) and not linear.precision.quantized],
        "finished": result.finished,
        "warnings": warnings,
    }  # fmt: skip


def replicated(world: Any) -> dict[str, Any]:
    return trained(world, "ddp")


def sharded(world: Any) -> dict[str, Any]:
    return trained(world, "fsdp")


@pytest.mark.slow
@pytest.mark.parametrize("run", [replicated, sharded], ids=["ddp", "fsdp"])
def test_what_one_rank_meets_demotes_the_same_linear_on_all(run: Any, tmp_path: Path) -> None:
    first, second = run_ranks(run, 2, tmp_path)
    assert first["finished"] and second["finished"]
    (event,) = first["events"]
    assert (event["step"], event["demoted"], event["returned_to"]) == (3, [BROKEN], 2)
    assert first["demoted"] == second["demoted"] == [BROKEN, "lm_head"]
    assert first["weights"] == second["weights"]
    assert first["bad_ranks"] == [[1]]
    assert any("a step that is not finite, by the loss of rank 1: black box" in text for text in first["warnings"])
