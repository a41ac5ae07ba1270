"""What a linear saves for backward: bytes of unique storages, without parameters and weight operands."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fp8train.nn.inputs import InputCache
from fp8train.nn.linear import Float8Linear
from fp8train.nn.weights import OPERANDS
from fp8train.quant.formats import BF16, BLOCKWISE, LinearPrecision
from tests.nn.precisions import PRECISIONS, made, normal


def saved_bytes(linears: list[Float8Linear], forward: Callable[[], object]) -> int:
    """Bytes of all storages that backward will read, each once."""
    own = [linear.weight for linear in linears] + [linear.bias for linear in linears if linear.bias is not None]
    own += [getattr(linear, name) for linear in linears for name in OPERANDS if getattr(linear, name) is not None]
    theirs = {tensor.untyped_storage().data_ptr() for tensor in own}
    saved: dict[int, int] = {}
    kept = []

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in theirs:
            saved[storage.data_ptr()] = storage.nbytes()
        kept.append(storage)  # an address must not be used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        kept.append(forward())  # type: ignore[arg-type]
    return sum(saved.values())


@pytest.mark.parametrize("name", ["blockwise", "fp32-scales", "requant", "tensorwise", "gradients-in-e5m2"])
@pytest.mark.parametrize("rows", [256, 1024])
def test_one_linear_saves_half_of_bf16(name: str, rows: int) -> None:
    x = normal(rows, 512, dtype=torch.bfloat16).requires_grad_(True)
    held = {}
    for precision in (PRECISIONS[name], BF16):
        linear = made(1, 384, 512, precision)
        held[precision.name] = saved_bytes([linear], lambda linear=linear: linear(x))
    fp8, bf16 = held.values()
    assert bf16 == rows * 512 * 2
    # one byte a number and, in 1x128 blocks, 4 bytes per 128 of them: 1.03125 / 2 = 0.516
    assert fp8 <= 0.52 * bf16


class Block(nn.Module):
    """The linears of a decoder layer on the four tensors that they read: q, k, v; o; gate, up; down."""

    def __init__(self, precision: LinearPrecision, width: int = 256, hidden: int = 640) -> None:
        super().__init__()
        sizes = [(width, width), (width, 128), (width, 128), (width, width), (width, hidden), (width, hidden)]
        self.linears = nn.ModuleList([made(1, N, K, precision, bias=False) for K, N in (*sizes, (hidden, width))])
        cache = InputCache()
        for linear in self.linears:
            linear.inputs = cache

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return [linear(inputs[i]) for linear, i in zip(self.linears, (0, 0, 0, 1, 2, 2, 3), strict=True)]


@pytest.mark.parametrize("name", ["blockwise", "fp32-scales", "requant", "tensorwise"])
def test_linears_of_a_whole_block_save_half_of_bf16(name: str) -> None:
    widths = (256, 256, 256, 640)
    inputs = [normal(384, width, seed=width, dtype=torch.bfloat16).requires_grad_(True) for width in widths]
    held = []
    for precision in (PRECISIONS[name], BF16):
        block = Block(precision)
        held.append(saved_bytes(list(block.linears), lambda block=block: block(inputs)))
    assert held[1] == 384 * sum(widths) * 2  # BF16 shares the inputs too
    assert held[0] <= 0.52 * held[1]


def test_nothing_else_of_the_forward_stays_alive() -> None:
    # memory that is not saved but held by the graph all the same would show as a growth of live storages
    linear = made(1, 384, 512, BLOCKWISE)
    x = normal(512, 512, dtype=torch.bfloat16).requires_grad_(True) * 1
    y = linear(x)
    node = y.grad_fn.next_functions[0][0] if y.dim() != 2 else y.grad_fn
    while not hasattr(node, "saved_tensors") or "LinearFunction" not in type(node).__name__:
        node = node.next_functions[0][0]
    shapes = sorted(tuple(tensor.shape) for tensor in node.saved_tensors if tensor is not None)
    # column copy [K, M] and its scales, w.T [K, N] and its scales
    assert shapes == sorted([(512, 512), (512, 4), (512, 384), (4, 3)])
    attributes = [value for value in vars(node).values() if isinstance(value, Tensor)]
    assert attributes == []
