"""Time FP8 against BF16, interleaved in one process: `fp8train bench step`, `fp8train bench linear`.

    fp8train bench step model=quickstart recipe=blockwise rounds=20     one training step: forward, backward, update
    fp8train bench linear rows=2048 in_features=1024 out_features=1024   forward and backward of one linear

Every round times each contestant once, in turn, so that a busy machine slows them alike; the ratio is the median over
the rounds' own ratios. Both share everything but the GEMMs.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fp8train.arguments import nearest, parse_arguments
from fp8train.backends import select_backend
from fp8train.config import RunConfig, load_config
from fp8train.data import Batcher, build_dataset
from fp8train.distributed import World, init
from fp8train.errors import ConfigError
from fp8train.nn.linear import Float8Linear
from fp8train.nn.weights import BUFFERS
from fp8train.optim import build_optimizer
from fp8train.quant.formats import BF16
from fp8train.recipe import load_recipe
from fp8train.trainer.assembly import assemble
from fp8train.trainer.run_folder import device_name, write_file
from fp8train.trainer.step import train_step
from fp8train.units import bytes_text, ratio_text

BASELINE = "bf16"
SUBJECTS = ("step", "linear")


@dataclass(kw_only=True, slots=True)
class BenchArguments:
    """What both subjects take.

    rounds: times that each contestant is timed
    warmup: rounds before the first that counts
    threads: CPU threads; null: torch's own choice
    out: file that gets the figures as one JSON object; null: none
    """

    rounds: int = 20
    warmup: int = 3
    threads: int | None = None
    out: str | None = None


@dataclass(kw_only=True, slots=True)
class LinearArguments(BenchArguments):
    """Forward and backward of one linear, in BF16 and in a recipe's precision.

    recipe: its first FP8 precision is timed
    backend: auto or a backend's name
    rows: tokens
    in_features: K
    out_features: N
    """

    recipe: str = "blockwise"
    backend: str = "auto"
    rows: int = 2048
    in_features: int = 1024
    out_features: int = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Seconds of one contestant, and of each round against the baseline's."""

    median_seconds: float
    min_seconds: float
    max_seconds: float
    ratio: float
    ratio_low: float
    ratio_high: float


def main(argv: Sequence[str]) -> int:
    """Time the subject that the first argument names and print a table; returns 0.

    Raises:
        ConfigError: no such subject, or a value that does not fit.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    subject, rest = argv[0], argv[1:]
    if subject not in SUBJECTS:
        raise ConfigError(f"bench: got {subject!r}; {nearest(subject, SUBJECTS)}.")
    with init(timeout_seconds=60.0) as world:
        return (_bench_step if subject == "step" else _bench_linear)(rest, world)


def interleaved(
    contestants: Mapping[str, Callable[[], Any]], rounds: int, warmup: int, device: torch.device
) -> dict[str, Timing]:
    """Time callables in turn, `rounds` times each; the first is the baseline of the ratios.

    Raises:
        ConfigError: fewer than one round.
    """
    if rounds < 1 or warmup < 0:
        raise ConfigError(f"bench: got rounds={rounds} warmup={warmup}; needs rounds >= 1 and warmup >= 0.")
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(-warmup, rounds):
        for name, call in contestants.items():
            taken = _timed(call, device)
            if number >= 0:
                seconds[name].append(taken)
    baseline = next(iter(seconds.values()))
    return {name: _timing(values, baseline) for name, values in seconds.items()}


def _timed(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _timing(values: list[float], baseline: list[float]) -> Timing:
    """Medians; low and high are the quartiles of the ratio."""
    ratios = sorted(own / other for own, other in zip(values, baseline, strict=True))
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else [ratios[0]] * 3
    return Timing(
        median_seconds=statistics.median(values),
        min_seconds=min(values),
        max_seconds=max(values),
        ratio=quartiles[1],
        ratio_low=quartiles[0],
        ratio_high=quartiles[2],
    )


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for backward, each storage once; parameters and weight codes do not count."""
    kept = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    for module in model.modules():
        kept |= {
            held.untyped_storage().data_ptr() for name in BUFFERS if (held := getattr(module, name, None)) is not None
        }
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in kept:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()  # held, so that no saved storage is freed and its address used again
    total = sum(sizes.values())
    del output
    return total


def _bench_step(argv: Sequence[str], world: World) -> int:
    own = [argument for argument in argv if argument.partition("=")[0] in ("rounds", "warmup", "threads", "out")]
    arguments = parse_arguments(own, BenchArguments)
    config = load_config([argument for argument in argv if argument not in own], "bench")
    if config.recipe == BASELINE:
        raise ConfigError("bench: recipe is bf16, which is the baseline itself; needs another. Try recipe=blockwise.")
    _set_threads(arguments.threads)
    steps, reason = {}, ""
    for recipe in (BASELINE, config.recipe):
        steps[recipe], reason = _training_step(config, recipe, world)
    timings = interleaved(steps, arguments.rounds, arguments.warmup, world.device)
    tokens = config.global_batch_tokens
    title = f"training step, model {config.model.name}, {tokens:,} tokens"
    _report("step", title, reason, timings, world, arguments, {"tokens": tokens, "model": config.model.name})
    return 0


