"""Forward and backward of one linear in BF16 and in a recipe's precision, and the bytes that it keeps in between."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fp8train.arguments import parse_arguments
from fp8train.backends import select_backend
from fp8train.benchmarks.timing import BenchArguments, BenchResult, interleaved, machine_lines, table, write_results
from fp8train.distributed import World
from fp8train.errors import ConfigError
from fp8train.nn.linear import Float8Linear
from fp8train.nn.weights import OPERANDS
from fp8train.quant.formats import BF16
from fp8train.recipe import load_recipe
from fp8train.units import bytes_text

BASELINE = "bf16"


@dataclass(kw_only=True, slots=True)
class LinearArguments(BenchArguments):
    """Forward and backward of one linear, in BF16 and in a recipe's precision.

    recipe: its first FP8 precision is timed
    backend: auto or a backend's name
    rows: tokens, M
    in_features: K
    out_features: N
    """

    recipe: str = "blockwise"
    backend: str = "auto"
    rows: int = 2048
    in_features: int = 1024
    out_features: int = 1024


def run(argv: Sequence[str], world: World) -> int:
    """Time the linear and count what it saves.

    Raises:
        ConfigError: the recipe has no FP8 precision.
    """
    arguments = parse_arguments(argv, LinearArguments)
    precisions = [precision for precision in load_recipe(arguments.recipe).precisions.values() if precision.any_fp8]
    if not precisions:
        raise ConfigError(f"bench: recipe {arguments.recipe} has no FP8 precision; needs one. Try recipe=blockwise.")
    selection = select_backend(arguments.backend, world.device.type, precisions)
    M, N, K = arguments.rows, arguments.out_features, arguments.in_features
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(M, K, generator=generator).to(world.device, torch.bfloat16).requires_grad_()
    dy = torch.randn(M, N, generator=generator).to(world.device, torch.bfloat16)
    calls, saved = {}, {}
    for name, precision in {BASELINE: BF16, arguments.recipe: precisions[0]}.items():
        backend = selection.backend.name
        linear = Float8Linear(K, N, bias=False, precision=precision, backend=backend, device=world.device)
        calls[name] = _forward_backward(linear, x, dy)
        saved[name] = saved_bytes(linear, lambda linear=linear: linear(x))  # type: ignore[misc]
    timings = interleaved(calls, arguments, world.device, kernels_only=True)
    facts = {"M": M, "N": N, "K": K, "saved_bytes": saved}
    result = BenchResult(title=f"linear forward + backward, M {M}, N {N}, K {K}", timings=timings, facts=facts)
    sys.stdout.write(machine_lines(world.device, selection.reason, arguments) + table(result))
    sizes = ", ".join(f"{name} {bytes_text(size)}" for name, size in saved.items())
    sys.stdout.write(f"saved for backward: {sizes} ({saved[arguments.recipe] / max(saved[BASELINE], 1):.3f}x)\n")
    write_results("linear", [result], world.device, selection.reason, arguments)
    return 0


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for backward, each storage once; parameters and weight codes do not count."""
    kept = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    for module in model.modules():
        held = [buffer for name in OPERANDS if (buffer := getattr(module, name, None)) is not None]
        kept |= {buffer.untyped_storage().data_ptr() for buffer in held}
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


def _forward_backward(linear: Float8Linear, x: Tensor, dy: Tensor) -> Callable[[], None]:
    def call() -> None:
        linear.weight.grad = x.grad = None
        linear(x).backward(dy)

    return call
