"""Backend `triton`: our own kernels (kernels/) for blockwise FP8 on GPUs of sm_89 and newer, Hopper first.

Quantisers write the reference's codes bit for bit. Blockwise GEMMs run the first entry of kernels/gemm_table.py that
passed its check on this device (backends/admission.py), or of the plain ones; where none did, torch multiplies decoded
operands. Tensorwise and rowwise GEMMs are cuBLASLt's, and their quantiser is the definition run on the device.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

from fp8train.backends import device_gemm, launch_rates
from fp8train.backends.admission import Admission
from fp8train.backends.admission_checks import variants
from fp8train.backends.code_checks import PLAIN, Form, variant_in_form
from fp8train.backends.interface import Backend, Copies, Square
from fp8train.backends.kernel_codes import (
    ROW,
    SQUARE,
    as_copies,
    as_defined,
    both_formats,
    dtype_name,
    format_of,
    kernel,
    padded,
    tensors_of,
)
from fp8train.backends.machine import BLOCKWISE_PAIRS, WHOLE_PAIRS, major_minor, no_gpu, not_served
from fp8train.backends.producers import rows_dense
from fp8train.backends.product_checks import entry_for
from fp8train.errors import BackendError
from fp8train.quant import reference
from fp8train.quant.formats import LinearPrecision, QuantSpec
from fp8train.quant.qtensor import QTensor

OLDEST, BELOW = (3, 6), (3, 10)  # versions of Triton that the kernels are compiled with in the tests
MOST_SHAPES = 4096  # of operands, for which the choice of an entry is kept; a model has tens


def triton_refusal() -> str | None:
    """Why the installed Triton cannot compile the kernels, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install fp8train[triton]"
    text = importlib.metadata.version("triton")
    needs = f"needs {OLDEST[0]}.{OLDEST[1]} to {BELOW[0]}.{BELOW[1] - 1}"
    version = major_minor(text)
    if version < OLDEST:
        return f"Triton {text} is too old; {needs}"
    if version >= BELOW:
        return f"Triton {text} is newer than the kernels were compiled with; {needs}"
    return None


