"""Matrices of a model that no rule of a recipe reaches, since they belong to no nn.Linear: experts, Conv1D, in_proj."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class UnreachedRow:
    """A module that owns matrices and is neither a linear nor an embedding.

    Args:
        fqn: module path; "" is the model itself.
        kind: name of its class.
        elements: of its matrices.
        names: of its matrices in the module.
    """

    fqn: str
    kind: str
    elements: int
    names: tuple[str, ...]


def unreached(model: nn.Module) -> Iterator[UnreachedRow]:
    """Every such module of a model once, in the order of its modules."""
    for fqn, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.EmbeddingBag):
            continue
        own = {name: matrix for name, matrix in module._parameters.items() if matrix is not None and matrix.dim() >= 2}
        if own:
            elements = sum(matrix.numel() for matrix in own.values())
            yield UnreachedRow(fqn=fqn, kind=type(module).__name__, elements=elements, names=tuple(own))


def joined(rows: Iterable[UnreachedRow]) -> dict[tuple[str, str], int]:
    """(path with * for each index, class) -> elements: one entry for all layers."""
    groups: dict[tuple[str, str], int] = {}
    for row in rows:
        path = ".".join("*" if word.isdigit() else word for word in row.fqn.split("."))
        key = path or "(the model)", row.kind
        groups[key] = groups.get(key, 0) + row.elements
    return groups


def paths_in_words(rows: Iterable[UnreachedRow]) -> dict[str, str]:
    """Path of each such module and of each of its matrices -> what it is, e.g. "a Conv1D"."""
    words: dict[str, str] = {}
    for row in rows:
        words[row.fqn] = f"a {row.kind}"
        words |= {f"{row.fqn}.{name}".lstrip("."): f"a parameter of a {row.kind}" for name in row.names}
    return words
