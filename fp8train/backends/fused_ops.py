"""Operators of what feeds a linear (backends/interface.py), registered beside those of ops.py and in the same way.

Those that quantise return a list: (codes, scale_inv) of the row copy, the same of the column copy if `col` is given,
and what else is said. `col` null: no column copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8train.backends.interface import Copies
from fp8train.backends.ops import as_spec, fake_quantize, operator
from fp8train.backends.selection import get_backend
from fp8train.quant.formats import QuantSpec
from fp8train.quant.reference import check_quantize_input

_QUANTIZE = "str row, str? col, str backend"


def _specs(row: str, col: str | None) -> tuple[QuantSpec, QuantSpec | None]:
    return as_spec(row), None if col is None else as_spec(col)


def _tensors(copies: Copies) -> list[Tensor]:
    return [tensor for copy in copies if copy is not None for tensor in (copy.qdata, copy.scale_inv)]


def _fake_copies(x: Tensor, row: str, col: str | None, backend: str) -> list[Tensor]:
    return [*fake_quantize(x, row, False, backend), *([] if col is None else fake_quantize(x, col, True, backend))]


def _fake_rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dtotal: Tensor | None, branch: torch.dtype | None, backend: str
) -> list[Tensor]:
    made = [x.new_empty(x.shape), weight.new_empty(weight.shape)]
    return made + ([] if branch is None else [x.new_empty(x.shape, dtype=branch)])


def _fake_swiglu_backward_quantize(
    dh: Tensor, gate: Tensor, up: Tensor, row: str, col: str | None, h: str | None, backend: str
) -> list[Tensor]:
    h_t = [] if h is None else list(fake_quantize(gate, h, True, backend))
    return _fake_copies(gate, row, col, backend) + _fake_copies(gate, row, col, backend) + h_t


@operator("(Tensor x, float eps, str backend) -> Tensor", lambda x, *_: x.new_empty(x.shape[:1], dtype=torch.float32))
def rstd(x: Tensor, eps: float, backend: str) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) of each row of x [M, K], [M] fp32."""
    return get_backend(backend).rstd(x, eps)


@operator(
    "(Tensor x, Tensor branch, float eps, str backend) -> (Tensor, Tensor)",
    lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape[:1], dtype=torch.float32)),
)
def add_rstd(x: Tensor, branch: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    """(x + branch [M, K] in x's dtype, its rstd [M] fp32)."""
    total, made = get_backend(backend).add_rstd(x, branch, eps)
    return total.contiguous(), made


@operator(
    "(Tensor x, Tensor weight, Tensor rstd, ScalarType dtype, str backend) -> Tensor",
    lambda x, weight, rstd, dtype, backend: x.new_empty(x.shape, dtype=dtype),
)
def rms_norm(x: Tensor, weight: Tensor, rstd: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """y [M, K], the numbers that rmsnorm_quantize quantises."""
    return get_backend(backend).rms_norm(x, weight, rstd, dtype).contiguous()


@operator(
    "(Tensor dy, Tensor x, Tensor weight, Tensor rstd, Tensor? dtotal, ScalarType? branch, str backend) -> Tensor[]",
    _fake_rms_norm_backward,
)
def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dtotal: Tensor | None, branch: torch.dtype | None, backend: str
) -> list[Tensor]:
    """dx [M, K] and dweight [K] of rms_norm, dtotal added to dx; and dx in the dtype `branch`, if one is given."""
    dx, dweight, dbranch = get_backend(backend).rms_norm_backward(dy, x, weight, rstd, dtotal, branch)
    return [dx.contiguous(), dweight] + ([] if dbranch is None else [dbranch.contiguous()])


@operator(
    f"(Tensor x, Tensor weight, Tensor rstd, ScalarType dtype, {_QUANTIZE}) -> Tensor[]",
    lambda x, weight, rstd, dtype, *copies: _fake_copies(x, *copies),
)
def rmsnorm_quantize(
    x: Tensor, weight: Tensor, rstd: Tensor, dtype: torch.dtype, row: str, col: str | None, backend: str
) -> list[Tensor]:
    """Copies of rms_norm's y."""
    check_quantize_input(x)
    return _tensors(get_backend(backend).rmsnorm_quantize(x, weight, rstd, dtype, *_specs(row, col)))


@operator(
    "(Tensor x, Tensor cos, Tensor sin, ScalarType dtype, bool inverse, str backend) -> Tensor",
    lambda x, cos, sin, dtype, *_: x.new_empty(x.transpose(1, 2).shape, dtype=dtype).transpose(1, 2),
)
def rope(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, inverse: bool, backend: str) -> Tensor:
    """x [B, heads, T, head_dim] rotated by the angles of its positions, or back."""
    return get_backend(backend).rope(x, cos, sin, dtype, inverse)


@operator("(Tensor gate, Tensor up, str backend) -> Tensor", lambda gate, *_: gate.new_empty(gate.shape))
def swiglu(gate: Tensor, up: Tensor, backend: str) -> Tensor:
    """h [M, K], with the numbers that swiglu_quantize quantises."""
    return get_backend(backend).swiglu(gate, up).contiguous()


@operator(
    "(Tensor dh, Tensor gate, Tensor up, str backend) -> (Tensor, Tensor)",
    lambda dh, gate, *_: (gate.new_empty(gate.shape), gate.new_empty(gate.shape)),
)
def swiglu_backward(dh: Tensor, gate: Tensor, up: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """(dgate, dup), with the numbers that swiglu_backward_quantize quantises."""
    dgate, dup = get_backend(backend).swiglu_backward(dh, gate, up)
    return dgate.contiguous(), dup.contiguous()


@operator(f"(Tensor gate, Tensor up, {_QUANTIZE}) -> Tensor[]", lambda gate, up, *copies: _fake_copies(gate, *copies))
def swiglu_quantize(gate: Tensor, up: Tensor, row: str, col: str | None, backend: str) -> list[Tensor]:
    """Copies of swiglu's h."""
    check_quantize_input(gate)
    return _tensors(get_backend(backend).swiglu_quantize(gate, up, *_specs(row, col)))


@operator(
    "(Tensor dh, Tensor gate, Tensor up, str row, str? col, str? h, str backend) -> Tensor[]",
    _fake_swiglu_backward_quantize,
)
def swiglu_backward_quantize(
    dh: Tensor, gate: Tensor, up: Tensor, row: str, col: str | None, h: str | None, backend: str
) -> list[Tensor]:
    """Copies of swiglu_backward's dgate, then those of its dup; and if `h` is given h's column copy in it."""
    check_quantize_input(dh)
    specs = *_specs(row, col), None if h is None else as_spec(h)
    dgate, dup, h_t = get_backend(backend).swiglu_backward_quantize(dh, gate, up, *specs)
    return _tensors(dgate) + _tensors(dup) + ([] if h_t is None else [h_t.qdata, h_t.scale_inv])
