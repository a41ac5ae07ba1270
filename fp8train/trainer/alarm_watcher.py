"""Watcher: on a step that is not finite, or a loss that has risen, demotes the worst linear; back to the checkpoint."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fp8train.data import Batch
from fp8train.distributed import World
from fp8train.nn.shared_inputs import group_of
from fp8train.quant.formats import BLOCKWISE
from fp8train.recipe_options import Alarm
from fp8train.telemetry.observer import Observer
from fp8train.telemetry.table import Sample, samples, to_row, worst
from fp8train.trainer.assembly import Assembly
from fp8train.trainer.precision_control import PrecisionControl, demotions
from fp8train.trainer.probe import pass_apart
from fp8train.trainer.rollback import RollBack
from fp8train.trainer.run_folder import EVENTS_FILE, write_file
from fp8train.trainer.step import StepResult
from fp8train.trainer.watcher import Watcher

PROBE_ROWS = 1024


class AlarmWatcher(Watcher):
    """Decides from numbers that are the same on every rank; the worst linear is that of all ranks together.

    The step's first micro-batch runs once more. The worst is the linear, among those that quantise, at which the first
    non-finite number turns up, in the order in which forward and then backward run; with none, the one whose operands
    lose most by the 99th percentile of their rows' errors. Linears that read the same input are demoted with it. What
    happened is a line of events.jsonl.

    Args:
        alarm: the recipe's.
        control: shared with the schedule.
        assembly: the model.
        world: the ranks, which agree on the worst.
        run_dir: rank 0 writes the event there.
        warn: takes a line when the alarm can do no more.
    """

    name = "alarm"

    def __init__(
        self,
        alarm: Alarm,
        control: PrecisionControl,
        assembly: Assembly,
        world: World,
        run_dir: Path,
        warn: Callable[[str], None],
    ) -> None:
        self._alarm = alarm
        self._control = control
        self._model = assembly.model
        self._world = world
        self._run_dir = run_dir
        self._warn = warn
        self._losses: list[float] = []
        self._demotions = 0
        self._batch: Batch | None = None

    def before_step(self, step: int, batches: Sequence[Batch]) -> None:
        """Keep the first micro-batch at hand; before the first step drop events of steps that a resume undid."""
        if self._batch is None and self._world.main:
            _keep_first(self._run_dir / EVENTS_FILE, self._demotions)
        self._batch = batches[0]

    def after_step(self, step: int, result: StepResult) -> dict[str, Any]:
        """Sound the alarm if there is cause.

        Raises:
            RollBack: a linear was demoted.
        """
        cause = self._cause(result)
        if cause is None:
            self._keep(result.loss)
            return {}
        if self._demotions >= self._alarm.at_most:
            self._keep(result.loss)
            return {"alarm": f"{cause}; at_most={self._alarm.at_most} demotions are used up"}
        sample = self._worst(step)
        if sample is None:
            self._keep(result.loss)
            self._warn(f"step {step}: {cause}; no linear is left to demote, training goes on as it is")
            return {"alarm": f"{cause}; nothing left to demote"}
        group = group_of(sample.fqn, self._control.linears)
        new = [fqn for fqn in group if fqn not in self._control.demoted]
        self._control.demoted |= dict.fromkeys(new, f"an alarm put it in BF16 after step {step}: {cause}")
        self._demotions += 1
        self._losses = []
        reason = f"{cause}; {', '.join(new)} to BF16 ({sample.operand} of {sample.fqn.rpartition('.')[2]} lost most)"
        self._log(step, cause, new, sample, result)
        raise RollBack(self.name, reason)

    def _keep(self, loss: float) -> None:
        """Count the loss of a step that stands among those that the next is compared with."""
        if math.isfinite(loss):
            self._losses = [*self._losses, loss][-self._alarm.window :]

    def state(self) -> dict[str, Any]:
        """Demotions, and the losses that the next is compared with."""
        return {"demoted": dict(self._control.demoted), "demotions": self._demotions, "losses": self._losses}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self._control.demoted = demotions(state)
        self._demotions = state.get("demotions", 0)
        self._losses = list(state.get("losses", ()))

    def _cause(self, result: StepResult) -> str | None:
        if not result.updated:
            return "loss or gradient is not finite" if "nonfinite" in self._alarm.on else None
        if "spike" not in self._alarm.on or len(self._losses) < self._alarm.window:
            return None
        usual = statistics.fmean(self._losses)
        if result.loss - usual <= self._alarm.spike_nats:
            return None
        return f"loss {result.loss:.4g} is {result.loss - usual:.3g} above the mean of {self._alarm.window} steps"

    def _worst(self, step: int) -> Sample | None:
        """The operand that loses most, of all ranks; None where no linear quantises."""
        candidates = {fqn: linear for fqn, linear in self._control.linears.items() if linear.precision.quantized}
        if not candidates:
            return None
        assert self._batch is not None, "before_step comes first"
        observer = Observer(candidates, BLOCKWISE, PROBE_ROWS)
        observer.begin()
        pass_apart(self._model, self._batch, self._world.device, self._control.linears.values())
        row = {"step": step, **to_row(observer.end(), (), 0.0)}
        every = [sample for rank_row in self._world.all_gather_object(row) for sample in samples(rank_row)]
        return first_nonfinite(every, list(candidates)) or worst(every, 1)[0]

    def _log(self, step: int, cause: str, demoted: Sequence[str], sample: Sample, result: StepResult) -> None:
        if not self._world.main:
            return
        loss = result.loss if math.isfinite(result.loss) else None
        event = {
            "event": "demotion",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "step": step,
            "cause": cause,
            "loss": loss,
            "demoted": list(demoted),
            "worst": {"fqn": sample.fqn, "operand": sample.operand, **sample.stats},
            "all_demoted": list(self._control.demoted),
        }
        try:
            with (self._run_dir / EVENTS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(event, allow_nan=False) + "\n")
        except OSError as error:  # a record only: the demotion is in the checkpoint, and in coverage.json
            self._warn(f"{self._run_dir / EVENTS_FILE}: cannot be written ({error.strerror or error})")


def _keep_first(path: Path, count: int) -> None:
    """Drop all but the first lines of a file, if there is one."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    if len(lines) > count:
        write_file(path, "".join(lines[:count]))


def first_nonfinite(found: Sequence[Sample], order: Sequence[str]) -> Sample | None:
    """The sample at which non-finite numbers begin; None if there are none. What comes after it only hands them on.

    Args:
        found: samples of one pass.
        order: module paths of the linears in the order of forward.
    """
    broken = [sample for sample in found if sample.stats["nonfinite"]]
    forward = [sample for sample in broken if sample.operand != "dy"]
    if forward:
        return min(forward, key=lambda sample: (order.index(sample.fqn), sample.operand))
    return max(broken, key=lambda sample: order.index(sample.fqn), default=None)
