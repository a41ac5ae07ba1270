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
# A run on another machine differs from the kept one as the perturbed ones do. Of normal differences of that size one in
# 5e8 is larger than six root mean squares.
SPREADS = 6
# The logged loss is an FP32 sum over 512 tokens: roundings of 2^-24 that add up as the root of their number.
ROUNDING = 512**0.5 * 2**-24


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


def in_spreads(losses: Tensor, recipe: str, wanted: Tensor | None = None) -> Tensor:
    """Distance from `wanted`, or else the kept losses of a recipe, in root mean squares of its perturbed runs."""
    content = json.loads(KEPT.read_text(encoding="utf-8"))[recipe]
    kept, spread = (torch.tensor(content[name], dtype=torch.float64) for name in ("losses", "spread"))
    return (losses - (kept if wanted is None else wanted)).abs() / torch.maximum(spread, ROUNDING * kept)


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
