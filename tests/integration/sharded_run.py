"""Runs under torchrun, replicated and sharded, into one folder; not a test itself."""

from __future__ import annotations

import json
import os
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from fp8train.checkup.subject import KeepGradients
from fp8train.config import RunConfig
from fp8train.data import Batcher, build_dataset
from fp8train.distributed import World, init
from fp8train.errors import CheckpointError
from fp8train.models import save_hf
from fp8train.nn.weights import OPERANDS, converted_linears
from fp8train.shards import local
from fp8train.trainer import Trainer
from fp8train.trainer.assembly import assemble, parameter_hash, spread
from fp8train.trainer.step import StepResult, train_step
from fp8train.trainer.telemetry_watcher import TelemetryWatcher
from tests.tiny_run import tiny_config

CASES = {
    "fp32_scales": ("recipe=deepseek_v3",),
    "fused": ("recipe=blockwise", "fused=always"),
    "recomputed": ("recipe=blockwise", "fused=always", "activation_checkpointing=full"),
    "selective": ("recipe=blockwise", "activation_checkpointing=selective"),
    "wgrad_bf16": ("recipe=wgrad_bf16",),
    "placebo": ("recipe=placebo",),
    "fp32": ("recipe=fp32",),
    "whole": ("recipe=blockwise", "fused=always", "parallel.reshard_after_forward=false"),
    "gathered_fp32": ("recipe=blockwise", "fused=always", "parallel.gather=fp32"),
    "tied": ("recipe=blockwise", "model.tie_embeddings=true"),
    "clamped": ("recipe=clamped.yaml", "fused=always", "activation_checkpointing=selective"),
    "smooth": ("recipe=smooth.yaml", "fused=always", "activation_checkpointing=full"),
    "smooth_fp32": ("recipe=smooth.yaml", "parallel.gather=fp32", "activation_checkpointing=full"),
}
CLAMP = 2e-2  # which cuts a fifth of the products of the first step
# what the recipes in these files of the folder have besides blockwise
TREATED: dict[str, dict[str, Any]] = {
    "clamped": {"swiglu": {"clamp": CLAMP}},
    "smooth": {"swiglu": {"clamp": CLAMP, "smooth": True}, "schedule": [{"at": 0.7, "use": "bf16"}]},
}
MICRO_BATCHES = {"accumulated": ("recipe=blockwise", "fused=always", "micro_batch_samples=2")}
# of 259 rows the ranks have 130 and 129, which cuts a block of 128; of 9 held-out windows, in batches of 4, 1 and 2
SHAPE = ("model.num_layers=2", "model.intermediate_size=259", "data.eval_windows=9")
RUN = (
    "checkpoint.every=3", "eval.every=2", "steps=6", "optim=adamw_constant", "optim.lr=3e-3",
    "optim.clip_grad_norm=null", "telemetry.every=2",
)  # fmt: skip
DDP, FSDP, BF16, SMOOTH = "parallel=ddp", "parallel=fsdp", "optim=adamw_bf16_moments", "recipe=smooth.yaml"
WHOLE = "parallel.reshard_after_forward=false"
RUNS = {
    "ddp": (DDP,), "ddp_bf16": (DDP, BF16), "ddp_smooth": (DDP, SMOOTH),
    "fsdp": (FSDP,), "fsdp_bf16": (FSDP, BF16), "fsdp_smooth": (FSDP, SMOOTH),
    "whole": (FSDP, WHOLE), "whole_smooth": (FSDP, SMOOTH, WHOLE, "parallel.gather=fp32"),
    "stopped": (FSDP,), "stopped_smooth": (FSDP, SMOOTH),
}  # fmt: skip


def gradients(config: RunConfig, world: World) -> tuple[float, dict[str, torch.Tensor], dict[str, Any]]:
    """Loss, whole gradients and facts of the first step."""
    dataset = build_dataset(config.data, config.seq_len, config.seed)
    size = config.micro_batch(world.world_size)
    batcher = Batcher(dataset, config.global_batch_samples, size, world.rank, world.world_size)
    model = assemble(config, world.device, world_size=world.world_size).model
    master = weakref.ref(model.layers[0].mlp.gate_proj.weight)
    numel = sum(parameter.numel() for parameter in model.parameters())
    replica = spread(model, config, world)
    facts = {
        "numel": numel,
        "local_numel": world.all_gather_object(sum(local(parameter).numel() for parameter in model.parameters())),
        "master_is_alive": master() is not None,
    }
    optimizer = KeepGradients(model)
    result = train_step(replica, optimizer, batcher.micro_batches(0), world, clip=None)
    linears = converted_linears(model)
    codes = [getattr(linear, name) for linear in linears for name in OPERANDS if name != "channel_scale"]
    scales = {float(scale) for linear in linears if linear.channel_scale is not None for scale in linear.channel_scale}
    facts |= {"holds_codes": any(operand is not None for operand in codes), "scales": sorted(scales)}
    return result.loss, optimizer.gradients, facts


