"""Interleaved timing: contestants take turns, so that a busy machine or a falling clock slows them alike.

Ratios are formed within a round, contestant against baseline, and quoted as median and quartiles over the rounds.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fp8train.errors import ConfigError
from fp8train.trainer.environment import device_name, environment
from fp8train.trainer.run_folder import write_file
from fp8train.units import ratio_text

FLUSH_BYTES = 256 * 2**20  # more than the level-2 cache of any GPU that has FP8 units (H100, H200: 50 MiB)


@dataclass(kw_only=True, slots=True)
class BenchArguments:
    """What every subject takes.

    rounds: times that each contestant is timed
    warmup: rounds before the first that counts
    threads: CPU threads; null: torch's own choice
    out: file that gets the figures as one JSON object; null: none
    """

    rounds: int = 20
    warmup: int = 3
    threads: int | None = None
    out: Path | None = None

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.warmup < 0:
            raise ConfigError(
                f"bench: got rounds={self.rounds} warmup={self.warmup}; needs rounds >= 1 and warmup >= 0."
            )
        if self.threads is not None:
            torch.set_num_threads(self.threads)


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Seconds of one contestant, and of each round against the baseline's; ratio_low and ratio_high are quartiles."""

    median_seconds: float
    min_seconds: float
    max_seconds: float
    ratio: float
    ratio_low: float
    ratio_high: float


@dataclass(kw_only=True, slots=True)
class BenchResult:
    """One comparison: its title, the timings by contestant (the baseline first), and facts such as shapes or bytes."""

    title: str
    timings: dict[str, Timing]
    facts: dict[str, Any] = field(default_factory=dict)


def interleaved(
    contestants: Mapping[str, Callable[[], Any]],
    arguments: BenchArguments,
    device: torch.device,
    *,
    kernels_only: bool = False,
) -> dict[str, Timing]:
    """Time callables in turn; the first is the baseline of the ratios.

    On CUDA the level-2 cache is overwritten before each call and the time is from event to event on the GPU's stream.

    Args:
        contestants: by name.
        arguments: number of rounds.
        device: where they compute.
        kernels_only: the GPU is kept busy until the host has enqueued the whole call, so that the time is that of the
            kernels; otherwise it is that of whichever is slower, host or GPU.
    """
    clock: Callable[[Callable[[], Any]], float] = _cpu_clock
    if device.type == "cuda":
        longest = max(map(_host_seconds, contestants.values())) if kernels_only else 0.0
        clock = _cuda_clock(device, longest)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(-arguments.warmup, arguments.rounds):
        for name, call in contestants.items():
            taken = clock(call)
            if number >= 0:
                seconds[name].append(taken)
    baseline = next(iter(seconds.values()))
    return {name: _timing(values, baseline) for name, values in seconds.items()}


def _cpu_clock(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _host_seconds(call: Callable[[], Any]) -> float:
    """Time until the host has enqueued a call, after one to warm up."""
    call()
    torch.cuda.synchronize()
    taken = _cpu_clock(call)
    torch.cuda.synchronize()
    return taken


def _cuda_clock(device: torch.device, busy_seconds: float) -> Callable[[Callable[[], Any]], float]:
    """Times a call after overwriting the level-2 cache once, and as often as takes the GPU twice busy_seconds."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def overwrite(times: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(times):
            flush.zero_()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / times

    times = 1 if busy_seconds == 0.0 else 1 + math.ceil(2 * busy_seconds / overwrite(8))

    def clock(call: Callable[[], Any]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(times):
            flush.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return clock


def _timing(values: list[float], baseline: list[float]) -> Timing:
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


def table(result: BenchResult, extra: Callable[[str, Timing], str] = lambda name, timing: "") -> str:
    """The comparison as text, a line for each contestant; `extra` adds to a line, such as TFLOP/s."""
    baseline = next(iter(result.timings))
    head = f"{'':14s} {'median':>10s} {'min':>10s} {'max':>10s}   time against {baseline} (quartiles)"
    lines = [result.title, head]
    for name, timing in result.timings.items():
        taken = (timing.median_seconds, timing.min_seconds, timing.max_seconds)
        times = " ".join(f"{1e3 * value:7.3f} ms" for value in taken)
        spread = f"{timing.ratio_low:.2f} ... {timing.ratio_high:.2f}"
        lines.append(f"{name:14s} {times}   {ratio_text(timing.ratio)} ({spread}){extra(name, timing)}")
    return "\n".join(lines) + "\n"


def machine_lines(device: torch.device, backend: str, arguments: BenchArguments) -> str:
    """Hardware, software and backend, for the head of a table."""
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    rounds = f"{arguments.rounds} interleaved rounds after {arguments.warmup} of warm-up"
    return f"{device_name(device)}{threads}, torch {torch.__version__}; {rounds}\n{backend}\n"


def write_results(
    subject: str, results: Sequence[BenchResult], device: torch.device, backend: str, arguments: BenchArguments
) -> None:
    """Write arguments.out, if it was given: versions, code, hardware, and every timing."""
    if arguments.out is None:
        return
    content = {
        "subject": subject,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "backend": backend,
        "arguments": {**asdict(arguments), "out": str(arguments.out)},
        "environment": environment(device),
        "results": [
            {
                "title": result.title,
                "timings": {name: asdict(timing) for name, timing in result.timings.items()},
                **result.facts,
            }
            for result in results
        ],
    }
    write_file(arguments.out, json.dumps(content, indent=2) + "\n")
