"""Backend `cpu`: the reference's codes, fast.

Quantisers and decoder are C++ (cpu_kernels.cpp) where a compiler is at hand, torch otherwise; the codes are the same.
GEMMs: with pow2 scales a decoded FP8 value is exactly a BF16 number, so one matmul with BF16 products and FP32 sums of
the decoded operands is exact up to the order of the sums. With fp32 scales, codes are multiplied block by block of K
and promoted, as on the GPU.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fp8train.backends import cpu_library
from fp8train.backends.device_gemm import exact_in_bf16, fp32_product, sum_of_blocks
from fp8train.backends.interface import Backend, Square
from fp8train.backends.producers import rows_dense
from fp8train.quant import reference
from fp8train.quant.formats import E5M2, QuantSpec
from fp8train.quant.qtensor import QTensor
from fp8train.quant.scaling import amax_bits, scale_inv_from_amax

TILE = 128  # tile of cpu_kernels.cpp
_SETTING = threading.Lock()  # of torch.backends.mkldnn.matmul.fp32_precision


class CpuBackend(Backend):
    """Fast CPU execution, bit-identical codes."""

    name = "cpu"
    on_gpus = False
    emulates = True

    def __init__(self, compiled: bool = True) -> None:
        """Load the C++ kernels; compiled=False computes in torch even if there is a compiler."""
        if not compiled:
            self.name = "cpu_torch"
        library = cpu_library.load() if compiled else cpu_library.CpuLibrary(None, "asked for torch only")
        self._lib = library.functions
        # a CPU without BF16 instructions multiplies BF16 matrices about three times slower than FP32 ones
        self._bf16_units = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        quantisers = library.reason if self._lib else f"quantisers in torch: {library.reason}"
        self.note = f"{quantisers}; GEMMs {'BF16' if self._bf16_units else 'FP32'} units"

    def unavailable(self, device_type: str) -> str | None:
        """See Backend."""
        return None if device_type in ("cpu", "meta") else f"it computes on the CPU, and the model is on {device_type}"

    def quantize(self, x: Tensor, spec: QuantSpec, transpose: bool) -> QTensor:
        """See Backend."""
        rows, cols = x.shape
        if self._lib is None or spec.block == "tensor":
            return _quantize_torch(x, spec, transpose)
        block_rows, block = spec.block_shape(cols, rows) if transpose else spec.block_shape(rows, cols)
        if block_rows == 1:
            x = rows_dense(x)
            q, scale = _empty(spec, (cols, rows) if transpose else (rows, cols), x.device)
            run = self._lib.fp8_quantize_columns if transpose else self._lib.fp8_quantize_rows
            run(*_matrix(x), block, *_kind(spec), q.data_ptr(), scale.data_ptr(), torch.get_num_threads())
            return QTensor(q, scale, spec)
        if spec.transposable and block <= TILE:
            x = rows_dense(x)
            qdata, scale_inv = _empty(spec, (rows, cols), x.device)
            self._square(x, spec, block, qdata, scale_inv, None, None)
            made = QTensor(qdata, scale_inv, spec)
            return made.transpose() if transpose else made
        return _quantize_torch(x, spec, transpose)

    def quantize_dual(self, x: Tensor, row: QuantSpec, col: QuantSpec) -> tuple[QTensor, QTensor]:
        """See Backend."""
        tiled = row.block == (1, TILE) == col.block and row.format is col.format
        if self._lib is None or not tiled:
            return super().quantize_dual(x, row, col)
        x = rows_dense(x)
        rows, cols = x.shape
        q, scale = _empty(row, (rows, cols), x.device)
        qt, scale_t = _empty(col, (cols, rows), x.device)
        e5m2, row_pow2 = _kind(row)
        outputs = (q.data_ptr(), scale.data_ptr(), qt.data_ptr(), scale_t.data_ptr())
        self._lib.fp8_quantize_dual(*_matrix(x), e5m2, row_pow2, _kind(col)[1], *outputs, torch.get_num_threads())
        return QTensor(q, scale, row), QTensor(qt, scale_t, col)

    def quantize_square(self, x: Tensor, spec: QuantSpec, out: Square | None = None, turned: bool = True) -> Square:
        """See Backend."""
        block = spec.block_shape(*x.shape)[0]
        if self._lib is None or spec.block == "tensor" or block > TILE:
            return super().quantize_square(x, spec, out, turned)
        x = rows_dense(x)
        rows, cols = x.shape
        q, scale = _empty(spec, (rows, cols), x.device)
        if not turned:
            self._square(x, spec, block, q, scale, None, None)
            return QTensor(q, scale, spec), None
        qt, scale_t = _empty(spec, (cols, rows), x.device)
        self._square(x, spec, block, q, scale, qt, scale_t)
        return QTensor(q, scale, spec), QTensor(qt, scale_t, spec)

    def scaled_mm(
        self, a: QTensor, b: QTensor, bias: Tensor | None, out: Tensor | None, accumulate: bool, out_dtype: torch.dtype
    ) -> Tensor:
        """See Backend."""
        if not (exact_in_bf16(a) and exact_in_bf16(b)):
            return reference.finish(self._mm_by_blocks(a, b), bias, out, accumulate, out_dtype)
        direct = self._bf16_units and bias is None and out is None and out_dtype is torch.bfloat16
        dtype = torch.bfloat16 if direct else torch.float32
        left, right = self._decode(a, dtype, scaled=True), self._decode(b, dtype, scaled=True)
        if direct:
            return left @ right.T
        with _fp32_matmul("bf16" if self._bf16_units else "ieee"):
            acc = left @ right.T
        return reference.finish(acc, bias, out, accumulate, out_dtype)

    def mm(
        self, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor | None, accumulate: bool, out_dtype: torch.dtype
    ) -> Tensor:
        """See Backend."""
        bf16 = a.dtype is torch.bfloat16
        if bf16 and self._bf16_units and bias is None and out is None and out_dtype is torch.bfloat16:
            return a @ b.T
        with _fp32_matmul("bf16" if bf16 and self._bf16_units else "ieee"):
            acc = a.to(torch.float32) @ b.to(torch.float32).T
        return reference.finish(acc, bias, out, accumulate, out_dtype)

    def _mm_by_blocks(self, a: QTensor, b: QTensor) -> Tensor:
        """FP32 [M, N]: per block of K a product of codes, scaled and added in FP32."""
        left, right = self._decode(a, torch.float32, scaled=False), self._decode(b, torch.float32, scaled=False)
        with _fp32_matmul("bf16" if self._bf16_units else "ieee"):
            return sum_of_blocks(a, b, left, right, fp32_product)

    def _decode(self, q: QTensor, dtype: torch.dtype, scaled: bool) -> Tensor:
        """Codes, times their scales if `scaled`, as `dtype`; exact, or rounded once to bf16."""
        if self._lib is None:
            return _decode_torch(q, dtype, scaled)
        rows, cols = q.shape
        qdata, scale = q.qdata.contiguous(), q.scale_inv.contiguous()
        out = torch.empty(rows, cols, dtype=dtype, device=qdata.device)
        block, bf16 = q.spec.block_shape(rows, cols), dtype is torch.bfloat16
        pointer = scale.data_ptr() if scaled else None
        threads = torch.get_num_threads()
        self._lib.fp8_decode(
            qdata.data_ptr(), pointer, rows, cols, *block, _kind(q.spec)[0], bf16, out.data_ptr(), threads
        )
        return out

    def _square(
        self,
        x: Tensor,
        spec: QuantSpec,
        block: int,
        q: Tensor,
        scale: Tensor,
        qt: Tensor | None,
        scale_t: Tensor | None,
    ) -> None:
        assert self._lib is not None
        outputs = [None if tensor is None else tensor.data_ptr() for tensor in (q, scale, qt, scale_t)]
        self._lib.fp8_quantize_square(*_matrix(x), block, *_kind(spec), *outputs, torch.get_num_threads())


@contextlib.contextmanager
def _fp32_matmul(precision: str) -> Iterator[None]:
    """FP32 matmuls form products of "bf16" operands (exact for BF16 numbers), or of FP32 ones ("ieee").

    The setting is the process's: one thread at a time, or another would put back what this one has set.
    """
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _SETTING:
        previous, settings.fp32_precision = settings.fp32_precision, precision
        try:
            yield
        finally:
            settings.fp32_precision = previous


def _matrix(x: Tensor) -> tuple[int, bool, int, int, int]:
    """x as the C functions take it."""
    if type(x) is not Tensor and is_traceable_wrapper_subclass(x):
        raise TypeError(
            f"backend cpu: x is a {type(x).__name__}, whose memory is not the matrix; needs a plain tensor. "
            "Pass x.to_local() or x.full_tensor()."
        )
    return x.data_ptr(), x.dtype is torch.bfloat16, x.shape[0], x.shape[1], x.stride(0)


def _kind(spec: QuantSpec) -> tuple[bool, bool]:
    """(e5m2, pow2) as the C functions take it."""
    return spec.format is E5M2, spec.scale == "pow2"


def _empty(spec: QuantSpec, shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Uninitialised codes and scales of a matrix of that shape."""
    qdata = torch.empty(shape, dtype=spec.format.dtype, device=device)
    return qdata, torch.empty(spec.scale_shape(*shape), dtype=torch.float32, device=device)


