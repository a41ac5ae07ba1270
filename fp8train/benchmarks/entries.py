"""Every launch entry of the GEMMs on the GPU that is there: TFLOP/s of full waves of tiles, and this machine's table.

All entries that pass their check multiply the same operands in turn, fprop and wgrad, M = N = K = size. While all
multiprocessors are busy a GEMM's time is the number of waves of tiles times the time of one; from these rates the
launch table (kernels/gemm_table.py) tells which entry is fastest for a shape.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fp8train.arguments import parse_arguments
from fp8train.backends import launch_rates
from fp8train.backends.admission import Admission
from fp8train.backends.interface import Backend
from fp8train.backends.kernel_codes import kernel
from fp8train.backends.selection import get_backend
from fp8train.backends.triton import triton_refusal
from fp8train.benchmarks.gemm import GemmArguments, compare
from fp8train.benchmarks.timing import BenchArguments, BenchResult, machine_lines, table, write_results
from fp8train.distributed import World
from fp8train.errors import ConfigError

OPERATIONS = {"gemm": "fprop", "gemm_wgrad": "wgrad"}


@dataclass(kw_only=True, slots=True)
class EntriesArguments(BenchArguments):
    """Launch entries of both GEMMs of backend triton.

    rounds: times that each entry is timed
    size: M, N and K
    write: keep the rates: from then on they are this machine's launch table, for this GPU, these versions and kernels
    """

    rounds: int = 9
    size: int = 8192
    write: bool = False

    def __post_init__(self) -> None:
        # not super(): a class with slots is made anew by the decorator, and super() would mean the first one
        BenchArguments.__post_init__(self)
        if self.size < 128 or self.size % 128:
            raise ConfigError(f"bench: size is {self.size}; needs a multiple of 128.")


def run(argv: Sequence[str], world: World) -> int:
    """Print the rate of every entry, beside that of the table; 1 if one was wrong or failed.

    Raises:
        ConfigError: no GPU or no Triton that runs the entries, or a size that does not fit.
    """
    arguments = parse_arguments(argv, EntriesArguments)
    device = world.device
    reason = "there is no GPU" if device.type != "cuda" else triton_refusal()
    if reason is not None:
        raise ConfigError(f"bench: entries cannot be measured: {reason}. Run it on the machine that trains.")
    index = device.index if device.index is not None else torch.cuda.current_device()
    sys.stdout.write(machine_lines(device, "launch entries of backend triton", arguments))
    results, rates = [], {}
    for operation, gemm in OPERATIONS.items():
        admitted, refused = _entries(operation, device)
        result = _timed(gemm, admitted, arguments, device)
        rates[operation] = result.facts["full_waves"] = full_wave_rates(operation, result, device)
        results.append(result)
        sys.stdout.write("\n" + table(result) + _lines(operation, rates[operation], device))
        sys.stdout.write("".join(f"{line}\n" for line in [*refused, *result.facts["failed"].values()]))
    write_results("entries", results, device, "launch entries of backend triton", arguments)
    if any(result.facts["wrong"] or result.facts["failed"] for result in results):
        return 1
    if arguments.write:
        sys.stdout.write(f"\nlaunch table of this machine from now on: {launch_rates.write(index, rates)}\n")
    return 0


def _entries(operation: str, device: torch.device) -> tuple[list[str], list[str]]:
    """Entries that may be used on this GPU, and a line for each that may not."""
    admission = Admission()
    admitted = [entry for entry in kernel(operation).CONFIGS if admission.admits(operation, entry, device)]
    return admitted, [f"not timed: {line}" for line in admission.refused]


def _timed(gemm: str, entries: Sequence[str], arguments: EntriesArguments, device: torch.device) -> BenchResult:
    backends: dict[str, Backend] = {entry: get_backend(f"triton:{entry}") for entry in entries}
    size, timing = arguments.size, GemmArguments(rounds=arguments.rounds, warmup=arguments.warmup)
    return compare(gemm, (size, size, size), backends, timing, device)


def full_wave_rates(operation: str, result: BenchResult, device: torch.device) -> dict[str, float]:
    """TFLOP/s of each entry while every multiprocessor has a tile: what the last wave lacks is added."""
    waves, tile_of = kernel("gemm_table").waves, kernel("gemm_tile").tile_of
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    M, N, K = (result.facts[name] for name in ("M", "N", "K"))
    rates = {}
    for entry, timing in result.timings.items():
        if entry in kernel(operation).CONFIGS:  # not the baseline
            rows, cols = tile_of(kernel(operation).CONFIGS[entry])
            full = waves(rows, cols, M, N, multiprocessors) * multiprocessors * rows * cols
            rates[entry] = round(2.0 * full * K / timing.median_seconds / 1e12, 1)
    return rates


def _lines(operation: str, rates: dict[str, float], device: torch.device) -> str:
    """Rates, the fastest first, each beside the table's own."""
    table_rates = kernel("gemm_table").table_rates(operation, torch.cuda.get_device_capability(device))
    lines = [f"{'':26s} {'full waves':>14s} {'launch table':>14s}"]
    for entry in sorted(rates, key=lambda name: -rates[name]):
        listed = f"{table_rates[entry][2]:7.0f} TFLOP/s" if entry in table_rates else "-"
        lines.append(f"{entry:26s} {rates[entry]:6.0f} TFLOP/s {listed:>14s}")
    return "\n".join(lines) + "\n"
