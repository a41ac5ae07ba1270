"""What backends that call a vendor's FP8 GEMM share: our quantisers and RoPE, torch's own GEMMs, scale layouts."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8train.backends.dequant_bf16 import DequantBackend
from fp8train.backends.interface import Backend, Square
from fp8train.backends.machine import BLOCKWISE_PAIRS, not_served
from fp8train.backends.triton import TritonBackend, triton_refusal
from fp8train.quant.formats import LinearPrecision, QuantSpec
from fp8train.quant.qtensor import QTensor


class VendorBackend(Backend):
    """Quantises and rotates by our kernels where Triton can compile them, else by the definition: the same bits."""

    @functools.cached_property
    def quantisers(self) -> Backend:
        """The backend whose quantisers and rotary embedding are used."""
        if triton_refusal():
            return DequantBackend()
        return TritonBackend()

    @property
    def pads_codes(self) -> bool:
        """See Backend."""
        return self.quantisers.pads_codes

    @property
    def refused(self) -> list[str]:
        """See Backend; the GEMMs are not asked for."""
        return self.quantisers.refused

    def unsupported(self, precision: LinearPrecision) -> str | None:
        """See Backend; blockwise only, but for one that says otherwise."""
        return not_served(precision, BLOCKWISE_PAIRS, mixed=False)

    def expect(self, precisions: Iterable[LinearPrecision]) -> None:
        """See Backend."""
        self.quantisers.expect(precisions)

    def quantize(self, x: Tensor, spec: QuantSpec, transpose: bool) -> QTensor:
        """See Backend."""
        return self.quantisers.quantize(x, spec, transpose)

    def quantize_dual(self, x: Tensor, row: QuantSpec, col: QuantSpec) -> tuple[QTensor, QTensor]:
        """See Backend."""
        return self.quantisers.quantize_dual(x, row, col)

    def quantize_square(self, x: Tensor, spec: QuantSpec, out: Square | None = None, turned: bool = True) -> Square:
        """See Backend."""
        return self.quantisers.quantize_square(x, spec, out, turned)

    def transpose_codes(self, q: QTensor) -> QTensor:
        """See Backend."""
        return self.quantisers.transpose_codes(q)

    def has_rope(self) -> bool:
        """See Backend."""
        return self.quantisers.has_rope()

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, inverse: bool) -> Tensor:
        """See Backend."""
        return self.quantisers.rope(x, cos, sin, dtype, inverse)


def imported(module: str) -> ModuleType | str:
    """A vendor's module, or why it cannot be imported: the error's first line, whatever its type."""
    try:
        return __import__(module, fromlist=["_"])
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:  # an empty meta package, a missing shared library, a Triton that refuses its kernels
        return f"import of {module} failed: {(str(error).splitlines() or [type(error).__name__])[0]}"


def required(module: str) -> ModuleType:
    """A vendor's module that Backend.unavailable has found."""
    found = imported(module)
    assert not isinstance(found, str), found
    return found


def rows_first(scale: Tensor, rows: int) -> Tensor:
    """1x128 scales [M, ceil(K/128)] as [rows, ceil(K/128)] with strides (1, rows), padded with 1: a copy if needed."""
    if scale.shape[0] == rows and scale.stride() == (1, rows):
        return scale
    return F.pad(scale.T, (0, rows - scale.shape[0]), value=1.0).contiguous().T


def blocks_first(scale: Tensor) -> Tensor:
    """128x128 scales [ceil(N/128), ceil(K/128)], row-major, padded with 1 to a multiple of four blocks of K."""
    return F.pad(scale, (0, -scale.shape[1] % 4), value=1.0).contiguous()