def _quantize_torch(x: Tensor, spec: QuantSpec, transpose: bool) -> QTensor:
    """The reference's codes with fewer passes: |x / scale_inv| <= max (1 + 2^-22) rounds to max in every torch."""
    blocks, sizes = reference.to_blocks(x.T if transpose else x, spec)
    scale_inv = scale_inv_from_amax(_amax_bits(blocks), spec.format, spec.scale)
    scaled = blocks.to(torch.float32) * (torch.ones_like(scale_inv) / scale_inv)
    codes = scaled.to(spec.format.dtype).view(torch.uint8)
    if bool(scale_inv.isnan().any()):
        codes = torch.where(scale_inv.isnan(), torch.full_like(codes, spec.format.nan_code), codes)
    qdata = reference.from_blocks(codes, sizes).contiguous().view(spec.format.dtype)
    return QTensor(qdata, scale_inv.squeeze(-1).squeeze(-2).contiguous(), spec)


def _amax_bits(blocks: Tensor) -> Tensor:
    """As scaling.amax_bits without widening bf16. As integers: torch 2.13's bf16 amax loses a NaN in some layouts."""
    if blocks.dtype is torch.float32:
        return amax_bits(blocks, dim=(-3, -1), keepdim=True)
    bits = torch.amax(blocks.view(torch.int16) & 0x7FFF, dim=(-3, -1), keepdim=True)
    return bits.to(torch.int32).bitwise_left_shift_(16)


