"""Watcher: on a step that is not finite, or a loss that has risen, demotes the worst linear; back to the checkpoint.

Not where BF16 would have fared as badly: a linear is demoted only for what its rounding may have done.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fp8train.data import Batch
from fp8train.distributed import World
from fp8train.nn.linear import Float8Linear
from fp8train.nn.shared_inputs import group_of
from fp8train.quant.formats import BF16, BLOCKWISE
from fp8train.recipe_options import Alarm
from fp8train.shards import local
from fp8train.telemetry.observer import Observer
from fp8train.telemetry.table import samples, to_row, worst
from fp8train.trainer.assembly import Assembly
from fp8train.trainer.precision_control import PrecisionControl, demotions
from fp8train.trainer.probe import pass_apart
from fp8train.trainer.run_folder import EVENTS_FILE, write_file
from fp8train.trainer.step import StepResult
from fp8train.trainer.suspect import OUTSIDE, find_culprit, finite_in_bf16, loss_of
from fp8train.trainer.watcher import RollBack, Watcher

PROBE_ROWS = 1024
BROKEN = "a weight is not finite"


class AlarmWatcher(Watcher):
    """Decides from numbers that are the same on every rank; the worst linear is that of all ranks together.

    The step's micro-batches run once more in BF16. Where a step was not finite and is not in BF16 either, or its loss
    reads as in BF16 while the last step without cause still reads as it did, FP8 has not done it and nothing is
    demoted. Else the worst is the linear at which the first non-finite number was made (suspect.py); with none, the one
    whose operands lose most by the 99th percentile of their rows' errors. Linears that read the same input are demoted
    with it. Where a weight is not finite the run goes back without a demotion, which counts as one. What happened is a
    line of events.jsonl.

    Args:
        alarm: the recipe's.
        control: shared with the schedule.
        assembly: the model.
        world: the ranks, which agree on the worst.
        run_dir: rank 0 writes the event there.
        warn: takes a line when the alarm does nothing.
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
        self._events = 0
        self._quiet_until = 0
        self._before: Sequence[Batch] = ()  # micro-batches of the last step without cause
        self._batches: Sequence[Batch] = ()
        self._pending: dict[str, Any] = {}  # of a demotion whose step to go back to is not known yet

    def before_step(self, step: int, batches: Sequence[Batch]) -> None:
        """Keep the micro-batches at hand; before the first step drop events of steps that a resume undid."""
        if not self._batches and self._world.main:
            _keep_first(self._run_dir / EVENTS_FILE, self._events)
        self._batches = batches

    def after_step(self, step: int, result: StepResult) -> dict[str, Any]:
        """Sound the alarm if there is cause.

        Raises:
            RollBack: a linear was demoted.
        """
        cause = self._cause(result)
        if cause is None:
            self._keep(result.loss)
            self._before = self._batches
            return {}
        if self._demotions >= self._alarm.at_most:
            return self._spared(step, result, cause, f"at_most={self._alarm.at_most} demotions are used up")
        candidates = {fqn: linear for fqn, linear in self._control.linears.items() if linear.precision.quantized}
        if not candidates:
            return self._spared(step, result, cause, "nothing left to demote")
        if not result.updated and self._weights_broken():
            self._demotions += 1
            self._pending = {"event": "return", **self._facts(step, cause, result), "demoted": [], "why": BROKEN}
            raise RollBack(f"{cause}; {BROKEN}")
        innocent = self._innocent(result)
        if innocent is not None:
            return self._spared(step, result, cause, f"not by FP8: {innocent}")
        culprit, fault = self._worst(step, result, candidates)
        if culprit == OUTSIDE:
            return self._spared(step, result, cause, "no linear made what is not finite")
        group = group_of(culprit, self._control.linears)
        new = [fqn for fqn in group if fqn in candidates]
        self._control.demoted |= dict.fromkeys(new, f"an alarm put it in BF16 after step {step}: {cause}")
        self._demotions += 1
        self._pending = {"event": "demotion", **self._facts(step, cause, result), "demoted": new, "worst": fault}
        words = fault.get("operand")
        why = f"{words} of {culprit} lost most" if words else f"the first number that is not finite is {culprit}'s"
        raise RollBack(f"{cause}; {', '.join(new)} to BF16 ({why})")

    def _keep(self, loss: float) -> None:
        """Count the loss of a step that stands among those that the next is compared with."""
        if math.isfinite(loss):
            self._losses = [*self._losses, loss][-self._alarm.window :]

    def _spared(self, step: int, result: StepResult, cause: str, why: str) -> dict[str, Any]:
        """A step that stands, although there is cause: why nothing is demoted, for the console once in a window."""
        self._keep(result.loss)
        if step >= self._quiet_until:
            self._quiet_until = step + self._alarm.window
            self._warn(f"step {step}: {cause}; {why}; training goes on as it is")
        self._log({"event": "spared", **self._facts(step, cause, result), "why": why})
        return {"alarm": f"{cause}; {why}"}

    def state(self) -> dict[str, Any]:
        """Demotions, events, and the losses that the next is compared with."""
        demoted = dict(self._control.demoted)
        return {"demoted": demoted, "demotions": self._demotions, "events": self._events, "losses": self._losses}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self._control.demoted = demotions(state)
        self._demotions = state.get("demotions", 0)
        self._events = state.get("events", self._demotions)
        self._losses = list(state.get("losses", ()))

    def roll_back(self, step: int, state: dict[str, Any]) -> None:
        """Keep the demotions, with the step from which they hold, and take back the losses alone."""
        self._losses = list(state.get("losses", ()))
        self._before = self._batches = ()
        if self._pending:
            event, self._pending = self._pending, {}
            text = f"an alarm at step {event['step']} put it in BF16 from step {step + 1}: {event['cause']}"
            self._control.demoted |= dict.fromkeys(event["demoted"], text)
            self._log({**event, "returned_to": step, "all_demoted": list(self._control.demoted)})

    def _cause(self, result: StepResult) -> str | None:
        if not result.updated:
            return "loss or gradient is not finite" if "nonfinite" in self._alarm.on else None
        if "spike" not in self._alarm.on or len(self._losses) < self._alarm.window:
            return None
        usual = statistics.fmean(self._losses)
        if result.loss - usual <= self._alarm.spike_nats:
            return None
        return f"loss {result.loss:.4g} is {result.loss - usual:.3g} above the mean of {self._alarm.window} steps"

    def _innocent(self, result: StepResult) -> str | None:
        """Why FP8 has not made the step as it is, or None where it may have."""
        args = self._world, self._control.linears
        if not result.updated:
            return None if finite_in_bf16(self._model, self._batches, *args) else "BF16 is not finite either"
        if not self._before:
            return None
        usual = statistics.fmean(self._losses)
        before = loss_of(self._model, self._before, *args, BF16)
        # both on the weights after the step, which has learned of these very tokens
        own, high = (loss_of(self._model, self._batches, *args, precision) for precision in (None, BF16))
        if own - high <= (result.loss - usual) / 2 and before <= usual + self._alarm.spike_nats:
            return f"after the step it reads {own:.4g}, BF16 {high:.4g} and {before:.4g} for the tokens before"
        return None

    def _weights_broken(self) -> bool:
        """Whether a weight is not finite on some rank: no precision helps, only an earlier checkpoint."""
        own = any(not bool(local(p.detach()).isfinite().all()) for p in self._model.parameters())
        return self._world.any(own)

    def _worst(
        self, step: int, result: StepResult, candidates: Mapping[str, Float8Linear]
    ) -> tuple[str, dict[str, Any]]:
        """The linear to demote, or OUTSIDE, and what speaks against it."""
        if not result.updated:
            culprit = find_culprit(self._model, self._batches, self._world, self._control.linears)
            if culprit is not None:
                return culprit, {"fqn": culprit, "nonfinite": True}
        observer = Observer(candidates, BLOCKWISE, PROBE_ROWS)
        observer.begin()
        pass_apart(self._model, self._batches[0], self._world.device, self._control.linears.values())
        row = {"step": step, **to_row(observer.end(), (), 0.0)}
        every = [sample for rank_row in self._world.all_gather_object(row) for sample in samples(rank_row)]
        sample = worst(every, 1)[0]
        return sample.fqn, {"fqn": sample.fqn, "operand": sample.operand, **sample.stats}

    def _facts(self, step: int, cause: str, result: StepResult) -> dict[str, Any]:
        loss = result.loss if math.isfinite(result.loss) else None
        date = datetime.now(UTC).isoformat(timespec="seconds")
        return {"date": date, "step": step, "cause": cause, "loss": loss}

    def _log(self, event: Mapping[str, Any]) -> None:
        self._events += 1
        if not self._world.main:
            return
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
