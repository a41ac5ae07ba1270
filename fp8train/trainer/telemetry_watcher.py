"""Watcher: statistics of the operands of every linear, every so many steps, and the worst of them at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from fp8train.config import RunConfig
from fp8train.data import Batch
from fp8train.distributed import World
from fp8train.nn.gathered_operands import show_weights
from fp8train.nn.weights import named_linears
from fp8train.shards import is_sharded
from fp8train.telemetry.observer import Observer, what_if_precision
from fp8train.telemetry.table import first_nonfinite, samples, to_row, worst_table
from fp8train.trainer.assembly import Assembly
from fp8train.trainer.probe import pass_apart
from fp8train.trainer.step import StepResult
from fp8train.trainer.watcher import Watcher


class TelemetryWatcher(Watcher):
    """Samples on rank 0, in the first micro-batch of a step; training computes the same numbers with and without it.

    A compiled model must not be looked into: it is sampled in a pass of its own, uncompiled, over that micro-batch.

    Args:
        config: telemetry, log.every (what is sampled must be logged), compile and steps are read.
        assembly: the model.
        world: its rank 0 samples.
        info: takes the table at the end.
    """

    name = "telemetry"

    def __init__(self, config: RunConfig, assembly: Assembly, world: World, info: Callable[[str], None]) -> None:
        assert config.telemetry.every is not None, "a watcher is only made where it is to sample"
        logged = config.log.every
        self.every = -(-config.telemetry.every // logged) * logged
        self._steps = config.steps
        self._compiled = config.compile
        self._world = world
        self._info = info
        self._model = assembly.model
        self._linears = named_linears(assembly.model)
        precision = what_if_precision(linear.precision for linear in self._linears.values())
        self._observer = Observer(self._linears, precision, config.telemetry.rows)
        self._looking = False
        self._apart_seconds = 0.0
        self._last: dict[str, Any] = {}

    def before_step(self, step: int, batches: Sequence[Batch]) -> None:
        """Begin to look, if this step is sampled."""
        if step % self.every:
            return
        show_weights(self._linears.values(), True)
        self._looking = self._world.main
        if self._looking:
            self._observer.begin()
        if self._compiled and (self._looking or is_sharded(self._model.parameters())):  # who shards must join in
            begin = time.perf_counter()
            pass_apart(self._model, batches[0], self._world.device, self._linears.values())
            self._apart_seconds = time.perf_counter() - begin
            show_weights(self._linears.values(), False)  # or the step would compile every layer anew

    def after_step(self, step: int, result: StepResult) -> dict[str, Any]:
        """What was seen, see to_row; at the end of the run the worst go to the console."""
        row: dict[str, Any] = {}
        if step % self.every == 0:
            show_weights(self._linears.values(), False)
        if self._looking:
            self._looking = False
            values = self._observer.end()
            seconds = self._apart_seconds if self._compiled else self._observer.seconds
            row = to_row(values, self._observer.what_if, seconds)
            self._last = {"step": step, **row}
            self._tell_nonfinite()
        if self._last and (result.stop or step == self._steps):
            self._info(
                f"operands that lose most precision, at step {self._last['step']} (telemetry.every={self.every}):\n"
                + worst_table(self._last)
            )
        return row

    def _tell_nonfinite(self) -> None:
        found = list(samples(self._last))
        first = first_nonfinite(found)
        if first is not None:
            count = sum(bool(sample.stats["nonfinite"]) for sample in found)
            self._info(
                f"step {self._last['step']}: {count} of {len(found)} operands on rank 0 are not finite, first in the "
                f"order of the model {first.operand} of {first.fqn}"
            )
