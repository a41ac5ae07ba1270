"""Looks at the operands of linears while a model runs; there is nothing in the model while it does not look."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fp8train.backends.coverage import NOT_COUNTED
from fp8train.nn.inputs import QuantizedInput
from fp8train.nn.linear import Float8Linear
from fp8train.nn.linear_function import Plan
from fp8train.nn.operands import as_matrix
from fp8train.quant.formats import BLOCKWISE, LinearPrecision, QuantSpec
from fp8train.telemetry.statistics import as_numbers, operand_statistics

OPERANDS = ("x", "w", "dy", "x.T", "w.T", "dy.T")


def operand_specs(precision: LinearPrecision) -> dict[str, QuantSpec]:
    """How the GEMMs read the operands: x, w and dy for fprop and dgrad; w.T for dgrad and x.T, dy.T for wgrad where
    blocks run along another dimension, so that they are rounded otherwise; without those that are not rounded.
    """
    fprop, dgrad, wgrad = precision.fprop, precision.dgrad, precision.wgrad
    straight = {"x": fprop.left, "w": fprop.right, "dy": dgrad.left}
    turned = {"x": wgrad.right, "w": dgrad.right, "dy": wgrad.left}
    specs = dict(straight)
    for operand, spec in turned.items():
        if spec is not None and not (spec == straight[operand] and spec.transposable):
            specs[f"{operand}.T"] = spec
    return {operand: spec for operand, spec in specs.items() if spec is not None}


def what_if_precision(precisions: Iterable[LinearPrecision]) -> LinearPrecision:
    """What linears in high precision are measured in: the quantised precision in most use, else blockwise."""
    used = Counter(precision for precision in precisions if precision.quantized)
    return max(used, key=lambda precision: (used[precision], precision.name)) if used else BLOCKWISE


class Observer:
    """Statistics of the operands of each linear, from the first forward pass that follows `begin`, and its backward.

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
        self._last: tuple[Any, dict[str, QuantSpec], dict[str, Tensor]] | None = None
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

    def measure_both(self, fqn: str, operand: str, tensor: Tensor, specs: Mapping[str, QuantSpec]) -> None:
        """Take in an operand [M, K] as each GEMM reads it."""
        for name, turned in ((operand, False), (f"{operand}.T", True)):
            if name in specs:
                self.measure(fqn, name, tensor.t() if turned else tensor, specs[name])

    def measure_input(self, fqn: str, x: Tensor, specs: Mapping[str, QuantSpec]) -> None:
        """Take in an input; q, k and v read the same one, which is measured once."""
        own = {name: spec for name, spec in specs.items() if name in ("x", "x.T")}
        if self._last is not None and self._last[0]() is x and self._last[1] == own:
            for name, values in self._last[2].items():
                self._values.setdefault(f"{fqn}/{name}", values)
            return
        self.measure_both(fqn, "x", as_matrix(self._linears[fqn].prepared(x.detach())), own)
        if self._linears[fqn].remedy is None:
            self._last = (weakref.ref(x), own, {name: self._values[f"{fqn}/{name}"] for name in own})


class _Forward:
    """Forward hook of one linear."""

    def __init__(self, observer: Observer, fqn: str, specs: Mapping[str, QuantSpec]) -> None:
        self._observer, self._fqn, self._specs = observer, fqn, specs

    def __call__(self, linear: Float8Linear, args: tuple[Any, ...], y: Tensor) -> None:
        x = args[0].x if isinstance(args[0], QuantizedInput) else args[0]
        observer, fqn, specs = self._observer, self._fqn, self._specs
        with torch.autocast(x.device.type, enabled=False):
            observer.measure_input(fqn, x, specs)
            observer.measure_both(fqn, "w", linear.prepared_weight(), specs)
        if y.requires_grad and not specs.keys().isdisjoint(("dy", "dy.T")):
            y.register_hook(lambda dy: observer.measure_both(fqn, "dy", as_matrix(dy), specs))


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
