"""What telemetry costs: a training step that is sampled against one that is not, and its share at telemetry.every."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fp8train.arguments import take_arguments
from fp8train.benchmarks.step import prepared
from fp8train.benchmarks.timing import BenchArguments, BenchResult, interleaved, machine_lines, table, write_results
from fp8train.config import RunConfig, config_to_dict, load_config
from fp8train.distributed import World
from fp8train.errors import ConfigError
from fp8train.trainer.step import StepResult, train_step
from fp8train.trainer.telemetry_watcher import TelemetryWatcher
from fp8train.units import count_text


def run(argv: Sequence[str], world: World) -> int:
    """Time steps of one model with and without a sample; the same weights, batch and recipe.

    Raises:
        ConfigError: telemetry.every is null.
    """
    arguments, rest = take_arguments(argv, BenchArguments, RunConfig)
    config = load_config(rest, "bench")
    if config.telemetry.every is None:
        raise ConfigError("bench: telemetry.every is null; needs a number of steps. Leave it out for the default.")
    step = _Step(config, world)
    timings = interleaved({"plain": lambda: step(False), "sampled": lambda: step(True)}, arguments, world.device)
    extra = timings["sampled"].ratio - 1
    share = extra / step.watcher.every
    title = f"training step, model {config.model.name}, {count_text(config.global_batch_tokens)} tokens"
    facts = {"model": config.model.name, "every": step.watcher.every, "telemetry_share": share}
    facts |= {"config": config_to_dict(config)}
    result = BenchResult(title=title, timings=timings, facts=facts)
    sys.stdout.write(machine_lines(world.device, step.reason, arguments) + table(result))
    sys.stdout.write(f"one sample in {step.watcher.every} steps: {100 * share:.2f} % of step time\n")
    write_results("telemetry", [result], world.device, step.reason, arguments)
    return 0


class _Step:
    """A training step on the first global batch, sampled or not."""

    def __init__(self, config: RunConfig, world: World) -> None:
        assembly, self._optimizer, self._batches = prepared(config, world)
        self.reason = assembly.report.backend_reason
        self.watcher = TelemetryWatcher(config, assembly, world, lambda text: None)
        self._model, self._world, self._clip = assembly.model, world, config.optim.clip_grad_norm

    def __call__(self, sampled: bool) -> StepResult:
        number = self.watcher.every if sampled else self.watcher.every + 1
        self.watcher.before_step(number, self._batches)
        result = train_step(self._model, self._optimizer, self._batches, self._world, clip=self._clip)
        self.watcher.after_step(number, result)
        return result
