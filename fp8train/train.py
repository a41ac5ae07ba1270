"""Train a model: `fp8train train key=value ...`, or `torchrun ... -m fp8train.train key=value ...`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fp8train.config import RunConfig, load_config
from fp8train.distributed import World, rank_exit_code
from fp8train.errors import TrainingError
from fp8train.trainer import Trainer
from fp8train.trainer.agreement import joined
from fp8train.trainer.divergence import remedy
from fp8train.trainer.run_folder import RunResult


def run_training(config: RunConfig, world: World) -> RunResult:
    """Train as configured; every rank calls it.

    Args:
        config: with a run_dir.
        world: the ranks that train together.

    Returns:
        RunResult: as in result.json, with evals and coverage.

    Raises:
        UserError: configuration, data, folder or machine do not serve.
        TrainingError: training started and could not go on.
    """
    trainer = Trainer(config, world)
    if config.parallel.strategy == "fsdp" and world.world_size == 1:
        trainer.console.info("parallel=fsdp on one rank shards nothing: weights, gradients and moments stay whole")
    return trainer.run()


def main(argv: Sequence[str]) -> int:
    """Command line; see `fp8train train --help`.

    Raises:
        TrainingError: the run came to its end with a loss that is not finite; its files are written all the same.
    """
    with joined(lambda: load_config(argv, "train")) as (config, world):
        result = run_training(config, world)
    check_finite(result)
    return 0


def check_finite(result: RunResult) -> None:
    """Refuse the last held-out loss of a finished run, or its training loss where nothing is held out, as a result."""
    what, loss = "training", result.final_train_loss
    if result.evals:
        what, loss = "held-out", result.evals[-1]["eval_loss"]
    if result.finished and (loss is None or not math.isfinite(loss)):
        raise TrainingError(
            f"train: the {what} loss of {result.run_dir} is not finite after step {result.steps} "
            f"({result.skipped_steps} steps skipped); needs a finite one. {remedy(fp8=result.fp8_flops_share > 0)}, in "
            "another run_dir."
        )


if __name__ == "__main__":
    raise SystemExit(rank_exit_code(main))
