"""Quantisers of every backend that runs here, in bytes per second, against a copy measured in the same rounds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fp8train.arguments import parse_arguments
from fp8train.backends import BACKENDS, get_backend
from fp8train.backends.interface import Backend
from fp8train.benchmarks.timing import (
    BenchArguments,
    BenchResult,
    Timing,
    interleaved,
    machine_lines,
    table,
    write_results,
)
from fp8train.distributed import World
from fp8train.errors import ConfigError
from fp8train.quant import reference
from fp8train.quant.formats import BLOCKWISE, QuantSpec
from fp8train.quant.qtensor import QTensor

BASELINE = "copy"
CASES = {"row": (False,), "column": (True,), "both": (False, True), "weight": (False, True)}  # is a result transposed?
SHAPES = ((8192, 4096), (8192, 7168), (32768, 4096), (16384, 14336))
CHECKED_ROWS = 512  # of each result are compared with the definition, which is slow


@dataclass(kw_only=True, slots=True)
class QuantizeArguments(BenchArguments):
    """Quantisers: row copy, transposed column copy, both from one read, and a weight's codes with their transpose.

    backend: auto takes the first of triton and cpu that runs here
    cases: of row, column, both, weight
    shapes: [rows, columns]; null: activations of 4096 to 14336 channels
    """

    backend: str = "auto"
    cases: list[str] = field(default_factory=lambda: list(CASES))
    shapes: list[list[int]] | None = None


def run(argv: Sequence[str], world: World) -> int:
    """Check against the definition bit for bit, then time; returns 1 if some code or scale was wrong.

    Raises:
        ConfigError: no such case, or a shape that is not [rows, columns].
    """
    arguments = parse_arguments(argv, QuantizeArguments)
    shapes = [tuple(shape) for shape in arguments.shapes] if arguments.shapes is not None else SHAPES
    if unknown := set(arguments.cases) - set(CASES):
        raise ConfigError(f"bench: cases has {', '.join(sorted(unknown))}; needs some of {', '.join(CASES)}.")
    if any(len(shape) != 2 for shape in shapes):
        raise ConfigError(f"bench: shapes is {arguments.shapes}; needs a list of [rows, columns].")
    name = arguments.backend if arguments.backend != "auto" else _first(("triton", "cpu"), world.device)
    backend = get_backend(name)
    sys.stdout.write(machine_lines(world.device, f"{name}: {backend.note}", arguments))
    results = []
    for rows, cols in shapes:
        for case in arguments.cases:
            result, traffic = _compare(case, rows, cols, backend, arguments, world.device)
            results.append(result)
            sys.stdout.write("\n" + table(result, _rate(traffic)))
            if not result.facts["bitwise"]:
                sys.stdout.write("WRONG: codes or scales differ from the definition\n")
    write_results("quantize", results, world.device, f"{name}: {backend.note}", arguments)
    return int(not all(result.facts["bitwise"] for result in results))


def _rate(traffic: Mapping[str, float]) -> Callable[[str, Timing], str]:
    return lambda name, timing: f"  {traffic[name] / timing.median_seconds / 1e9:6.0f} GB/s"


def _first(names: Sequence[str], device: torch.device) -> str:
    reasons = {name: BACKENDS[name]().unavailable(device.type) for name in names}
    usable = [name for name, reason in reasons.items() if reason is None]
    if not usable:
        raise ConfigError(f"bench: no quantiser runs here: {'; '.join(f'{n}: {r}' for n, r in reasons.items())}.")
    return usable[0]


def _compare(
    case: str, rows: int, cols: int, backend: Backend, arguments: QuantizeArguments, device: torch.device
) -> tuple[BenchResult, dict[str, float]]:
    """One case on one shape: its timing beside a copy of the same tensor, and the bytes that each moves."""
    dtype = torch.float32 if case == "weight" else torch.bfloat16
    generator = torch.Generator(device=device).manual_seed(0)
    x = torch.randn(rows, cols, generator=generator, device=device).to(dtype)
    target = torch.empty_like(x)
    spec = BLOCKWISE.fprop.right if case == "weight" else BLOCKWISE.fprop.left
    assert spec is not None
    call = _quantiser(case, backend, x, spec)
    made = call()
    written = sum(q.qdata.nbytes + 4 * q.scale_inv.numel() for q in made)
    traffic = {BASELINE: 2.0 * x.nbytes, case: float(x.nbytes + written)}
    timings = interleaved({BASELINE: lambda: target.copy_(x), case: call}, arguments, device, kernels_only=True)
    share = traffic[case] / timings[case].median_seconds / (traffic[BASELINE] / timings[BASELINE].median_seconds)
    facts: dict[str, Any] = {
        "case": case,
        "rows": rows,
        "cols": cols,
        "bytes": traffic,
        "share_of_copy_bandwidth": share,
        "bitwise": all(_as_defined(q, flipped, x, spec) for q, flipped in zip(made, CASES[case], strict=True)),
    }
    return BenchResult(title=f"quantize {case}, {rows} x {cols} {dtype}", timings=timings, facts=facts), traffic


def _quantiser(case: str, backend: Backend, x: torch.Tensor, spec: QuantSpec) -> Callable[[], Sequence[QTensor]]:
    if case == "weight":
        return lambda: backend.quantize_square(x, spec)
    if case == "both":
        return lambda: backend.quantize_dual(x, spec, spec)
    return lambda: (backend.quantize(x, spec, case == "column"),)


def _as_defined(q: QTensor, transposed: bool, x: torch.Tensor, spec: QuantSpec) -> bool:
    """Whether the first rows of a result equal the definition's, bit for bit."""
    part = x[:, :CHECKED_ROWS] if transposed else x[:CHECKED_ROWS]
    wanted = reference.quantize(part, spec, transpose=transposed)
    codes, scales = q.qdata[: wanted.shape[0]], q.scale_inv[: wanted.scale_inv.shape[0]]
    same_codes = torch.equal(codes.view(torch.uint8), wanted.qdata.view(torch.uint8))
    return same_codes and torch.equal(scales.contiguous(), wanted.scale_inv)
