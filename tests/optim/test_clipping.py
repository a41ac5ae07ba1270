"""Global norm and clipping."""

from __future__ import annotations

import math

import pytest
import torch

from fp8train.optim.clipping import CPU_PIECE, clip_grad_norm, global_norm

# A piece is summed in 8 lanes of CPU_PIECE / 8 FP32 additions, each off by 2^-24 of the sum; the root halves it.
ONE_PIECE = CPU_PIECE / 8 * 2.0**-24 / 2


def _parameters(*grads):
    parameters = []
    for grad in grads:
        parameter = torch.nn.Parameter(torch.zeros_like(grad))
        parameter.grad = grad
        parameters.append(parameter)
    return parameters


def test_norm_is_reported_before_clipping_and_gradients_are_scaled_to_max_norm():
    parameters = _parameters(torch.tensor([3.0, 0.0]), torch.tensor([[4.0]]))
    assert clip_grad_norm(parameters, 1.0).item() == 5.0
    assert [p.grad.flatten().tolist() for p in parameters] == [[pytest.approx(0.6), 0.0], [pytest.approx(0.8)]]


@pytest.mark.parametrize("max_norm", [None, 5.0, 6.0], ids=["off", "equal", "above"])
def test_gradients_below_the_limit_keep_every_bit(max_norm):
    parameters = _parameters(torch.tensor([3.0, 4.0]))
    assert clip_grad_norm(parameters, max_norm).item() == 5.0
    assert parameters[0].grad.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "minus_inf"])
def test_non_finite_norm_is_returned_and_leaves_gradients_alone(value):
    parameters = _parameters(torch.tensor([3.0, value]), torch.tensor([1.0]))
    norm = clip_grad_norm(parameters, 1.0)
    assert not norm.isfinite()
    assert parameters[0].grad[0].item() == 3.0
    assert parameters[1].grad.tolist() == [1.0]


def test_finite_gradients_whose_norm_overflows_are_not_turned_into_zeros():
    parameters = _parameters(torch.full((4,), 1e30))
    assert clip_grad_norm(parameters, 1.0).isinf()
    assert parameters[0].grad.tolist() == [pytest.approx(1e30)] * 4


@pytest.mark.parametrize("shape", [(CPU_PIECE,), (CPU_PIECE + 1,), (0,), (), (3, 0, 2)], ids=str)
def test_norm_of_any_shape_equals_float64(shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    assert global_norm([x]).item() == pytest.approx(
        x.double().norm().item(), rel=1e-6
    )  # 65536 FP32 additions: measured 2e-7


def test_norm_of_ten_million_elements_is_as_good_as_that_of_one_piece():
    torch.manual_seed(0)
    x = torch.randn(3163, 3163).t()  # not contiguous; torch's own norm is 3.6e-4 low here
    assert global_norm([x]).item() == pytest.approx(x.double().norm().item(), rel=ONE_PIECE)


def test_bf16_gradients_are_summed_in_fp32():
    parameters = _parameters(torch.full((4096,), 0.1, dtype=torch.bfloat16))
    want = 64 * torch.tensor(0.1, dtype=torch.bfloat16).item()
    norm = clip_grad_norm(parameters, None)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(want, rel=ONE_PIECE)  # a BF16 sum would stop at 256 terms


def test_no_gradient_anywhere_gives_norm_zero():
    assert clip_grad_norm([torch.nn.Parameter(torch.ones(2))], 1.0).item() == 0.0


def test_zero_gradients_stay_zero():
    parameters = _parameters(torch.zeros(3))
    assert clip_grad_norm(parameters, 1.0).item() == 0.0
    assert parameters[0].grad.tolist() == [0.0] * 3
