"""A short run of each shipped recipe: the same to the bit twice on one machine, and the kept losses on any."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fp8train.recipe import available_recipes
from tests.golden.runs import KEPT, SPREADS, STEPS, golden_losses, in_spreads

GOLDEN = json.loads(KEPT.read_text(encoding="utf-8"))


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