def compiled(config: RunConfig, world: World) -> dict[str, Any]:
    """How far the gradients of compiled layers are from those of eager ones, and how many graphs that took."""
    _, want, _ = gradients(config, world)
    counters.clear()
    config.compile = True
    _, got, facts = gradients(config, world)
    apart = max(float((want[key] - got[key]).norm() / want[key].norm()) for key in want)
    breaks = sum(counters["graph_break"].values())
    return {"apart": apart, "graphs": counters["stats"]["unique_graphs"], "graph_breaks": breaks, **facts}


def telemetry(config: RunConfig, world: World) -> list[str]:
    """What rank 0 sees of a compiled model, whose pass beside the step every rank must join."""
    config.telemetry.every = 1
    assembly = assemble(config, world.device, world_size=world.world_size)
    spread(assembly.model, config, world)
    dataset = build_dataset(config.data, config.seq_len, config.seed)
    batcher = Batcher(dataset, config.global_batch_samples, 4, world.rank, world.world_size)
    watcher = TelemetryWatcher(config, assembly, world, print)
    watcher.before_step(1, batcher.micro_batches(0))
    gathered = [linear.provider.gathered for linear in converted_linears(assembly.model)]
    assert all(each is not None and not each.shown for each in gathered), "the step is compiled for other operands"
    result = StepResult(loss=1.0, grad_norm=1.0, valid_tokens=1, updated=True, stop=False)
    seen = sorted(watcher.after_step(1, result))
    assert all(parameter.grad is None for parameter in assembly.model.parameters())
    return seen


def first_weights(config: RunConfig, world: World) -> dict[str, list[str]]:
    """Hashes of the weights that rank 0 would have alone, and of those of ranks of which it is one; how drawn or read.

    Each rank has another seed. Models in memory are sharded, and such as get memory when they are.
    """
    config.seed = 1 + world.rank
    alone = world.broadcast_object(parameter_hash(assemble(config, world.device).model))
    hashes = {"seed": [alone]}
    for ranks in (1, world.world_size):
        model = assemble(config, world.device, world_size=ranks).model
        assert all(parameter.is_meta == (ranks > 1) for parameter in model.parameters())
        spread(model, config, world)
        hashes["seed"].append(parameter_hash(model))
    folder = Path(str(config.run_dir)).with_name("weights")
    model = assemble(config, world.device).model
    if world.main:
        save_hf(model.state_dict(), config.model, folder, "float32")
    world.any(False)
    config.model.init_from = str(folder)
    alone = parameter_hash(assemble(config, world.device).model)  # whose rows that pad the vocabulary are 0
    model = assemble(config, world.device, world_size=world.world_size).model
    spread(model, config, world)
    hashes["folder"] = [alone, parameter_hash(model)]
    if world.main:
        (folder / "model.safetensors").write_bytes(b"")
    world.any(False)
    model = assemble(config, world.device, world_size=world.world_size).model
    try:
        spread(model, config, world)
    except CheckpointError as error:
        hashes["damaged"] = world.all_gather_object(str(error))
    return hashes


def main(argv: Sequence[str]) -> None:
    """Write each case's outcome to argv[0]/cases.json and the runs below argv[0]."""
    folder, outcome = Path(argv[0]), {}
    os.chdir(folder)
    with init(60) as world:
        for name, overrides in (CASES | MICRO_BATCHES).items():
            config = tiny_config(folder, *SHAPE, *overrides)
            want_loss, want, _ = gradients(config, world)
            config.parallel.strategy = "fsdp"
            loss, got, facts = gradients(config, world)
            different = [key for key in want if not torch.equal(want[key], got[key])]
            apart = max(float((want[key] - got[key]).norm() / want[key].norm()) for key in want)
            outcome[name] = {
                "losses": [want_loss, loss], "different": different, "apart": apart, "gradients": len(got), **facts
            }  # fmt: skip
        outcome["telemetry"] = telemetry(tiny_config(folder, *SHAPE, "parallel=fsdp", "compile=true"), world)
        outcome["first_weights"] = first_weights(tiny_config(folder, *SHAPE, "parallel=fsdp"), world)
        outcome["compiled"] = compiled(tiny_config(folder, *SHAPE, "recipe=fp32", "parallel=fsdp"), world)
        for run, overrides in RUNS.items():
            for steps in (3, 6) if run.startswith("stopped") else (6,):
                Trainer(tiny_config(folder, *SHAPE, *RUN, *overrides, f"steps={steps}", run=run), world).run()
        for strategy in ("ddp", "fsdp"):
            config = tiny_config(folder, *SHAPE, *RUN, f"parallel={strategy}", "steps=4", run=f"clock_{strategy}")
            config.checkpoint.every, config.checkpoint.minutes = None, 1e-9 if world.rank == 1 else None
            Trainer(config, world).run()
            overrides = ("optim.clip_grad_norm=0.1", "steps=1", f"parallel={strategy}")
            Trainer(tiny_config(folder, *SHAPE, *RUN, *overrides, run=f"clipped_{strategy}"), world).run()
        if world.main:
            (folder / "cases.json").write_text(json.dumps(outcome), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