def _decode_torch(q: QTensor, dtype: torch.dtype, scaled: bool) -> Tensor:
    """As CpuBackend._decode, in torch."""
    values = _codes_to_bf16(q).to(dtype)  # an 8-bit code is exactly a BF16 number
    if not scaled:
        return values
    rows, cols = q.shape
    block_rows, block_cols = q.spec.block_shape(rows, cols)
    if block_rows == 1 and cols % block_cols == 0:
        scale = q.scale_inv.unsqueeze(-1).to(dtype)
        return values.view(rows, cols // block_cols, block_cols).mul_(scale).view(rows, cols)
    return values.mul_(reference.expand_scale(q).to(dtype))


def _codes_to_bf16(q: QTensor) -> Tensor:
    """Values of the codes, bf16: an order of magnitude faster than torch's own cast, which is scalar."""
    codes = q.qdata.contiguous().view(torch.int8)
    if q.spec.format is E5M2:  # an E5M2 number is the upper byte of an FP16 number
        return codes.to(torch.int16).bitwise_left_shift_(8).view(torch.float16).to(torch.bfloat16)
    if codes.numel() and int((codes & 0x7F).max()) == q.spec.format.nan_code:
        return q.qdata.to(torch.bfloat16)
    bits = (
        codes.to(torch.int16).bitwise_left_shift_(4).bitwise_and_(-30721)
    )  # sign, then exponent and mantissa: the value times 2^-120
    return bits.view(torch.bfloat16).mul_(2.0**120)
