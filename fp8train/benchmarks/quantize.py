"""Quantisers of every backend that runs here, in bytes per second, against a copy measured in the same rounds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fp8train.arguments import parse_arguments
from fp8train.backends import BACKENDS, get_backend
from fp8train.backends.interface import Backend, Copies
from fp8train.backends.producer_checks import EPS, wrong_norm_gradient
from fp8train.backends.producers import rotated
from fp8train.backends.triton import TritonBackend
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
# is a result transposed?
CASES = {
    "row": (False,), "column": (True,), "both": (False, True), "weight": (False, True), "transpose": (True,),
    "rmsnorm": (False, True), "add_rmsnorm": (False, True), "swiglu": (False, True),
    "swiglu_row": (False,), "swiglu_backward": (False, True, False, True, True), "rmsnorm_backward": (), "rope": (),
}  # fmt: skip
SHAPES = ((8192, 4096), (8192, 7168), (32768, 4096), (16384, 14336))
INPUTS = {"add_rmsnorm": 2, "swiglu": 2, "swiglu_row": 2, "swiglu_backward": 3, "rmsnorm_backward": 3}
STREAM = ("weight", "rmsnorm", "add_rmsnorm", "rmsnorm_backward")  # cases whose first input is in FP32
WITH_WORDS = ("both", "rmsnorm", "add_rmsnorm", "swiglu", "swiglu_backward")
HEAD_DIM = 128
CHECKED_ROWS = 512  # of each result are compared with the definition, which is slow


class Operation(NamedTuple):
    """What is timed.

    call: makes the results
    moved: bytes that have to be read and written for results
    right: whether results are the definition's
    """

    call: Callable[[], Any]
    moved: Callable[[Any], int]
    right: Callable[[Any], bool]


@dataclass(kw_only=True, slots=True)
class QuantizeArguments(BenchArguments):
    """Quantisers: row copy, transposed column copy, both from one read, a weight's codes with their transpose, and that
    transpose from the codes (weight_copies=one); and what makes the input or the gradient that it rounds: RMSNorm of an
    FP32 stream whose rstd is known; the same behind the sum that the stream is, which is two kernels; SwiGLU, with
    both copies and, as in a training step, the row copy alone; SwiGLU's backward, with h's column copy. And what a step
    has besides, with nothing to round: RMSNorm's backward with the stream's own gradient, and rotated queries or keys,
    of heads of 128 where the columns are so many.

    backend: auto takes the first of triton and cpu that runs here
    cases: of row, column, both, weight, transpose, rmsnorm, add_rmsnorm, swiglu, swiglu_row, swiglu_backward,
        rmsnorm_backward and rope
    shapes: [rows, columns]; null: activations of 4096 to 14336 channels
    plain: time the Triton kernels that take words of two numbers without them too, in the same rounds
    """

    backend: str = "auto"
    cases: list[str] = field(default_factory=lambda: list(CASES))
    shapes: list[list[int]] | None = None
    plain: bool = False


def run(argv: Sequence[str], world: World) -> int:
    """Check against the definition (bit for bit but for gradients of RMSNorm), then time; returns 1 if one was wrong.

    Raises:
        ConfigError: no such case, or a shape that is not [rows, columns], or halves of whose heads rope cannot rotate.
    """
    arguments = parse_arguments(argv, QuantizeArguments)
    shapes = [tuple(shape) for shape in arguments.shapes] if arguments.shapes is not None else SHAPES
    if unknown := set(arguments.cases) - set(CASES):
        raise ConfigError(f"bench: cases has {', '.join(sorted(unknown))}; needs some of {', '.join(CASES)}.")
    if any(len(shape) != 2 for shape in shapes):
        raise ConfigError(f"bench: shapes is {arguments.shapes}; needs a list of [rows, columns].")
    if "rope" in arguments.cases and (odd := [shape for shape in shapes if shape[1] % 2]):
        raise ConfigError(f"bench: shapes has {list(odd[0])}; rope needs an even number of columns.")
    name = arguments.backend if arguments.backend != "auto" else _first(("triton", "cpu"), world.device)
    backend = get_backend(name)
    sys.stdout.write(machine_lines(world.device, f"{name}: {backend.note}", arguments))
    results = []
    for rows, cols in shapes:
        for case in arguments.cases:
            result, traffic = _compare(case, rows, cols, backend, arguments, world.device)
            results.append(result)
            sys.stdout.write("\n" + table(result, _rate(traffic)))
            if not result.facts["right"]:
                sys.stdout.write("WRONG: not what the definition gives\n")
    write_results("quantize", results, world.device, f"{name}: {backend.note}", arguments)
    return int(not all(result.facts["right"] for result in results))


def _rate(traffic: Mapping[str, float]) -> Callable[[str, Timing], str]:
    return lambda name, timing: f"  {_gigabytes(traffic[name] / timing.median_seconds)} GB/s"


def _gigabytes(rate: float) -> str:
    return f"{rate / 1e9:6.0f}" if rate >= 1e11 else f"{rate / 1e9:6.1f}"


def _first(names: Sequence[str], device: torch.device) -> str:
    reasons = {name: BACKENDS[name]().unavailable(device.type) for name in names}
    usable = [name for name, reason in reasons.items() if reason is None]
    if not usable:
        raise ConfigError(f"bench: no quantiser runs here: {'; '.join(f'{n}: {r}' for n, r in reasons.items())}.")
    return usable[0]


def _compare(
    case: str, rows: int, cols: int, backend: Backend, arguments: QuantizeArguments, device: torch.device
) -> tuple[BenchResult, dict[str, float]]:
    """One case on one shape: its timing beside a copy of its first input, and the bytes that each must move."""
    dtype = torch.float32 if case in STREAM else torch.bfloat16
    generator = torch.Generator(device=device).manual_seed(0)
    inputs = [torch.randn(rows, cols, generator=generator, device=device) for _ in range(INPUTS.get(case, 1))]
    inputs = [inputs[0].to(dtype), *(x.bfloat16() for x in inputs[1:])]
    target = torch.empty_like(inputs[0])
    spec = BLOCKWISE.fprop.right if case in ("weight", "transpose") else BLOCKWISE.fprop.left
    assert spec is not None
    operation = _operation(case, backend, inputs, spec)
    made = operation.call()
    traffic = {BASELINE: 2.0 * target.nbytes, case: float(operation.moved(made))}
    calls: dict[str, Callable[[], object]] = {BASELINE: lambda: target.copy_(inputs[0]), case: operation.call}
    if arguments.plain and backend.name == "triton" and case in WITH_WORDS:
        calls[f"{case}, plain"] = _operation(case, TritonBackend(words=False), inputs, spec).call
        traffic[f"{case}, plain"] = traffic[case]
    timings = interleaved(calls, arguments, device, kernels_only=True)
    share = traffic[case] / timings[case].median_seconds / (traffic[BASELINE] / timings[BASELINE].median_seconds)
    facts: dict[str, Any] = {
        "case": case,
        "rows": rows,
        "cols": cols,
        "bytes": traffic,
        "share_of_copy_bandwidth": share,
        "right": operation.right(made),
    }
    return BenchResult(title=f"quantize {case}, {rows} x {cols} {dtype}", timings=timings, facts=facts), traffic


def _operation(case: str, backend: Backend, inputs: Sequence[Tensor], spec: QuantSpec) -> Operation:
    if case == "rmsnorm_backward":
        return _norm_gradients(backend, *inputs)
    if case == "rope":
        return _rotation(backend, inputs[0])
    call, sources = _quantiser(case, backend, inputs, spec)

    def moved(made: Sequence[QTensor]) -> int:
        written = sum(q.qdata.nbytes + 4 * q.scale_inv.numel() for q in made)
        if case == "transpose":
            return 2 * written
        summed = 2 * inputs[0].nbytes if case == "add_rmsnorm" else 0  # the sum, which the second kernel reads
        return sum(x.nbytes for x in inputs) + written + summed

    def right(made: Sequence[QTensor]) -> bool:
        of = [source for source in sources() for _ in range(2)]
        return all(_as_defined(*result, spec) for result in zip(made, CASES[case], of, strict=False))

    return Operation(call, moved, right)


def _norm_gradients(backend: Backend, x: Tensor, dy: Tensor, dtotal: Tensor) -> Operation:
    """As in a decoder: dy of the linears and the branch in BF16, the stream and its gradient in FP32."""
    weight, rstd = torch.linspace(0.5, 1.5, x.shape[1], device=x.device), backend.rstd(x, EPS)
    given = (dy, x, weight, rstd, dtotal.to(x.dtype))
    return Operation(
        lambda: backend.rms_norm_backward(*given, torch.bfloat16),
        lambda made: sum(tensor.nbytes for tensor in (*given, *made)),
        lambda made: wrong_norm_gradient(made, *given) is None,
    )


def _rotation(backend: Backend, x: Tensor) -> Operation:
    """Of one sequence, as a projection gives queries; cosines and sines are read once, from L2 after that."""
    rows, cols = x.shape
    head_dim = HEAD_DIM if cols % HEAD_DIM == 0 else cols
    heads = x.view(1, rows, cols // head_dim, head_dim).transpose(1, 2)
    angles = torch.arange(rows, device=x.device).outer(torch.logspace(0, -4, head_dim // 2, device=x.device))
    given = (heads, angles.cos(), angles.sin(), x.dtype, False)
    return Operation(
        lambda: backend.rope(*given),
        lambda made: sum(tensor.nbytes for tensor in (*given[:3], made)),
        lambda made: torch.equal(made, rotated(*given)),
    )


def _quantiser(
    case: str, backend: Backend, inputs: Sequence[Tensor], spec: QuantSpec
) -> tuple[Callable[[], Sequence[QTensor]], Callable[[], Sequence[Tensor]]]:
    """What is timed, and what the codes are of: for each two of them."""
    x, bf16 = inputs[0], torch.bfloat16
    if case == "weight":
        return lambda: _made(backend.quantize_square(x, spec)), lambda: [x]
    if case == "transpose":
        q, _ = backend.quantize_square(x, spec, turned=False)
        return lambda: (backend.transpose_codes(q),), lambda: [x]
    if case == "both":
        return lambda: backend.quantize_dual(x, spec, spec), lambda: [x]
    if case == "rmsnorm":
        weight, rstd = torch.linspace(0.5, 1.5, x.shape[1], device=x.device), backend.rstd(x, EPS)
        return (
            lambda: _made(backend.rmsnorm_quantize(x, weight, rstd, bf16, spec, spec)),
            lambda: [backend.rms_norm(x, weight, rstd, bf16)],
        )
    if case == "add_rmsnorm":
        weight = torch.linspace(0.5, 1.5, x.shape[1], device=x.device)
        return (
            lambda: _made(backend.rmsnorm_quantize(*_summed(backend, inputs, weight), bf16, spec, spec)),
            lambda: [backend.rms_norm(*_summed(backend, inputs, weight), bf16)],
        )
    if case in ("swiglu", "swiglu_row"):
        gate, up = inputs
        col = spec if case == "swiglu" else None
        return lambda: _made(backend.swiglu_quantize(gate, up, spec, col)), lambda: [backend.swiglu(gate, up)]
    if case == "swiglu_backward":
        dh, gate, up = inputs

        def training() -> list[QTensor]:
            *halves, h_t = backend.swiglu_backward_quantize(dh, gate, up, spec, spec, spec)
            return [q for copies in (*halves, (h_t,)) for q in copies if q is not None]

        return training, lambda: [*backend.swiglu_backward(dh, gate, up), backend.swiglu(gate, up)]
    return lambda: (backend.quantize(x, spec, case == "column"),), lambda: [x]


def _summed(backend: Backend, inputs: Sequence[Tensor], weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total, rstd = backend.add_rstd(inputs[0], inputs[1], EPS)
    return total, weight, rstd


def _made(copies: Copies) -> list[QTensor]:
    return [q for q in copies if q is not None]


def _as_defined(q: QTensor, transposed: bool, x: Tensor, spec: QuantSpec) -> bool:
    """Whether the first rows of a result equal the definition's, bit for bit."""
    part = x[:, :CHECKED_ROWS] if transposed else x[:CHECKED_ROWS]
    wanted = reference.quantize(part, spec, transpose=transposed)
    return QTensor(q.qdata[: wanted.shape[0]], q.scale_inv[: wanted.scale_inv.shape[0]], spec).same_bits(wanted)
