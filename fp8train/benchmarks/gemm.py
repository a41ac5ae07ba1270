"""FP8 GEMMs of every backend that runs here, against the BF16 GEMM, on the shapes that DeepGEMM publishes.

fprop x[M,K] w[N,K]^T, dgrad dy[M,N] (w^T)[K,N]^T, wgrad (dy^T)[N,M] (x^T)[K,M]^T with FP32 output. Operands are random
and already quantised: the casts are the subject of `bench quantize`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

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
from fp8train.quant.formats import BLOCKWISE
from fp8train.quant.qtensor import QTensor
from fp8train.units import flops_text

BASELINE = "bf16"
# (N, K) of DeepGEMM tests/generators.py: the linears of DeepSeek-V3
SHAPES = ((2112, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))
NOT_TIMED = ("reference", "cpu_torch", "dequant_bf16")  # definitions and fallbacks: correct, not meant to be fast
TOLERANCE = {torch.bfloat16: 5e-6, torch.float32: 1e-7}  # calc_diff; rounding to bf16 alone costs 1.4e-6


@dataclass(kw_only=True, slots=True)
class GemmArguments(BenchArguments):
    """GEMMs on operands that are already quantised.

    backends: names; null: every one that runs here
    gemms: of fprop, dgrad, wgrad
    rows: tokens, M; several are timed one after the other
    shapes: [N, K] of the weights; null: DeepGEMM's
    accumulate: wgrad in FP8 adds to its result, as from the second micro-batch on; BF16 stays a plain product
    """

    backends: list[str] | None = None
    gemms: list[str] = field(default_factory=lambda: ["fprop", "dgrad", "wgrad"])
    rows: list[int] = field(default_factory=lambda: [4096, 8192])
    shapes: list[list[int]] | None = None
    accumulate: bool = False


def run(argv: Sequence[str], world: World) -> int:
    """Check, then time every GEMM; a backend that is wrong, or that fails, is not timed, and the status is 1.

    Raises:
        ConfigError: no such GEMM or backend, or a shape that is not [N, K].
    """
    arguments = parse_arguments(argv, GemmArguments)
    shapes = [tuple(shape) for shape in arguments.shapes] if arguments.shapes is not None else SHAPES
    if unknown := set(arguments.gemms) - set(BLOCKWISE.gemms):
        raise ConfigError(f"bench: gemms has {', '.join(sorted(unknown))}; needs some of {', '.join(BLOCKWISE.gemms)}.")
    if any(len(shape) != 2 for shape in shapes):
        raise ConfigError(f"bench: shapes is {arguments.shapes}; needs a list of [N, K].")
    backends, notes = _backends(arguments.backends, world.device)
    sys.stdout.write(machine_lines(world.device, "\n".join(notes), arguments))
    results = []
    for gemm in arguments.gemms:
        for M in arguments.rows:
            for N, K in shapes:
                results.append(compare(gemm, (M, N, K), backends, arguments, world.device))
                sys.stdout.write("\n" + table(results[-1], _rate(2.0 * M * N * K)))
                for name, diff in results[-1].facts["wrong"].items():
                    sys.stdout.write(f"{name:14s} NOT TIMED: calc_diff {diff:.1e} against the dequantised product\n")
                for name, error in results[-1].facts["failed"].items():
                    sys.stdout.write(f"{name:14s} NOT TIMED: {error}\n")
    write_results("gemm", results, world.device, "; ".join(notes), arguments)
    return int(any(result.facts["wrong"] or result.facts["failed"] for result in results))


def _rate(flops: float) -> Callable[[str, Timing], str]:
    return lambda name, timing: f"  {flops_text(flops / timing.median_seconds)}/s"


def _backends(names: Sequence[str] | None, device: torch.device) -> tuple[dict[str, Backend], list[str]]:
    """The backends to time, and a line for each that is not among them."""
    chosen, notes = {}, []
    for name in names if names is not None else [name for name in BACKENDS if name not in NOT_TIMED]:
        backend = get_backend(name)
        reason = backend.unavailable(device.type) or backend.unsupported(BLOCKWISE)
        if reason is None:
            chosen[name] = backend
            notes.append(f"{name}: {backend.note}")
        elif names is not None:
            raise ConfigError(f"bench: backend {name} cannot be used: {reason}. Leave it out.")
        else:
            notes.append(f"{name}: not timed, {reason}")
    return chosen, notes


def compare(
    gemm: str, sizes: tuple[int, int, int], backends: dict[str, Backend], arguments: GemmArguments, device: torch.device
) -> BenchResult:
    """Every backend's result against the product of the decoded operands, then the times of those that are right."""
    M, N, K = sizes
    rows, cols, contracted = {"fprop": (M, N, K), "dgrad": (M, K, N), "wgrad": (N, K, M)}[gemm]
    generator = torch.Generator(device=device).manual_seed(0)
    a = torch.randn(rows, contracted, generator=generator, device=device, dtype=torch.bfloat16)
    b = torch.randn(cols, contracted, generator=generator, device=device, dtype=torch.bfloat16)
    out_dtype = torch.float32 if gemm == "wgrad" else torch.bfloat16
    calls: dict[str, Callable[[], Any]] = {BASELINE: lambda: a @ b.T}
    wrong, failed = {}, {}
    adds = arguments.accumulate and gemm == "wgrad"
    for name, backend in backends.items():
        out = torch.zeros(rows, cols, dtype=out_dtype, device=device) if adds else None
        try:
            qa, qb = _quantised(backend, gemm, a, b)
            diff = calc_diff(_scaled(backend, qa, qb, out, out_dtype)(), _decoded_product(qa, qb))
        except Exception as error:  # a vendor's library may raise anything; the others are timed all the same
            failed[name] = f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
            continue
        if diff < TOLERANCE[out_dtype]:
            calls[name] = _scaled(backend, qa, qb, out, out_dtype)
        else:
            wrong[name] = diff
    facts = {"gemm": gemm, "M": M, "N": N, "K": K, "flops": 2.0 * M * N * K, "wrong": wrong}
    facts |= {"failed": failed}
    title = f"{gemm} M {M}, N {N}, K {K}"
    return BenchResult(title=title, timings=interleaved(calls, arguments, device, kernels_only=True), facts=facts)


