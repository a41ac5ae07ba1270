"""One training step in BF16 and in a recipe: forward, backward, update."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fp8train.arguments import parse_arguments
from fp8train.benchmarks.timing import BenchArguments, BenchResult, interleaved, machine_lines, table, write_results
from fp8train.config import RunConfig, load_config
from fp8train.data import Batcher, build_dataset
from fp8train.distributed import World
from fp8train.errors import ConfigError
from fp8train.optim import build_optimizer
from fp8train.trainer.assembly import assemble
from fp8train.trainer.step import train_step
from fp8train.units import bytes_text, count_text

BASELINE = "bf16"
OWN_KEYS = ("rounds", "warmup", "threads", "out")


def run(argv: Sequence[str], world: World) -> int:
    """Time a step of config.recipe against one of BF16 on the same batch, over and over.

    Raises:
        ConfigError: the recipe is the baseline itself.
    """
    own = [argument for argument in argv if argument.partition("=")[0] in OWN_KEYS]
    arguments = parse_arguments(own, BenchArguments)
    config = load_config([argument for argument in argv if argument not in own], "bench")
    if config.recipe == BASELINE:
        raise ConfigError("bench: recipe is bf16, which is the baseline itself; needs another. Try recipe=blockwise.")
    steps: dict[str, Callable[[], Any]] = {}
    peaks: dict[str, int] = {}
    reason = ""
    for recipe in (BASELINE, config.recipe):
        steps[recipe], reason = training_step(config, recipe, world)
        if world.device.type == "cuda":
            peaks[recipe] = _peak_bytes(steps[recipe])
    title = f"training step, model {config.model.name}, {count_text(config.global_batch_tokens)} tokens"
    timings = interleaved(steps, arguments, world.device)
    facts = {"model": config.model.name, "tokens": config.global_batch_tokens, "peak_bytes": peaks}
    result = BenchResult(title=title, timings=timings, facts=facts)
    rate = table(
        result, lambda name, timing: f"  {count_text(config.global_batch_tokens / timing.median_seconds)} tok/s"
    )
    sys.stdout.write(machine_lines(world.device, reason, arguments) + rate)
    if peaks:
        sizes = ", ".join(f"{name} {bytes_text(size)}" for name, size in peaks.items())
        sys.stdout.write(f"peak memory of a step: {sizes}\n")
    write_results("step", [result], world.device, reason, arguments)
    return 0


def training_step(config: RunConfig, recipe: str, world: World) -> tuple[Callable[[], Any], str]:
    """A step of that recipe on the first global batch, and the line that says which backend runs it."""
    arm = copy.deepcopy(config)
    arm.recipe = recipe
    assembly = assemble(arm, world.device)
    optimizer = build_optimizer(assembly.model, arm.optim, assembly.recipe.moments)
    dataset = build_dataset(arm.data, arm.seq_len, arm.seed)
    batches = Batcher(dataset, arm.global_batch_samples, arm.micro_batch(1), 0, 1).micro_batches(0)
    clip = arm.optim.clip_grad_norm
    return lambda: train_step(assembly.model, optimizer, batches, world, clip=clip), assembly.report.backend_reason


def _peak_bytes(step: Callable[[], Any]) -> int:
    """Peak of CUDA memory over a step, beyond what other contestants hold."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()
