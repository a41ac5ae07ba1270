"""Train a model: `fp8train train key=value ...`, or `torchrun ... -m fp8train.train key=value ...`."""

from __future__ import annotations

from collections.abc import Sequence

from fp8train.config import RunConfig, load_config
from fp8train.distributed import init, rank_exit_code
from fp8train.trainer import Trainer
from fp8train.trainer.console import Console
from fp8train.trainer.run_folder import RunResult


def run_training(config: RunConfig, console: Console | None = None) -> RunResult:
    """Train as configured, in this process and those that torchrun started beside it.

    Args:
        config: with a run_dir.
        console: where progress is shown; None is standard output, on rank 0.

    Returns:
        RunResult: as in result.json, with evals and coverage.

    Raises:
        UserError: configuration, data, folder or machine do not serve.
        TrainingError: training started and could not go on.
    """
    with init(config.parallel.timeout_seconds) as world:
        return Trainer(config, world, console).run()


def main(argv: Sequence[str]) -> int:
    """Command line; see `fp8train train --help`."""
    run_training(load_config(argv, "train"))
    return 0


if __name__ == "__main__":
    raise SystemExit(rank_exit_code(main))
