"""A small model with what conversion must respect, and the recipe that converts all of it to FP8."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tests.recipe_documents import document

EVERYTHING = document({"match": "*", "use": "fp8"})


class Block(nn.Module):
    """An MLP with a router and a bias; the smallest module that has what conversion must respect."""

    keep_high_precision = ("router",)

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(24, 40)
        self.down = nn.Linear(40, 24, bias=False)
        self.router = nn.Linear(24, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(x))) * self.router(x).sigmoid().mean(-1, keepdim=True)


class Model(nn.Module):
    """Blocks of that kind and a head."""

    def __init__(self, num_layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(num_layers))
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def names_and_identities(model: nn.Module) -> dict[str, int]:
    return {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
