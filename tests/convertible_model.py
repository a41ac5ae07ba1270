"""Small models: one with what conversion must respect, and the recipe that converts all of it; a language model."""

from __future__ import annotations

from types import SimpleNamespace

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


class Bigrams(nn.Module):
    """The smallest model that the examples of the READMEs fit: called as a Hugging Face language model is."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(64, 128)
        self.layers = nn.ModuleList([nn.Linear(128, 128)])
        self.lm_head = nn.Linear(128, 64, bias=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = self.lm_head(self.layers[0](self.embed_tokens(tokens)))
        return SimpleNamespace(loss=F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))
