"""A short run of each shipped recipe: the same to the bit twice on one machine, and the kept losses on any."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fp8train.recipe import available_recipes
from tests.golden.runs import KEPT, STEPS, golden_losses

# A run on another machine differs from the kept one as the perturbed ones do. Of normal differences of that size one in
# 5e8 is larger than six root mean squares.
SPREADS = 6
# The logged loss is an FP32 sum over 512 tokens: roundings of 2^-24 that add up as the root of their number.
ROUNDING = 512**0.5 * 2**-24
GOLDEN = json.loads(KEPT.read_text(encoding="utf-8"))


def in_spreads(losses: torch.Tensor, recipe: str) -> torch.Tensor:
    """Distance from the kept losses of a recipe, in root mean squares of the perturbed runs."""
    kept, spread = (torch.tensor(GOLDEN[recipe][name], dtype=torch.float64) for name in ("losses", "spread"))
    return (losses - kept).abs() / torch.maximum(spread, ROUNDING * kept)


def test_every_recipe_has_kept_losses():
    assert sorted(GOLDEN) == sorted(available_recipes())


@pytest.mark.parametrize("recipe", sorted(GOLDEN))
def test_run_repeats_bit_for_bit_and_has_the_kept_losses(recipe: str, tmp_path: Path):
    one, two = (golden_losses(tmp_path, recipe, run=run) for run in ("one", "two"))
    assert len(one) == STEPS
    assert torch.equal(one, two)
    beyond = in_spreads(one, recipe)
    assert beyond.max() <= SPREADS, f"step {int(beyond.argmax()) + 1}: {beyond.max():.1f} times the spread"


def test_recipes_are_told_apart_by_their_losses():
    """The limit is far below what a recipe changes: a run in the wrong precision would not pass."""
    for recipe in set(GOLDEN) - {"bf16"}:
        assert in_spreads(torch.tensor(GOLDEN[recipe]["losses"], dtype=torch.float64), "bf16").max() > SPREADS, recipe
