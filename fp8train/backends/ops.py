"""The operators torch.ops.fp8train.*: opaque to torch.compile, one implementation that asks the named backend.

Registered with torch.library.Library, which costs a third of custom_op per call. Quantisation specifications travel as
their text ("e4m3 1x128 pow2"), dtypes as torch dtypes, the backend as its name. Each GEMM op counts itself for its site
(backends/coverage.py). OPS.<name> is the way in, with specifications as they are: it calls the operator where something
traces or watches it, its implementation where nothing does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fp8train.backends.coverage import COUNTS
from fp8train.backends.kernel_codes import ROW, SQUARE, codes_like
from fp8train.backends.selection import get_backend
from fp8train.quant import noise
from fp8train.quant.formats import QuantSpec
from fp8train.quant.qtensor import QTensor
from fp8train.quant.reference import check_quantize_input

LIBRARY = torch.library.Library("fp8train", "DEF")
OPS = SimpleNamespace()
_FOLLOWERS: list[Callable[[int], None]] = []
_NOTHING = contextlib.nullcontext()
# looked up once, for they are asked in every call
_AUTOCASTS = torch._C._is_any_autocast_enabled
_DISPATCH_MODES = torch._C._len_torch_dispatch_stack
_PROFILES = torch.autograd._profiler_enabled
_PLAIN = (Tensor, torch.nn.Parameter)
_GEMM = "str backend, int site, str gemm"
_OPERANDS = "Tensor a, Tensor a_scale, str a_spec, Tensor b, Tensor b_scale, str b_spec"
Implementation = TypeVar("Implementation", bound=Callable[..., Any])


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[Implementation], Implementation]:
    """Define torch.ops.fp8train.<name> on all devices, and OPS.<name>, with the name and the code of a function.

    Args:
        schema: its arguments and results; the first argument is a tensor.
        fake: makes results of the right shapes, dtypes and strides.
    """

    def register(implementation: Implementation) -> Implementation:
        name = implementation.__name__
        LIBRARY.define(name + schema)
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, _following(implementation) if name in ("scaled_mm", "mm") else implementation, key)
        torch.library.register_fake(f"fp8train::{name}", fake, lib=LIBRARY)
        dispatched = getattr(torch.ops.fp8train, name).default

        def call(first: Tensor, *others: Any) -> Any:
            if unwatched(first):
                return implementation(first, *others)
            return dispatched(first, *[str(other) if isinstance(other, QuantSpec) else other for other in others])

        setattr(OPS, name, call)
        return implementation

    return register


def unwatched(x: Tensor) -> bool:
    """Whether an op on x may skip the dispatcher, which costs more time on the host than all else that the op does.

    Not under torch.compile, a dispatch mode (selective checkpointing, fake tensors, FLOP counting) or the profiler, nor
    for a tensor of another class or without data.
    """
    return not (torch.compiler.is_compiling() or type(x) not in _PLAIN or x.is_meta or _DISPATCH_MODES() or _PROFILES())


def before_fprop(follow: Callable[[int], None]) -> None:
    """From now on tell `follow` the site of each fprop that an operator is about to compute, in compiled graphs too."""
    _FOLLOWERS.append(follow)


def _following(gemm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A GEMM as operators run it: the last two of its arguments are site and name."""

    def run(*arguments: Any) -> Tensor:
        if arguments[-1] == "fprop":
            for follow in _FOLLOWERS:
                follow(arguments[-2])
        return gemm(*arguments)

    return run


def as_spec(spec: str | QuantSpec) -> QuantSpec:
    """A specification from its text, as operators pass it, or as it is, as eager calls do."""
    return QuantSpec.parse(spec) if isinstance(spec, str) else spec


