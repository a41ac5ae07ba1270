"""One training step in a recipe, and in BF16 or without fused modules: forward, backward, update."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from fp8train.arguments import take_arguments
from fp8train.benchmarks.kernel_times import kernel_table, kernel_times
from fp8train.benchmarks.timing import BenchArguments, BenchResult, interleaved, machine_lines, table, write_results
from fp8train.config import RunConfig, config_to_dict, load_config
from fp8train.data import Batch, Batcher, build_dataset
from fp8train.distributed import World
from fp8train.errors import ConfigError
from fp8train.optim import build_optimizer
from fp8train.trainer.assembly import Assembly, assemble
from fp8train.trainer.step import train_step
from fp8train.units import bytes_text, count_text

BASELINE = "bf16"
UNFUSED = "unfused"


@dataclass(kw_only=True, slots=True)
class StepArguments(BenchArguments):
    """One training step of config.recipe; every key of a run may be given too.

    baseline: bf16, or unfused: the same recipe with fused=never
    profile: print and keep where the time of one more step of each goes, kernel by kernel
    """

    baseline: str = BASELINE
    profile: bool = False

    def __post_init__(self) -> None:
        if self.baseline not in (BASELINE, UNFUSED):
            raise ConfigError(f"bench: baseline is {self.baseline!r}; needs {BASELINE} or {UNFUSED}.")
        # not super(): a class with slots is made anew by the decorator, and super() would mean the first one
        BenchArguments.__post_init__(self)


def run(argv: Sequence[str], world: World) -> int:
    """Time a step of config.recipe against one of the baseline on the same batch, over and over.

    Raises:
        ConfigError: the recipe is the baseline itself.
    """
    arguments, rest = take_arguments(argv, StepArguments, RunConfig)
    config = load_config(rest, "bench")
    if config.recipe == BASELINE:
        raise ConfigError("bench: recipe is bf16, which is the baseline itself; needs another. Try recipe=blockwise.")
    steps: dict[str, Callable[[], Any]] = {}
    peaks: dict[str, int] = {}
    reason = ""
    baseline = replace(config, recipe=BASELINE) if arguments.baseline == BASELINE else replace(config, fused="never")
    for name, arm in ((arguments.baseline, baseline), (config.recipe, config)):
        held = _held_bytes(world.device)
        steps[name], reason = training_step(arm, world)
        if world.device.type == "cuda":
            peaks[name] = _peak_bytes(steps[name]) - held
    title = f"training step, model {config.model.name}, {count_text(config.global_batch_tokens)} tokens"
    timings = interleaved(steps, arguments, world.device)
    facts = {"model": config.model.name, "tokens": config.global_batch_tokens, "peak_bytes": peaks}
    facts |= {"config": config_to_dict(config)}
    result = BenchResult(title=title, timings=timings, facts=facts)
    rate = table(
        result, lambda name, timing: f"  {count_text(config.global_batch_tokens / timing.median_seconds)} tok/s"
    )
    sys.stdout.write(machine_lines(world.device, reason, arguments) + rate)
    if peaks:
        sizes = ", ".join(f"{name} {bytes_text(size)}" for name, size in peaks.items())
        sys.stdout.write(f"peak memory of a step: {sizes}\n")
    write_results("step", [result], world.device, reason, arguments)
    if arguments.profile:  # after the figures are safe
        kernels = {name: kernel_times(step, world.device) for name, step in steps.items()}
        sys.stdout.write("".join(f"\n{kernel_table(name, times)}" for name, times in kernels.items()))
        result.facts["kernels"] = {name: [asdict(time) for time in times] for name, times in kernels.items()}
        write_results("step", [result], world.device, reason, arguments)
    return 0


def prepared(config: RunConfig, world: World) -> tuple[Assembly, torch.optim.Optimizer, list[Batch]]:
    """The model of a run, its optimizer, and the micro-batches of the first step."""
    assembly = assemble(config, world.device)
    optimizer = build_optimizer(assembly.model, config.optim, assembly.recipe.moments)
    dataset = build_dataset(config.data, config.seq_len, config.seed)
    batches = Batcher(dataset, config.global_batch_samples, config.micro_batch(1)).micro_batches(0)
    return assembly, optimizer, batches


def training_step(config: RunConfig, world: World) -> tuple[Callable[[], Any], str]:
    """A step on the first global batch, and the line that says which backend runs it and what is fused."""
    assembly, optimizer, batches = prepared(config, world)
    clip = config.optim.clip_grad_norm
    fused = sum(row.refusal is None for row in assembly.report.producers)
    line = f"{assembly.report.backend_reason}; {fused} of {len(assembly.report.producers)} norms and MLPs fused"
    return lambda: train_step(assembly.model, optimizer, batches, world, clip=clip), line


def _held_bytes(device: torch.device) -> int:
    """What the other arm holds, without cuBLAS's workspaces, which each arm makes for itself."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


def _peak_bytes(step: Callable[[], Any]) -> int:
    """Peak of CUDA memory over a step, after one that makes the moments."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()
