"""FP8 training for transformer language models, with the BF16 run beside it.

The public names are loaded when they are first used, so that `import fp8train` costs milliseconds and needs no GPU.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fp8train._layout import mount

if TYPE_CHECKING:
    from fp8train.convert import convert_model
    from fp8train.functional import quantize, scaled_mm
    from fp8train.live_report import report_of
    from fp8train.nn.gathering import gather_operands
    from fp8train.nn.linear import Float8Linear
    from fp8train.nn.weights import check_weights, weights_changed
    from fp8train.quant.qtensor import QTensor
    from fp8train.recipe import load_recipe

__version__ = "0.1.0"
__all__ = [
    "Float8Linear",
    "QTensor",
    "check_weights",
    "convert_model",
    "gather_operands",
    "load_recipe",
    "quantize",
    "report_of",
    "scaled_mm",
    "weights_changed",
]

_HOME = {
    "Float8Linear": "fp8train.nn.linear",
    "QTensor": "fp8train.quant.qtensor",
    "check_weights": "fp8train.nn.weights",
    "convert_model": "fp8train.convert",
    "gather_operands": "fp8train.nn.gathering",
    "load_recipe": "fp8train.recipe",
    "quantize": "fp8train.functional",
    "report_of": "fp8train.live_report",
    "scaled_mm": "fp8train.functional",
    "weights_changed": "fp8train.nn.weights",
}

mount()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fp8train' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
