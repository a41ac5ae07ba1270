"""What a converted linear costs the host: forward and backward with kernels that compute nothing, against nn.Linear."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fp8train.arguments import parse_arguments
from fp8train.backends import selection
from fp8train.backends.cpu import CpuBackend
from fp8train.backends.interface import Square
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
from fp8train.nn.linear import Float8Linear
from fp8train.quant.formats import QuantSpec
from fp8train.quant.qtensor import QTensor
from fp8train.recipe import load_recipe

BACKEND = "no-op"
SIZE = 8  # of every dimension: nn.Linear's own arithmetic is then nothing beside its calls


@dataclass(kw_only=True, slots=True)
class HostArguments(BenchArguments):
    """Time on the host of one linear, forward and backward, with kernels that only allocate their results.

    recipe: its first FP8 precision is timed
    calls: forward and backward passes in a round
    threads: CPU threads; null: torch's own choice, whose helpers a busy machine keeps waiting
    """

    recipe: str = "blockwise"
    calls: int = 200
    threads: int | None = 1


class NoKernels(CpuBackend):
    """Allocates what kernels would write, and runs none."""

    name = BACKEND

    def quantize(self, x: Tensor, spec: QuantSpec, transpose: bool) -> QTensor:
        """See Backend."""
        rows, cols = reversed(x.shape) if transpose else x.shape
        return QTensor(
            torch.empty(rows, cols, dtype=spec.format.dtype), torch.empty(spec.scale_shape(rows, cols)), spec
        )

    def quantize_dual(self, x: Tensor, row: QuantSpec, col: QuantSpec) -> tuple[QTensor, QTensor]:
        """See Backend."""
        return self.quantize(x, row, False), self.quantize(x, col, True)

    def quantize_square(self, x: Tensor, spec: QuantSpec, out: Square | None = None, turned: bool = True) -> Square:
        """See Backend."""
        return self.quantize(x, spec, False), self.quantize(x, spec, True) if turned else None

    def transpose_codes(self, q: QTensor) -> QTensor:
        """See Backend."""
        qdata = torch.empty(q.shape[::-1], dtype=q.qdata.dtype)
        return QTensor(qdata, torch.empty(q.scale_inv.shape[::-1]), q.spec)

    def scaled_mm(
        self, a: QTensor, b: QTensor, bias: Tensor | None, out: Tensor | None, accumulate: bool, out_dtype: torch.dtype
    ) -> Tensor:
        """See Backend."""
        return torch.empty(a.qdata.shape[0], b.qdata.shape[0], dtype=out_dtype)


def run(argv: Sequence[str], world: World) -> int:
    """Print time per call of nn.Linear, of the converted linear, and of one torch.empty, by which to judge the machine.

    torch's number of threads and the list of backends are afterwards as before.

    Raises:
        RecipeError: no such recipe.
    """
    threads = torch.get_num_threads()
    try:
        return _run(parse_arguments(argv, HostArguments))
    finally:
        torch.set_num_threads(threads)
        selection.BACKENDS.pop(BACKEND, None)


def _run(arguments: HostArguments) -> int:
    device = torch.device("cpu")
    selection.BACKENDS[BACKEND] = NoKernels
    precision = next(found for found in load_recipe(arguments.recipe).precisions.values() if found.any_fp8)
    linears = {
        "nn.Linear": nn.Linear(SIZE, SIZE, bias=False, dtype=torch.bfloat16),
        arguments.recipe: Float8Linear(SIZE, SIZE, bias=False, precision=precision, backend=BACKEND),
    }
    calls = {name: _repeated(_forward_backward(linear), arguments.calls) for name, linear in linears.items()}
    calls["torch.empty"] = _repeated(lambda: torch.empty(SIZE), arguments.calls)
    timings = interleaved(calls, arguments, device)
    each = {name: 1e6 * timing.median_seconds / arguments.calls for name, timing in timings.items()}
    extra = each[arguments.recipe] - each["nn.Linear"]
    found = timings[arguments.recipe]
    facts = {
        "calls": arguments.calls,
        "microseconds": each,
        "extra_microseconds": extra,
        "measurable": measurable(found),
    }
    title = f"host, {arguments.calls} x forward + backward of one linear without arithmetic"
    result, reason = BenchResult(title=title, timings=timings, facts=facts), "kernels that compute nothing"
    sys.stdout.write(machine_lines(device, reason, arguments) + table(result))
    sys.stdout.write(", ".join(f"{name} {time:.1f} us" for name, time in each.items()) + " a call; ")
    costs = f"a converted linear costs {extra:.1f} us more than nn.Linear"
    if not facts["measurable"]:
        spread = f"{found.ratio_low:.2f} to {found.ratio_high:.2f}"
        costs = f"what a converted linear costs more is not measurable here: it took {spread} times nn.Linear's time"
    sys.stdout.write(f"{costs}\n")
    write_results("host", [result], device, reason, arguments)
    return 0


def measurable(timing: Timing) -> bool:
    """Whether the rounds agree (quartiles) to less than what the linear takes beyond the baseline."""
    return timing.ratio - 1 > timing.ratio_high - timing.ratio_low


def _forward_backward(linear: nn.Module) -> Callable[[], None]:
    x = torch.randn(SIZE, SIZE).bfloat16().requires_grad_()
    dy = torch.randn(SIZE, SIZE).bfloat16()

    def call() -> None:
        linear.weight.grad = x.grad = None
        if isinstance(linear, Float8Linear):
            linear.inputs.clear()  # as the first reader of an input; k, v and up find it quantised
        linear(x).backward(dy)

    return call


def _repeated(call: Callable[[], object], times: int) -> Callable[[], None]:
    def calls() -> None:
        for _ in range(times):
            call()

    return calls
