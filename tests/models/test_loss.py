"""The chunked loss is the plain one, with FP32 gradients; the FP32 logits of all tokens never exist at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fp8train.models.loss import cross_entropy_sum
from fp8train.nn.linear import Float8Linear
from fp8train.quant.formats import BF16

VOCAB = 50


def problem(tokens: int = 700, hidden: int = 32, columns: int = 64) -> tuple[torch.Tensor, torch.Tensor, nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, hidden, generator=generator).requires_grad_()
    targets = torch.randint(0, VOCAB, (tokens,), generator=generator)
    targets[::7] = -100
    head = nn.Linear(hidden, columns, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(columns, hidden, generator=generator))
    return x, targets, head


@pytest.mark.parametrize("logits_per_chunk", [2**28, 300 * VOCAB, 1], ids=["one_chunk", "256_rows", "128_rows"])
def test_loss_and_gradients_equal_the_plain_ones_in_fp64(logits_per_chunk):
    x, targets, head = problem()
    loss = cross_entropy_sum(x, targets, head, VOCAB, logits_per_chunk)
    loss.backward()
    x64, w64 = x.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_()
    exact = F.cross_entropy((x64 @ w64.T)[:, :VOCAB], targets, reduction="sum", ignore_index=-100)
    exact.backward()
    assert loss.dtype == torch.float32 and loss.shape == ()
    # logits of 32 products, a softmax over 50, then sums over 700 tokens: 16 * sqrt(700) * 2^-24 relative
    tolerance = 16 * 700**0.5 * 2**-24
    assert abs(loss.item() - exact.item()) <= tolerance * exact.item()
    assert (x.grad.double() - x64.grad).norm() <= tolerance * x64.grad.norm()
    assert (head.weight.grad.double() - w64.grad).norm() <= tolerance * w64.grad.norm()


def test_padding_columns_take_no_part():
    x, targets, head = problem()
    loss = cross_entropy_sum(x, targets, head, VOCAB, 1)
    loss.backward()
    with torch.no_grad():
        head.weight[VOCAB:] += 100.0
    assert cross_entropy_sum(x, targets, head, VOCAB, 1).item() == loss.item()
    assert not head.weight.grad[VOCAB:].any() and head.weight.grad[:VOCAB].any()


def test_masked_targets_take_no_part():
    x, targets, head = problem(tokens=14)
    kept = targets != -100
    whole = cross_entropy_sum(x, targets, head, VOCAB)
    part = cross_entropy_sum(x[kept], targets[kept], head, VOCAB)
    assert whole.item() == pytest.approx(part.item(), rel=14 * 2**-24)
    nothing = cross_entropy_sum(x, torch.full_like(targets, -100), head, VOCAB)
    nothing.backward()
    assert nothing.item() == 0 and not head.weight.grad.any()


class LargestFp32(TorchDispatchMode):
    """Elements of the largest FP32 tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize(("logits_per_chunk", "rows"), [(2**28, 1024), (256 * VOCAB, 256)], ids=["one", "four"])
def test_fp32_logits_of_one_chunk_exist_at_once(logits_per_chunk, rows):
    x, targets, head = problem(tokens=1024, hidden=8)
    with LargestFp32() as largest:
        cross_entropy_sum(x, targets, head, VOCAB, logits_per_chunk).backward()
    assert rows * VOCAB <= largest.elements <= rows * 64


def test_bf16_head_sums_its_fp32_weight_gradient_over_chunks_without_rounding():
    """256 + 1 stays 257: two chunks whose gradients BF16 could not add."""
    head = Float8Linear.from_linear(nn.Linear(1, 2, bias=False), BF16, "cpu")
    with torch.no_grad():
        head.weight.zero_()
    x = torch.zeros(256, 1, dtype=torch.bfloat16)
    x[0], x[128] = -512.0, -2.0  # softmax is 1/2, 1/2: the gradient of weight[0] is x * (1/2 - 1), of weight[1] x * 1/2
    targets = torch.zeros(256, dtype=torch.int64)
    cross_entropy_sum(x, targets, head, 2, logits_per_chunk=1).backward()
    assert head.weight.grad.dtype == torch.float32
    assert head.weight.grad.flatten().tolist() == [257.0, -257.0]
