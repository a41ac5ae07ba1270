"""Quantised inputs, shared by the linears that read the same tensor (q, k, v; gate, up)."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp8train.nn.operands import Operand, as_matrix, quantized, quantized_both
from fp8train.quant.formats import LinearPrecision, QuantSpec


@dataclass(frozen=True, slots=True)
class InputNeeds:
    """What a linear wants made of its input: fprop's operand, and wgrad's unless `col` is False."""

    row: QuantSpec | None
    col_spec: QuantSpec | None
    col: bool
    requant: bool
    high: torch.dtype
    noise: float = 0.0

    @staticmethod
    def of(precision: LinearPrecision, wgrad: bool) -> InputNeeds:
        """The needs of a precision; `wgrad`: whether the weight's gradient will be computed."""
        requant = precision.wgrad_source == "requant"
        specs = precision.fprop.left, precision.wgrad.right
        return InputNeeds(*specs, wgrad, requant, precision.high, precision.noise)


@dataclass(frozen=True, slots=True)
class QuantizedInput:
    """An input that its producer has quantised: `x` carries the gradient, row and column copies carry the numbers.

    Args:
        x: [..., K], the tensor that autograd connects; its values are not read by a GEMM whose operand is in FP8.
        row: x as fprop's left operand [M, K].
        col: x.T as wgrad's right operand [K, M]; None where no gradient of the weight is wanted.
    """

    x: Tensor
    row: Operand
    col: Operand | None

    @property
    def shape(self) -> torch.Size:
        """[..., K], for modules that pass an input on without reading it."""
        return self.x.shape

    @property
    def dtype(self) -> torch.dtype:
        """As shape."""
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        """As shape."""
        return self.x.device

    def operands(self, needs: InputNeeds) -> tuple[Operand, Operand | None]:
        """Row and column operand for a linear with those needs.

        Raises:
            ValueError: a copy is missing or was made for another precision.
        """
        specs: dict[str, tuple[Operand | None, QuantSpec | None]] = {"row": (self.row, needs.row)}
        if needs.col:
            specs["col"] = (self.col, needs.row if needs.requant else needs.col_spec)
        for name, (operand, wanted) in specs.items():
            if operand is None or operand.spec != wanted:
                got = "None" if operand is None else str(operand.spec or "high precision")
                raise ValueError(
                    f"QuantizedInput: {name} is {got}; needs {wanted or 'high precision'}. Quantise for this linear."
                )
        return self.row, self.col if needs.col else None


def quantize_input(x: Tensor, needs: InputNeeds, backend: str) -> tuple[Operand, Operand | None]:
    """(row, col) of x [M, K]. With `requant`, col is the row copy itself: backward re-blocks it."""
    if not needs.col:
        return quantized(x, needs.row, needs.high, False, backend, needs.noise), None
    if needs.requant:
        row = quantized(x, needs.row, needs.high, False, backend, needs.noise)
        return row, row
    return quantized_both(x, needs.row, needs.col_spec, needs.high, backend, needs.noise)


class InputCache:
    """Remembers the last input that was quantised, so that its next reader need not do it again.

    One slot, shared by all linears of a model. It is emptied when the input is freed, so it never prolongs anything's
    life.
    """

    def __init__(self) -> None:
        self._input: weakref.ref[Tensor] | None = None
        self._version = -1
        self._key: tuple[InputNeeds, str] | None = None
        self._operands: tuple[Operand, Operand | None] | None = None

    def get(self, x: Tensor, needs: InputNeeds, backend: str) -> tuple[Operand, Operand | None]:
        """Operands of x [..., K] as a matrix [M, K]; quantised on a miss. Under torch.compile always: CSE merges."""
        if torch.compiler.is_compiling() or x.is_inference():
            return quantize_input(as_matrix(x.detach()), needs, backend)
        same = self._input is not None and self._input() is x and self._version == x._version
        if same and self._operands is not None and self._key == (needs, backend):
            return self._operands
        self._operands = operands = quantize_input(as_matrix(x.detach()), needs, backend)
        self._input, self._version, self._key = weakref.ref(x, self._forget), x._version, (needs, backend)
        return operands

    def clear(self) -> None:
        """Forget the input, because something that no version counter sees may have written to it."""
        self._input, self._operands = None, None

    def _forget(self, dead: weakref.ref[Tensor]) -> None:
        if self._input is dead:
            self.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> InputCache:
        """A copy of a model starts with an empty cache, one for all its linears."""
        memo[id(self)] = fresh = InputCache()
        return fresh

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
