"""Weights that are made in each look at them (torch.nn.utils.parametrize)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tests.nn.precisions import normal
from tests.nn.test_weights import is_current, model_of


class Masked(nn.Module):
    """Another tenth of the weight is 0 in each look."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[Tensor] = []

    def forward(self, weight: Tensor) -> Tensor:
        self.masks.append(torch.rand_like(weight) > 0.1)
        return weight * self.masks[-1]


def test_a_parametrized_weight_is_made_once_a_forward_for_codes_and_gradients() -> None:
    model = model_of()
    masked = Masked()
    parametrize.register_parametrization(model[0], "weight", masked)
    x = normal(6, 130)
    for _ in range(2):
        masked.masks.clear()
        model.zero_grad()
        y = model[0](x)
        y.backward(normal(6, 140, seed=3))
        assert len(masked.masks) == 1
        original = model[0].parametrizations.weight.original
        assert bool((original.grad[~masked.masks[0]] == 0).all()) and int((original.grad == 0).sum()) < 2500
        assert bool((model[0].w_qdata.float()[~masked.masks[0]] == 0).all())
    masked.masks.clear()
    with parametrize.cached():
        model(x).sum().backward()
    assert len(masked.masks) == 1 and original.grad is not None
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert len(masked.masks) == 1 and is_current(model[2])