def _own_dtypes(a: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The caller's autocast must not reach the matmuls that a backend is made of: it would round their FP32 sums."""
    return torch.autocast(a.device.type, enabled=False) if _AUTOCASTS() else _NOTHING


def _count(site: int, gemm: str, a: Tensor, *, fp8: bool) -> None:
    """Record a GEMM. An fprop inside of backward is one that activation checkpointing repeats, and counts nothing."""
    # torch.utils.checkpoint knows by the same number whether backward is running
    if gemm != "fprop" or torch._C._current_graph_task_id() == -1:
        COUNTS.add(site, gemm, a.shape[1 if gemm == "wgrad" else 0], fp8)  # tokens: what wgrad contracts, others' rows


def _codes_like(x: Tensor, spec: QuantSpec, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    if isinstance(spec.block, str):
        scale_shape = (_span(rows) if spec.block == "tensor" else rows, _span(cols))
    else:
        scale_shape = (-(-rows // spec.block[0]), -(-cols // spec.block[1]))
    return x.new_empty((rows, cols), dtype=spec.format.dtype), x.new_empty(scale_shape, dtype=torch.float32)


def _span(size: int) -> int:
    """Number of blocks that span a whole dimension: none for an empty one. A symbolic size is never 0 or 1."""
    return min(size, 1) if isinstance(size, int) else 1


def fake_quantize(x: Tensor, spec: str, transpose: bool, backend: str) -> tuple[Tensor, Tensor]:
    """Codes and scales in the shapes, dtypes and strides that the backend's quantiser gives them."""
    rows, cols = reversed(x.shape) if transpose else x.shape
    parsed = as_spec(spec)
    if get_backend(backend).pads_codes and parsed.block in (ROW, SQUARE):
        return codes_like(x, parsed, rows, cols, transpose)
    return _codes_like(x, parsed, rows, cols)


def _fake_product(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


@operator("(Tensor x, str spec, bool transpose, str backend) -> (Tensor, Tensor)", fake_quantize)
def quantize(x: Tensor, spec: str, transpose: bool, backend: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of x [M, K], or of x.T."""
    check_quantize_input(x)
    q = get_backend(backend).quantize(x, as_spec(spec), transpose)
    return q.qdata, q.scale_inv


@operator(
    "(Tensor x, str row, str col, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda x, row, col, backend: (*fake_quantize(x, row, False, backend), *fake_quantize(x, col, True, backend)),
)
def quantize_dual(
    x: Tensor, row: str | QuantSpec, col: str | QuantSpec, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row copy of x [M, K] and transposed column copy [K, M], each with its scales."""
    check_quantize_input(x)
    q, qt = get_backend(backend).quantize_dual(x, as_spec(row), as_spec(col))
    return q.qdata, q.scale_inv, qt.qdata, qt.scale_inv


@operator(
    "(Tensor q, Tensor scale_inv, str spec, str to, str backend) -> (Tensor, Tensor)",
    lambda q, scale_inv, spec, to, backend: fake_quantize(q, to, True, backend),
)
def requantize(q: Tensor, scale_inv: Tensor, spec: str, to: str, backend: str) -> tuple[Tensor, Tensor]:
    """Decode x [M, K] and quantise x.T: the column copy made from the row copy."""
    executor = get_backend(backend)
    x = executor.dequantize(QTensor(q, scale_inv, as_spec(spec)), torch.float32)
    qt = executor.quantize(x, as_spec(to), True)
    return qt.qdata, qt.scale_inv


@operator(
    "(Tensor q, Tensor scale_inv, str spec, Tensor? after, str backend) -> (Tensor, Tensor)",
    lambda q, scale_inv, spec, after, backend: fake_quantize(q, spec, True, backend),
)
def transpose_codes(
    q: Tensor, scale_inv: Tensor, spec: str | QuantSpec, after: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """Codes and scales of x.T from those of x, whose blocks are the same both ways round.

    after: what exists in backward only, so that a compiler, which may move what it sees to depend on forward alone,
    leaves them there; not read.
    """
    qt = get_backend(backend).transpose_codes(QTensor(q, scale_inv, as_spec(spec)))
    return qt.qdata, qt.scale_inv


@operator(
    "(Tensor q, Tensor scale_inv, str spec, ScalarType dtype, str backend) -> Tensor",
    lambda q, scale_inv, spec, dtype, backend: q.new_empty(q.shape, dtype=dtype),
)
def dequantize(q: Tensor, scale_inv: Tensor, spec: str, dtype: torch.dtype, backend: str) -> Tensor:
    """Decode to bf16 or fp32."""
    return get_backend(backend).dequantize(QTensor(q, scale_inv, as_spec(spec)), dtype).contiguous()


@operator("(Tensor x, float rms, ScalarType dtype) -> Tensor", lambda x, rms, dtype: x.new_empty(x.shape, dtype=dtype))
def noisy(x: Tensor, rms: float, dtype: torch.dtype) -> Tensor:
    """x with unbiased relative noise; the same numbers on every backend."""
    return noise.noisy(x, rms, dtype).contiguous()


@operator(
    f"({_OPERANDS}, Tensor? bias, ScalarType out_dtype, {_GEMM}) -> Tensor",
    lambda a, a_scale, a_spec, b, b_scale, b_spec, bias, out_dtype, *_: _fake_product(a, b, out_dtype),
)
def scaled_mm(
    a: Tensor, a_scale: Tensor, a_spec: str | QuantSpec, b: Tensor, b_scale: Tensor, b_spec: str | QuantSpec,
    bias: Tensor | None, out_dtype: torch.dtype, backend: str, site: int, gemm: str,
) -> Tensor:  # fmt: skip
    """a [M, K] @ b [N, K].T, both FP8; contiguous, as the fake promises: cuBLASLt's may be part of a padded one."""
    _count(site, gemm, a, fp8=True)
    left, right = QTensor(a, a_scale, as_spec(a_spec)), QTensor(b, b_scale, as_spec(b_spec))
    bias = None if bias is None else bias.contiguous()  # a column of a matrix may be a Parameter
    run = get_backend(backend).scaled_mm
    if not _AUTOCASTS():  # to enter a context that does nothing takes time too
        return run(left, right, bias, None, False, out_dtype).contiguous()
    with _own_dtypes(a):
        return run(left, right, bias, None, False, out_dtype).contiguous()


@operator(f"(Tensor(a!) out, {_OPERANDS}, {_GEMM}) -> ()", lambda *_: None)
def scaled_mm_add_(
    out: Tensor,
    a: Tensor, a_scale: Tensor, a_spec: str, b: Tensor, b_scale: Tensor, b_spec: str,
    backend: str, site: int, gemm: str,
) -> None:  # fmt: skip
    """out [M, N] fp32 += a @ b.T, both FP8."""
    _count(site, gemm, a, fp8=True)
    left, right = QTensor(a, a_scale, as_spec(a_spec)), QTensor(b, b_scale, as_spec(b_spec))
    with _own_dtypes(a):
        get_backend(backend).scaled_mm(left, right, None, out, True, torch.float32)


@operator(
    f"(Tensor a, Tensor b, Tensor? bias, ScalarType out_dtype, {_GEMM}) -> Tensor",
    lambda a, b, bias, out_dtype, *_: _fake_product(a, b, out_dtype),
)
def mm(a: Tensor, b: Tensor, bias: Tensor | None, out_dtype: torch.dtype, backend: str, site: int, gemm: str) -> Tensor:
    """a [M, K] @ b [N, K].T in high precision."""
    _count(site, gemm, a, fp8=False)
    with _own_dtypes(a):
        return get_backend(backend).mm(a, b, bias, None, False, out_dtype).contiguous()


@operator(f"(Tensor(a!) out, Tensor a, Tensor b, {_GEMM}) -> ()", lambda *_: None)
def mm_add_(out: Tensor, a: Tensor, b: Tensor, backend: str, site: int, gemm: str) -> None:
    """out [M, N] fp32 += a @ b.T in high precision."""
    _count(site, gemm, a, fp8=False)
    with _own_dtypes(a):
        get_backend(backend).mm(a, b, None, out, True, torch.float32)