def _training_step(config: RunConfig, recipe: str, world: World) -> tuple[Callable[[], Any], str]:
    """A step of that recipe on the first global batch, over and over, and the backend that runs it."""
    arm = copy.deepcopy(config)
    arm.recipe = recipe
    assembly = assemble(arm, world.device)
    optimizer = build_optimizer(assembly.model, arm.optim, assembly.recipe.moments)
    dataset = build_dataset(arm.data, arm.seq_len, arm.seed)
    batches = Batcher(dataset, arm.global_batch_samples, arm.micro_batch(1), 0, 1).micro_batches(0)
    clip = arm.optim.clip_grad_norm
    return lambda: train_step(assembly.model, optimizer, batches, world, clip=clip), assembly.report.backend_reason


def _bench_linear(argv: Sequence[str], world: World) -> int:
    arguments = parse_arguments(argv, LinearArguments)
    precisions = [p for p in load_recipe(arguments.recipe).precisions.values() if p.any_fp8]
    if not precisions:
        raise ConfigError(f"bench: recipe {arguments.recipe} has no FP8 precision; needs one. Try recipe=blockwise.")
    _set_threads(arguments.threads)
    selection = select_backend(arguments.backend, world.device.type, precisions)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(arguments.rows, arguments.in_features, generator=generator).to(world.device, torch.bfloat16)
    dy = torch.randn(arguments.rows, arguments.out_features, generator=generator).to(world.device, torch.bfloat16)
    x.requires_grad_()
    calls, extra = {}, {"rows": arguments.rows, "K": arguments.in_features, "N": arguments.out_features}
    for name, precision in {BASELINE: BF16, arguments.recipe: precisions[0]}.items():
        K, N, backend = arguments.in_features, arguments.out_features, selection.backend.name
        linear = Float8Linear(K, N, bias=False, precision=precision, backend=backend, device=world.device)
        calls[name] = _forward_backward(linear, x, dy)
        extra[f"saved_bytes_{name}"] = saved_bytes(linear, lambda linear=linear: linear(x))  # type: ignore[misc]
    timings = interleaved(calls, arguments.rounds, arguments.warmup, world.device)
    title = f"linear forward + backward, M {arguments.rows}, N {arguments.out_features}, K {arguments.in_features}"
    _report("linear", title, selection.reason, timings, world, arguments, extra)
    return 0


def _forward_backward(linear: Float8Linear, x: Tensor, dy: Tensor) -> Callable[[], None]:
    def call() -> None:
        linear.weight.grad = x.grad = None
        linear(x).backward(dy)

    return call


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def _report(
    subject: str,
    title: str,
    backend: str,
    timings: Mapping[str, Timing],
    world: World,
    arguments: BenchArguments,
    facts: Mapping[str, Any],
) -> None:
    """Print the table, and write the JSON if asked for."""
    device = device_name(world.device)
    threads = f", {torch.get_num_threads()} threads" if world.device.type == "cpu" else ""
    lines = [
        f"{title}; {arguments.rounds} interleaved rounds",
        f"{device}{threads}, torch {torch.__version__}",
        backend,
        "",
        f"{'':12s} {'median':>10s} {'min':>10s} {'max':>10s}   time against {next(iter(timings))} (quartiles)",
    ]
    for name, timing in timings.items():
        times = " ".join(
            f"{1e3 * value:7.2f} ms" for value in (timing.median_seconds, timing.min_seconds, timing.max_seconds)
        )
        spread = f"{timing.ratio_low:.2f} ... {timing.ratio_high:.2f}"
        lines.append(f"{name:12s} {times}   {ratio_text(timing.ratio)} ({spread})")
    saved = {key.removeprefix("saved_bytes_"): value for key, value in facts.items() if key.startswith("saved_bytes_")}
    if saved:
        shares = ", ".join(f"{name} {bytes_text(size)}" for name, size in saved.items())
        first, *_, last = saved.values()
        lines.append(f"saved for backward: {shares} ({last / first:.3f}x)")
    sys.stdout.write("\n".join(lines) + "\n")
    if arguments.out is not None:
        content = {
            "subject": subject,
            "title": title,
            "device": device,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "backend": backend,
            "rounds": arguments.rounds,
            "timings": {name: asdict(timing) for name, timing in timings.items()},
            **facts,
        }
        write_file(Path(arguments.out), json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    from fp8train.errors import exit_code

    raise SystemExit(exit_code(main))
