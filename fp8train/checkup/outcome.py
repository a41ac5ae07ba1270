"""What a check found: pass or fail, the two things that were compared, and what a failure usually means."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Result of one check.

    name: of the check, as `doctor --only` takes it; the check itself leaves it to doctor, which knows it by that name
    passed: false is a finding
    first, second: what was compared, each as "WHAT NUMBER"
    detail: how far apart they are, and how far they may be
    meaning: what a failure usually means, and what to do
    """

    name: str = ""
    passed: bool
    first: str
    second: str
    detail: str = ""
    meaning: str = ""

    def lines(self) -> str:
        """For the console: one line, and a second where it failed."""
        head = f"{'pass' if self.passed else 'FAIL'}  {self.name:14s} {self.first} | {self.second}"
        head += f" | {self.detail}" if self.detail else ""
        return head if self.passed else f"{head}\n      usually means: {self.meaning}"


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> tuple[float, str]:
    """Largest relative distance over tensors of one name, and that name; infinite where one lacks or is not finite."""
    worst, where = 0.0, "none"
    for name in sorted(one.keys() | other.keys()):
        apart = relative(other[name], one[name]) if name in one and name in other else math.inf
        if apart > worst:
            worst, where = apart, name
    return worst, where


def relative(value: Tensor, expected: Tensor) -> float:
    """||value - expected|| / ||expected||; 0 where both are 0, infinite where either is not finite."""
    return worst_row(value.reshape(1, -1), expected.reshape(1, -1))


def worst_row(value: Tensor, expected: Tensor) -> float:
    """Largest relative distance of a row [rows, cols]: a row of zeros must be zeros, and one not finite is far off."""
    apart = torch.linalg.vector_norm(value.double() - expected.double(), dim=1)
    size = torch.linalg.vector_norm(expected.double(), dim=1)
    ratio = torch.where(apart == 0, torch.zeros_like(apart), apart / size).nan_to_num(nan=math.inf, posinf=math.inf)
    return float(ratio.max()) if len(ratio) else 0.0
