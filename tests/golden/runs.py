"""Short runs of every shipped recipe, whose losses are kept in losses.json: `python -m tests.golden.runs` rewrites it.

Kept per recipe: the losses of 24 steps, and the spread of runs of the same machine whose initial weights differ by a
relative 1e-6, which is what another order of FP32 sums (another BLAS, instruction set, number of threads) amounts to.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from fp8train.recipe import available_recipes
from tests.perturbed_run import PerturbedTrainer, losses
from tests.tiny_run import tiny_config, tiny_train

KEPT = Path(__file__).with_name("losses.json")
STEPS = 24
PERTURBED_RUNS = 8


def golden_losses(folder: Path, recipe: str, run: str = "run") -> Tensor:
    """Losses of the run, fp64 [STEPS]."""
    tiny_train(folder, *_settings(recipe), run=run)
    return losses(folder / run)


def spread(folder: Path, recipe: str, golden: Tensor) -> Tensor:
    """Root mean square distance of perturbed runs from the golden one, largest so far at each step; fp64 [STEPS]."""
    apart = []
    for seed in range(PERTURBED_RUNS):
        PerturbedTrainer(tiny_config(folder, *_settings(recipe), run=f"perturbed{seed}"), seed).run()
        apart.append(losses(folder / f"perturbed{seed}") - golden)
    return torch.stack(apart).square().mean(0).sqrt().cummax(0).values


def _settings(recipe: str) -> tuple[str, ...]:
    return f"recipe={recipe}", f"steps={STEPS}", "data.holdout_fraction=0", "checkpoint.every=null"


def main() -> None:
    kept = {}
    for recipe in available_recipes():
        with tempfile.TemporaryDirectory() as folder:
            golden = golden_losses(Path(folder), recipe)
            kept[recipe] = {"losses": golden.tolist(), "spread": spread(Path(folder), recipe, golden).tolist()}
    KEPT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