def _quantised(backend: Backend, gemm: str, a: Tensor, b: Tensor) -> tuple[QTensor, QTensor]:
    spec = BLOCKWISE.gemms[gemm]
    assert spec.left is not None and spec.right is not None
    return backend.quantize(a, spec.left, False), backend.quantize(
        b.float() if gemm != "wgrad" else b, spec.right, False
    )


def _scaled(
    backend: Backend, qa: QTensor, qb: QTensor, out: Tensor | None, out_dtype: torch.dtype
) -> Callable[[], Tensor]:
    return lambda: backend.scaled_mm(qa, qb, None, out, out is not None, out_dtype)


def _decoded_product(qa: QTensor, qb: QTensor) -> Tensor:
    """FP64 on small operands, else FP32, whose own 1e-14 in calc_diff is far below the bounds with pow2 scales."""
    small = qa.shape[0] * qb.shape[0] * qa.shape[1] <= 2**30
    dtype = torch.float64 if small else torch.float32
    return qa.dequantize().to(dtype) @ qb.dequantize().to(dtype).T


def calc_diff(result: Tensor, wanted: Tensor) -> float:
    """1 - 2 <x, y> / (|x|^2 + |y|^2) in FP64, as DeepGEMM measures agreement; 1.0 where a NaN has crept in."""
    x, y = result.double(), wanted.double()
    diff = float(1.0 - 2.0 * (x * y).sum() / (x * x + y * y).sum())
    return diff if diff == diff else 1.0
