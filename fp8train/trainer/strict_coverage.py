"""Strict coverage: a GEMM that was to run in FP8, had rows and did not, ends the run after its first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fp8train.backends.coverage import COUNTS, GEMMS, NOT_COUNTED, Counts, GemmCount
from fp8train.conversion_report import ConversionRow
from fp8train.data import Batch
from fp8train.distributed import World
from fp8train.errors import TrainingError
from fp8train.nn.inputs import QuantizedInput
from fp8train.nn.linear import Float8Linear
from fp8train.nn.weights import converted_linears, own_weights
from fp8train.trainer.assembly import Assembly
from fp8train.trainer.step import StepResult
from fp8train.trainer.watcher import Watcher

SHOWN = 3  # problems in the message; the rest is a number


@dataclass(slots=True)
class Demand:
    """Rows that a linear was handed in one step, by what had to be computed of them.

    fprop: entered its forward outside backward; dgrad, wgrad: their gradient arrived, and x or the weight wanted one.
    gradient: the weight received a gradient. watched: rows were watched, which a compiled model does not allow.
    """

    fprop: int = 0
    dgrad: int = 0
    wgrad: int = 0
    gradient: bool = False
    watched: bool = True


class StepAudit:
    """What the converted linears of a model were handed and what ran, from `begin` to `end`.

    Args:
        assembly: model and conversion report.
        compiled: the model is compiled, so that no hook may sit on its modules.
    """

    def __init__(self, assembly: Assembly, compiled: bool) -> None:
        self._model = assembly.model
        self._rows = {row.site: row for row in assembly.report.rows if row.numbers is not None}
        self._linears = {linear.site: linear for linear in converted_linears(assembly.model)}
        self._compiled = compiled
        self._demands: dict[int, Demand] = {}
        self._before: Counts = {}
        self._hooks: list[Any] = []

    def begin(self) -> None:
        """Watch from here on."""
        self._before = COUNTS.snapshot()
        self._demands = {site: Demand(watched=not self._compiled) for site in self._linears}
        alone = own_weights(self._model)
        for site, linear in self._linears.items():
            demand = self._demands[site]
            if not self._compiled:
                self._hooks.append(linear.register_forward_hook(_Forward(demand)))
            if linear.weight.requires_grad and id(linear.weight) in alone:
                self._hooks.append(linear.weight.register_post_accumulate_grad_hook(_Arrived(demand)))

    def end(self) -> tuple[list[str], dict[tuple[int, str], str]]:
        """Stop watching: (what should have run in FP8 and did not, reason of each FP8 GEMM that had nothing to do)."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        problems: list[str] = []
        reasons: dict[tuple[int, str], str] = {}
        after = COUNTS.snapshot()
        all_train = all(parameter.requires_grad for parameter in self._model.parameters())
        for site, row in self._rows.items():
            linear = self._linears.get(site)
            if linear is None:
                problems.append(f"{row.fqn} is no longer in the model: something replaced it after the conversion")
                continue
            ran = {gemm: _difference(after, self._before, site, gemm) for gemm in GEMMS}
            for gemm in GEMMS:
                if row.planned(gemm) != "fp8":
                    continue
                problem, reason = _judge(row, linear, gemm, ran, self._demands[site], all_train)
                if problem is not None:
                    problems.append(problem)
                elif reason is not None:
                    reasons[site, gemm] = reason
        return problems, reasons


class StrictCoverage(Watcher):
    """Watcher: audits the first step of this process; a problem on any rank ends the run on all of them.

    A precision that a schedule changed before that step is no problem; one that differs from the conversion report when
    the run is built is.
    """

    name = "strict_coverage"

    def __init__(self, assembly: Assembly, world: World, compiled: bool) -> None:
        self._world = world
        self._audit: StepAudit | None = StepAudit(assembly, compiled)
        self._swapped = swapped_precisions(assembly)

    def before_step(self, step: int, batches: Sequence[Batch]) -> None:
        """Begin the audit, if this is the first step."""
        if self._audit is not None:
            self._audit.begin()

    def after_step(self, step: int, result: StepResult) -> dict[str, Any]:
        """End the audit.

        Raises:
            TrainingError: names linear, GEMM and remedy; on every rank.
        """
        if self._audit is None:
            return {}
        problems, reasons = self._audit.end()
        self._audit = None
        for (site, gemm), reason in reasons.items():
            COUNTS.explain(site, gemm, reason)
        everywhere = [p for own in self._world.all_gather_object(self._swapped + problems) for p in own]
        raise_problems(list(dict.fromkeys(everywhere)), step)
        return {}


