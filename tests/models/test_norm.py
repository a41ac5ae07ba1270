"""RMSNorm computes in FP32 and saves little."""

from __future__ import annotations

import pytest
import torch

from fp8train.models.norm import AddRMSNorm, RMSNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_equals_the_formula_in_fp64(dtype):
    generator = torch.Generator().manual_seed(1)
    norm = RMSNorm(96, eps=1e-3)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(96, generator=generator))
    x = (3 * torch.randn(2, 5, 96, generator=generator)).to(dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight.double()
    y = norm(x, torch.float32)
    # a mean of 96 squares, a reciprocal root and two products: fewer than 16 roundings of 2^-24
    assert (y.double() - exact).abs().max() <= 16 * 2**-24 * exact.abs().max()
    assert norm(x).dtype == dtype
    assert torch.equal(norm(x, torch.bfloat16), y.to(torch.bfloat16))


def test_gradient_of_the_weight_is_fp32_and_exact():
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    norm = RMSNorm(32, eps=1e-6)
    norm(x, torch.bfloat16).float().sum().backward()
    normed = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert norm.weight.grad.dtype == torch.float32
    # 64 terms of magnitude about 1: BF16 terms would be off by 2^-9 each
    assert (norm.weight.grad.double() - normed.sum(0)).abs().max() < 64 * 16 * 2**-24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("branch_dtype", [torch.float32, torch.bfloat16, None], ids=str)
def test_a_norm_that_adds_gives_the_sum_in_the_streams_dtype_and_its_norm(dtype, branch_dtype):
    generator = torch.Generator().manual_seed(3)
    x, branch = (torch.randn(2, 5, 96, generator=generator).to(kind or dtype) for kind in (dtype, branch_dtype))
    adding, norm = AddRMSNorm(96, eps=1e-3), RMSNorm(96, eps=1e-3)
    total, y = adding(x, branch if branch_dtype else None, torch.bfloat16)
    assert total.dtype == dtype and y.dtype == torch.bfloat16
    assert torch.equal(total, (x + branch).to(dtype) if branch_dtype else x)
    assert torch.equal(y, norm(total, torch.bfloat16)) and torch.equal(adding(x, None)[1], norm(x))
