"""Quantised inputs, shared by the linears that read the same tensor (q, k, v; gate, up)."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

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
        """Of x, as shape."""
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        """Of x, as shape."""
        return self.x.device

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        """Refuse every operation: the numbers of x were never written."""
        raise TypeError(
            f"QuantizedInput: {getattr(func, '__name__', func)} wants its numbers, which exist as FP8 codes only; "
            "needs a Float8Linear as reader. Wrap linears before convert_model, or convert with fused='never'."
        )

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


class _Slot(NamedTuple):
    """An input, what its operands were made for, they, and the sites of the linears that have had them."""

    input: weakref.ref[Tensor]
    key: tuple[int, int, InputNeeds, str]
    operands: tuple[Operand, Operand | None]
    readers: set[int]


def _address(x: Tensor) -> int:
    """Where the numbers lie; 0 for a tensor without memory of its own, such as a fake one."""
    try:
        return x.data_ptr()
    except RuntimeError:
        return 0


class InputCache:
    """Remembers the last input that was quantised, so that its next reader need not do it again.

    One slot, shared by all linears of a model. It serves each linear once: one that reads the same tensor again is in
    another forward, before which something that moves no version counter may have written to the tensor (a receive of
    torch.distributed into a buffer, numpy). Such a write between two linears that read the tensor in one forward is not
    seen, but an exchange of its memory (`x.data = ...`) is. It is emptied when the input is freed, so it never prolongs
    anything's life. Threads may share a model: the slot is one attribute, read once and written once.
    """

    def __init__(self) -> None:
        self._slot: _Slot | None = None

    def get(self, x: Tensor, needs: InputNeeds, backend: str, reader: int) -> tuple[Operand, Operand | None]:
        """Operands of x [..., K] as a matrix [M, K]; quantised on a miss. Under torch.compile always: CSE merges.

        reader: the linear's site
        """
        if torch.compiler.is_compiling() or x.is_inference():
            return quantize_input(as_matrix(x.detach()), needs, backend)
        slot = self._slot
        key = (x._version, _address(x), needs, backend)
        known = slot is not None and slot.input() is x and slot.key == key
        if slot is not None and known and reader not in slot.readers:
            slot.readers.add(reader)
            return slot.operands
        operands = quantize_input(as_matrix(x.detach()), needs, backend)
        self._slot = _Slot(weakref.ref(x, self._forget), key, operands, {reader})
        return operands

    def clear(self) -> None:
        """Forget the input, because something that no version counter sees may have written to it."""
        self._slot = None

    def _forget(self, dead: weakref.ref[Tensor]) -> None:
        slot = self._slot
        if slot is not None and slot.input is dead:
            self._slot = None

    def __deepcopy__(self, memo: dict[int, Any]) -> InputCache:
        """A copy of a model starts with an empty cache, one for all its linears."""
        memo[id(self)] = fresh = InputCache()
        return fresh

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