def raise_problems(problems: Sequence[str], step: int) -> None:
    """End the run if there are any."""
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise TrainingError(
            f"strict coverage: after step {step}, {'; '.join(problems[:SHOWN])}{more}. Correct the model or the "
            "recipe (`fp8train explain` shows the plan, `fp8train doctor` looks for the cause), or set strict=false to "
            "train all the same."
        )


def swapped_precisions(assembly: Assembly) -> list[str]:
    """Linears that do not have the precision which the conversion report says."""
    linears = {linear.site: linear for linear in converted_linears(assembly.model)}
    return [
        f"{row.fqn} was converted to {row.precision} and is set to {linear.precision.name}: something changed its "
        "precision after the conversion"
        for row in assembly.report.rows
        if (linear := linears.get(row.site)) is not None and linear.precision != row.numbers
    ]


def _judge(
    row: ConversionRow, linear: Float8Linear, gemm: str, ran: dict[str, GemmCount], demand: Demand, all_train: bool
) -> tuple[str | None, str | None]:
    """(problem, reason): of a GEMM that was to run in FP8, what went wrong, or why it had nothing to do."""
    count, wanted = ran[gemm], getattr(demand, gemm)
    if linear.precision != row.numbers:
        return None, f"its precision is {linear.precision.name} at this step, which a schedule or an alarm has set"
    what = f"{gemm} of {row.fqn} was to run in FP8 (rule {row.rule})"
    if count.other_rows:
        return f"{what} and ran {count.other_rows} rows in high precision", None
    if demand.watched and count.fp8_rows < wanted:
        return f"{what} and did so for {count.fp8_rows} of {wanted} rows: a forward or backward of its own", None
    if count.fp8_rows:
        return None, None
    if gemm == "fprop":
        if demand.gradient and not count.fp8_calls:
            return f"{what} and its weight was used without calling it: call the module", None
        return None, "no tokens reached it"
    if ran["fprop"].fp8_rows == 0:
        return None, "no tokens reached it"
    if gemm == "wgrad" and not linear.weight.requires_grad:
        return None, "its weight is frozen"
    if not demand.watched and (all_train if gemm == "dgrad" else demand.gradient):
        return f"{what} and no row of it was counted: a backward of its own", None
    if gemm == "dgrad" and (demand.wgrad or not demand.watched):
        return None, "its input needs no gradient"
    return None, "no gradient reached its output"


class _Forward:
    """Forward hook: counts the rows that enter, and those whose gradient comes back."""

    reads_values = False  # so that fused producers stay fused while they are audited, see nn/fused.py

    def __init__(self, demand: Demand) -> None:
        self._demand = demand

    def __call__(self, linear: nn.Module, args: Any, output: Any) -> None:
        assert isinstance(linear, Float8Linear)
        if linear.site == NOT_COUNTED:  # a pass beside training, such as the alarm's: trainer/probe.py
            return
        demand = self._demand
        x: Tensor = args[0].x if isinstance(args[0], QuantizedInput) else args[0]
        rows = x.numel() // max(linear.in_features, 1)
        if torch._C._current_graph_task_id() == -1:  # inside backward, checkpointing runs forward again
            demand.fprop += rows
        if isinstance(output, Tensor) and output.requires_grad:
            dgrad, wgrad = rows * x.requires_grad, rows * linear.weight.requires_grad

            def arrived(_: Tensor) -> None:
                demand.dgrad += dgrad
                demand.wgrad += wgrad

            output.register_hook(arrived)


class _Arrived:
    """Gradient hook of a weight."""

    reads_values = False  # so that wgrad adds in place while it is audited, see trainer/accumulation.py

    def __init__(self, demand: Demand) -> None:
        self._demand = demand

    def __call__(self, weight: Tensor) -> None:
        self._demand.gradient = True


def _difference(after: Counts, before: Counts, site: int, gemm: str) -> GemmCount:
    new, old = (counts.get(site, {}).get(gemm, GemmCount()) for counts in (after, before))
    return new.plus(old, -1)