class TritonBackend(Backend):
    """Blockwise FP8 by our kernels, everything else by torch on the same device."""

    name = "triton"

    def __init__(self, entry: str = "", *, words: bool = True) -> None:
        """With an entry of a GEMM's CONFIGS, that one and no other multiplies; without words, quantisers take none: to
        measure them."""
        self.note = self._plain_note = f"own FP8 kernels, GEMMs by {entry} only" if entry else "own FP8 kernels"
        self._only, self._with_words = (entry,) if entry else (), words
        self._admission = Admission()
        self._entries: dict[Hashable, str | None] = {}
        self._served: dict[Hashable, bool] = {}
        self._decoded: set[str] = set()

    @functools.cached_property
    def pads_codes(self) -> bool:
        """See Backend."""
        return triton_refusal() is None

    @property
    def refused(self) -> list[str]:
        """See Backend."""
        return self._admission.refused

    def unavailable(self, device_type: str) -> str | None:
        """See Backend."""
        return no_gpu(device_type) or triton_refusal()

    def unsupported(self, precision: LinearPrecision) -> str | None:
        """See Backend."""
        return not_served(precision, BLOCKWISE_PAIRS | WHOLE_PAIRS)

    def expect(self, precisions: Iterable[LinearPrecision]) -> None:
        """See Backend."""
        self._admission.expect(precisions)

    def quantize(self, x: Tensor, spec: QuantSpec, transpose: bool) -> QTensor:
        """See Backend."""
        if spec.block == SQUARE:
            return self._squares(x, spec, not transpose, transpose)[transpose]
        if spec.block != ROW:
            return reference.quantize(x, spec, transpose=transpose)
        if not self._admitted("quantize", "columns" if transpose else "rows", x.device, (spec,)):
            return as_defined(x, spec, transpose)
        run = kernel("quantize").quantize_columns if transpose else kernel("quantize").quantize_rows
        qdata, scale_inv = run(rows_dense(x), **format_of(spec))
        return QTensor(qdata, scale_inv, spec)

    def quantize_dual(self, x: Tensor, row: QuantSpec, col: QuantSpec) -> tuple[QTensor, QTensor]:
        """See Backend."""
        together = row.block == ROW and col.block == ROW and row.format is col.format
        more = self._words("quantize", "dual", x.device, (row, col)) if together else None
        if more is None:
            return super().quantize_dual(x, row, col)
        run = kernel("quantize").quantize_dual
        q, scale, qt, scale_t = run(rows_dense(x), **format_of(row), col_pow2=col.scale == "pow2", **more)
        return QTensor(q, scale, row), QTensor(qt, scale_t, col)

    def quantize_square(self, x: Tensor, spec: QuantSpec, out: Square | None = None, turned: bool = True) -> Square:
        """See Backend."""
        if spec.block != SQUARE:
            return super().quantize_square(x, spec, out, turned)
        return self._squares(x, spec, True, turned, out)

    def _squares(
        self, x: Tensor, spec: QuantSpec, straight: bool, transposed: bool, out: Square | None = None
    ) -> tuple[Any, Any]:
        """Codes of x and of x.T in blocks of 128x128, None for those that are not wanted; into `out` where it fits."""
        one_read = straight and transposed and self._admitted("quantize_weight", "one_read", x.device, (spec,))
        if not one_read and not self._admitted("quantize_weight", "two_launches", x.device, (spec,)):
            return as_defined(x, spec, False) if straight else None, as_defined(x, spec, True) if transposed else None
        module, x = kernel("quantize_weight"), rows_dense(x)
        wanted = {"straight": straight, "transposed": transposed}
        held = None if out is None else tensors_of(out)
        if held is not None and module.misfit(x, held, spec.format.dtype, **wanted) is not None:
            held = None
        made = module.quantize_weight(x, out=held, two_launches=not one_read, **wanted, **format_of(spec))
        q, qt = (None if codes is None else QTensor(codes, scale, spec) for codes, scale in (made[:2], made[2:]))
        return q, qt

    def transpose_codes(self, q: QTensor) -> QTensor:
        """See Backend."""
        if q.spec.block != SQUARE:
            return q.transpose()
        if not self._admitted("transpose_codes", "codes", q.qdata.device):
            return padded(q.transpose(), transposed=True)
        qdata, scale_inv = kernel("transpose_codes").transpose_codes(q.qdata, q.scale_inv.contiguous())
        return QTensor(qdata, scale_inv, q.spec)

    def fuses(self, row: QuantSpec, col: QuantSpec | None) -> bool:
        """See Backend."""
        return row.block == ROW and (col is None or (col.block == ROW and col.format is row.format))

    def rstd(self, x: Tensor, eps: float) -> Tensor:
        """See Backend."""
        if not self._admitted("rmsnorm_rstd", dtype_name(x), x.device):
            return super().rstd(x, eps)
        return kernel("rmsnorm_rstd").rstd(rows_dense(x), eps=eps)

    def add_rstd(self, x: Tensor, branch: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See Backend."""
        if not self._admitted("rmsnorm_rstd", dtype_name(x), x.device):
            return super().add_rstd(x, branch, eps)
        return kernel("rmsnorm_rstd").add_rstd(rows_dense(x), rows_dense(branch), eps=eps)

    def rms_norm(self, x: Tensor, weight: Tensor, rstd: Tensor, dtype: torch.dtype) -> Tensor:
        """See Backend."""
        if self._words("rmsnorm_quantize", dtype_name(x), x.device) is None:
            return super().rms_norm(x, weight, rstd, dtype)
        return kernel("rmsnorm_quantize").rmsnorm(rows_dense(x), weight, rstd, out_dtype=dtype)

    def rms_norm_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dtotal: Tensor | None, branch: torch.dtype | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See Backend."""
        module = kernel("rmsnorm_backward")
        if x.shape[1] > module.WIDEST or not self._admitted("rmsnorm_backward", dtype_name(x), x.device):
            return super().rms_norm_backward(dy, x, weight, rstd, dtotal, branch)
        more = {"dtotal": None if dtotal is None else rows_dense(dtotal), "branch_dtype": branch}
        return module.rmsnorm_backward(rows_dense(dy), rows_dense(x), weight, rstd, **more)

    def has_rope(self) -> bool:
        """See Backend."""
        return True

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, inverse: bool) -> Tensor:
        """See Backend."""
        if not self._admitted("rope", dtype_name(x), x.device):
            return super().rope(x, cos, sin, dtype, inverse)
        return kernel("rope").rope(rows_dense(x), cos, sin, out_dtype=dtype, inverse=inverse)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """See Backend."""
        if self._words("swiglu_quantize", dtype_name(gate), gate.device) is None:
            return super().swiglu(gate, up)
        return kernel("swiglu_quantize").swiglu(rows_dense(gate), rows_dense(up))

    def swiglu_backward(self, dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """See Backend."""
        if self._words("swiglu_backward_quantize", dtype_name(gate), gate.device) is None:
            return super().swiglu_backward(dh, gate, up)
        run = kernel("swiglu_backward_quantize").swiglu_backward
        return run(rows_dense(dh), rows_dense(gate), rows_dense(up))

    def rmsnorm_quantize(
        self, x: Tensor, weight: Tensor, rstd: Tensor, dtype: torch.dtype, row: QuantSpec, col: QuantSpec | None
    ) -> Copies:
        """See Backend."""
        more = self._makes("rmsnorm_quantize", x, row, col)
        if more is None:
            return super().rmsnorm_quantize(x, weight, rstd, dtype, row, col)
        run = kernel("rmsnorm_quantize").rmsnorm_quantize
        return as_copies(run(rows_dense(x), weight, rstd, out_dtype=dtype, **more), row, col)

    def swiglu_quantize(self, gate: Tensor, up: Tensor, row: QuantSpec, col: QuantSpec | None) -> Copies:
        """See Backend."""
        more = self._makes("swiglu_quantize", gate, row, col)
        if more is None:
            return super().swiglu_quantize(gate, up, row, col)
        run = kernel("swiglu_quantize").swiglu_quantize
        return as_copies(run(rows_dense(gate), rows_dense(up), **more), row, col)

    def swiglu_backward_quantize(
        self, dh: Tensor, gate: Tensor, up: Tensor, row: QuantSpec, col: QuantSpec | None, h: QuantSpec | None
    ) -> tuple[Copies, Copies, QTensor | None]:
        """See Backend."""
        more = self._makes("swiglu_backward_quantize", gate, row, col, h) if h is None or h.block == ROW else None
        if more is None:
            return super().swiglu_backward_quantize(dh, gate, up, row, col, h)
        run = kernel("swiglu_backward_quantize").swiglu_backward_quantize
        h_format = None if h is None else tuple(format_of(h).values())
        dgate, dup, h_t = run(rows_dense(dh), rows_dense(gate), rows_dense(up), h=h_format, **more)
        return as_copies(dgate, row, col), as_copies(dup, row, col), None if h is None else QTensor(h_t[0], h_t[1], h)

    def counters(self, x: Tensor, spec: QuantSpec) -> Tensor | None:
        """See Backend; counted by the kernels that round in blocks of 1x128 and 128x128."""
        if spec.block not in (ROW, SQUARE):
            return None
        operation, variant = ("quantize", "rows") if spec.block == ROW else ("quantize_weight", "one_read")
        if not self._admitted(operation, variant, x.device, (spec,)):
            return None
        counted = torch.zeros(5, dtype=torch.int64, device=x.device)
        run = kernel("quantize").quantize_rows if spec.block == ROW else kernel("quantize_weight").quantize_weight
        run(rows_dense(x), **format_of(spec), stats=counted)
        return counted

    def scaled_mm(
        self, a: QTensor, b: QTensor, bias: Tensor | None, out: Tensor | None, accumulate: bool, out_dtype: torch.dtype
    ) -> Tensor:
        """See Backend."""
        pair = (a.spec.block, b.spec.block)
        if pair == (ROW, SQUARE):
            return self._gemm(a, b, bias, out, accumulate, out_dtype)
        if pair == (ROW, ROW):
            return self._gemm_wgrad(a, b, bias, out, accumulate, out_dtype)
        multiply = device_gemm.cublas_mm if pair in WHOLE_PAIRS else device_gemm.decoded_mm
        return multiply(a, b, bias, out, accumulate, out_dtype)

    def _gemm(
        self, a: QTensor, b: QTensor, bias: Tensor | None, out: Tensor | None, accumulate: bool, out_dtype: torch.dtype
    ) -> Tensor:
        operands = (a.qdata, b.qdata, a.scale_inv, b.scale_inv)
        entry, run = self._entry("gemm", a, b), kernel("gemm").gemm
        if entry is None:
            return device_gemm.decoded_mm(a, b, bias, out, accumulate, out_dtype)
        if accumulate:
            acc = run(*operands, bias=bias, out_dtype=torch.float32, config=entry)
            return reference.finish(acc, None, out, True, out_dtype)
        return run(*operands, bias=bias, out=out, out_dtype=out_dtype, config=entry)

    def _gemm_wgrad(
        self, a: QTensor, b: QTensor, bias: Tensor | None, out: Tensor | None, accumulate: bool, out_dtype: torch.dtype
    ) -> Tensor:
        operands = (a.qdata, b.qdata, a.scale_inv, b.scale_inv)
        entry, run = self._entry("gemm_wgrad", a, b), kernel("gemm_wgrad").gemm_wgrad
        if entry is None:
            return device_gemm.decoded_mm(a, b, bias, out, accumulate, out_dtype)
        if bias is None and (out is None or out.dtype is torch.float32):
            made = run(*operands, out=out, accumulate=accumulate, config=entry)
            return made if out is not None else made.to(out_dtype)
        return reference.finish(run(*operands, config=entry), bias, out, accumulate, out_dtype)

    def _entry(self, operation: str, a: QTensor, b: QTensor) -> str | None:
        """The first of the launch table's entries and the plain ones that reads these operands and is admitted.

        None where there is none: torch must multiply.
        """
        left, right, scale = a.qdata, b.qdata, b.scale_inv
        # all that kernel(operation).refusal and the launch table look at
        key = (
            operation, left.device, left.dtype, left.shape, left.stride(), left.data_ptr() % 16, right.dtype,
            right.shape, right.stride(), right.data_ptr() % 16, scale.stride(), scale.data_ptr() % 16,
        )  # fmt: skip
        try:
            return self._entries[key]
        except KeyError:
            return self._chosen(key, operation, a, b)

    def _admitted(self, operation: str, variant: str, device: torch.device, form: Form = ()) -> bool:
        """Whether a kernel passed its check on the device, in that form; a verdict never changes in a process."""
        key = (operation, variant, device, form)
        served = self._served.get(key)
        if served is not None:
            return served
        if form:  # usual ones share a verdict
            named = variant_in_form(operation, variant, form)
            served = self._admitted(operation, named, device)
            if (operation, named, device, ()) in self._served:
                self._served[key] = served
            return served
        served = self._admission.admits(operation, variant, device)
        if served or device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            self._served[key] = served
            self._renew_note(device)
        return served

    def _words(self, operation: str, name: str, device: torch.device, form: Form = ()) -> dict[str, bool] | None:
        """Whether a kernel may take words of two numbers, as its argument; None if no variant passed its check."""
        for variant in variants(operation, name)[0 if self._with_words else -1 :]:
            if self._admitted(operation, variant, device, form):
                return {"words": not variant.endswith(PLAIN)}
        return None

    def _makes(
        self, operation: str, x: Tensor, row: QuantSpec, col: QuantSpec | None, *others: QuantSpec | None
    ) -> dict[str, Any] | None:
        """Arguments of a fused kernel that serves the formats and passed its check for the dtype of x, or None."""
        served = self.fuses(row, col)
        more = self._words(operation, dtype_name(x), x.device, (row, col, *others)) if served else None
        return None if more is None else more | both_formats(row, col)

    def _renew_note(self, device: torch.device) -> None:
        """Say whose launch table is used, which kernels are not, and whose products are torch's."""
        own, refused = None if self._only else _measured(device), self._admission.refused
        table = [] if own is None else [f"launch table measured on this machine, {own.date}"]
        gone = [f"refused on this machine: {'; '.join(refused)}"] if refused else []
        decoded = [f"{' and '.join(sorted(self._decoded))} by torch on decoded operands"] if self._decoded else []
        self.note = "; ".join([self._plain_note, *table, *gone, *decoded])

    def _chosen(self, key: Hashable, operation: str, a: QTensor, b: QTensor) -> str | None:
        """As _entry, from the verdicts, which never change in a process: so the choice is kept under the key."""
        device, chosen = a.qdata.device, None
        for entry in self._only or _candidates(operation, device, a.shape[0], b.shape[0]):
            reason = kernel(operation).refusal(entry, a.qdata, b.qdata, b.scale_inv)
            if reason is None and self._admission.admits(operation, entry_for(entry, a.spec, b.spec), device):
                chosen = entry
                break
            if self._only:
                raise BackendError(f"backend: triton:{entry}: {reason or '; '.join(self._admission.refused)}.")
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return chosen  # an entry that has no verdict was passed over, not refused: the next call asks again
        if chosen is None:
            self._decoded.add(operation)
            self.decoded = tuple(sorted(self._decoded))
        self._renew_note(device)
        if len(self._entries) >= MOST_SHAPES:
            self._entries.clear()
        self._entries[key] = chosen
        return chosen


def _candidates(operation: str, device: torch.device, M: int, N: int) -> Iterable[str]:
    """Entries in the order in which they are tried: the launch table's, then the plain ones."""
    return dict.fromkeys((*_table_entries(operation, device, M, N), *kernel(operation).PLAIN))


def _table_entries(operation: str, device: torch.device, M: int, N: int) -> tuple[str, ...]:
    """Of the launch table, or of the rates that were measured on this machine."""
    own = _measured(device)
    return kernel("gemm_table").device_entries(operation, device, M, N, None if own is None else own.rates[operation])


def _measured(device: torch.device) -> launch_rates.Measured | None:
    if device.type != "cuda":
        return None
    return launch_rates.measured(device.index if device.index is not None else torch.cuda.current_device())
