"""Looks at the operands of linears while a model runs; there is nothing in the model while it does not look."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fp8train.backends.coverage import NOT_COUNTED
from fp8train.nn.inputs import QuantizedInput
from fp8train.nn.linear import Float8Linear, Plan
from fp8train.nn.operands import as_matrix
from fp8train.quant.formats import BLOCKWISE, LinearPrecision, QuantSpec
from fp8train.telemetry.statistics import as_numbers, operand_statistics

OPERANDS = ("x", "w", "dy")


def named_linears(model: nn.Module) -> dict[str, Float8Linear]:
    """The converted linears of a model by module path, each once."""
    return {fqn: module for fqn, module in model.named_modules() if isinstance(module, Float8Linear)}


def operand_specs(precision: LinearPrecision) -> dict[str, QuantSpec]:
    """How x, w and dy are rounded: for fprop and dgrad, else for wgrad; without those that are not."""
    specs = {
        "x": precision.fprop.left or precision.wgrad.right,
        "w": precision.fprop.right or precision.dgrad.right,
        "dy": precision.dgrad.left or precision.wgrad.left,
    }
    return {operand: spec for operand, spec in specs.items() if spec is not None}


def what_if_precision(precisions: Iterable[LinearPrecision]) -> LinearPrecision:
    """What linears in high precision are measured in: the quantised precision in most use, else blockwise."""
    used = Counter(precision for precision in precisions if precision.quantized)
    return max(used, key=lambda precision: (used[precision], precision.name)) if used else BLOCKWISE


class Observer:
    """Statistics of x, w and dy of each linear, from the first forward pass that follows `begin`, and its backward.

    Linears that quantise nothing are measured as if they did: `what_if` names them.

    Args:
        linears: by module path.
        what_if: precision to measure those in that quantise nothing.
        rows: of each operand, see operand_statistics.
    """

    def __init__(self, linears: Mapping[str, Float8Linear], what_if: LinearPrecision, rows: int | None) -> None:
        self._linears = linears
        self._what_if = what_if
        self._rows = rows
        self._hooks: list[Any] = []
        self._values: dict[str, Tensor] = {}
        self._last: tuple[Any, QuantSpec, Tensor] | None = None
        self.seconds = 0.0

    @property
    def what_if(self) -> list[str]:
        """Linears that quantise nothing."""
        return [fqn for fqn, linear in self._linears.items() if not linear.precision.quantized]

    def begin(self) -> None:
        """Look from here on."""
        self._values, self.seconds = {}, 0.0
        for fqn, linear in self._linears.items():
            precision = linear.precision if linear.precision.quantized else self._what_if
            self._hooks.append(linear.register_forward_hook(_Forward(self, fqn, operand_specs(precision))))

    def end(self) -> dict[str, list[float | None]]:
        """Look no more; gives "layers.0.mlp.up_proj/x" -> numbers in the order of STATS, for all that was seen."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._last = [], None
        begin = time.perf_counter()
        keys = [f"{fqn}/{op}" for fqn in self._linears for op in OPERANDS if f"{fqn}/{op}" in self._values]
        numbers = torch.stack([self._values[key] for key in keys]).cpu() if keys else ()
        result = {key: as_numbers(row) for key, row in zip(keys, numbers, strict=True)}
        self._values = {}
        self.seconds += time.perf_counter() - begin
        return result

    @torch.no_grad()
    def measure(self, fqn: str, operand: str, tensor: Tensor, spec: QuantSpec) -> None:
        """Take in one operand [M, K]; what was seen of it before stays."""
        key = f"{fqn}/{operand}"
        if key in self._values:
            return
        begin = time.perf_counter()
        backend = self._linears[fqn].backend_name
        self._values[key] = operand_statistics(tensor, spec, rows=self._rows, backend=backend)
        self.seconds += time.perf_counter() - begin

    def measure_input(self, fqn: str, x: Tensor, spec: QuantSpec) -> None:
        """Take in an input; q, k and v read the same one, which is measured once."""
        key = f"{fqn}/x"
        if self._last is not None and self._last[0]() is x and self._last[1] == spec:
            self._values.setdefault(key, self._last[2])
            return
        self.measure(fqn, "x", as_matrix(self._linears[fqn].prepared(x.detach())), spec)
        if self._linears[fqn].remedy is None:
            self._last = (weakref.ref(x), spec, self._values[key])


class _Forward:
    """Forward hook of one linear."""

    def __init__(self, observer: Observer, fqn: str, specs: Mapping[str, QuantSpec]) -> None:
        self._observer, self._fqn, self._specs = observer, fqn, specs

    def __call__(self, linear: Float8Linear, args: tuple[Any, ...], y: Tensor) -> None:
        x = args[0].x if isinstance(args[0], QuantizedInput) else args[0]
        observer, fqn, specs = self._observer, self._fqn, self._specs
        with torch.autocast(x.device.type, enabled=False):
            if "x" in specs:
                observer.measure_input(fqn, x, specs["x"])
            if "w" in specs:
                observer.measure(fqn, "w", linear.prepared_weight(), specs["w"])
        if "dy" in specs and y.requires_grad:
            y.register_hook(lambda dy: observer.measure(fqn, "dy", as_matrix(dy), specs["dy"]))


@contextlib.contextmanager
def uncounted(linears: Iterable[Float8Linear]) -> Iterator[None]:
    """Inside, what these linears run is not counted as training: neither in coverage nor anywhere."""
    kept = [(linear, linear.plan) for linear in linears]
    try:
        for linear, plan in kept:
            linear.plan = Plan(plan.precision, plan.backend, NOT_COUNTED)
        yield
    finally:
        for linear, plan in kept:
            linear.plan = plan
