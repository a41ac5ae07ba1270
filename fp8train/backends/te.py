"""Backend `te`: TransformerEngine's blockwise quantiser and GEMM behind our two functions, where it is installed.

Its codes are those of the definition for finite blocks without subnormal numbers; a block with a NaN or an Inf is its
own affair. E4M3 only. It quantises sizes that are multiples of 128; our kernels quantise others, and they are padded to
multiply.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from fp8train.backends import device_gemm
from fp8train.backends.device_gemm import MULTIPLE, dense_codes, round_up
from fp8train.backends.interface import Square
from fp8train.backends.kernel_codes import codes_like
from fp8train.backends.machine import BLOCKWISE_PAIRS, no_gpu
from fp8train.backends.vendor import (
    VendorBackend,
    blocks_first,
    imported,
    required,
    rows_first,
)
from fp8train.quant import reference
from fp8train.quant.formats import E4M3, QuantSpec
from fp8train.quant.qtensor import QTensor

WHOLE = 128  # so that codes come in the strides of our own quantisers, which the operators promise
WORKSPACE_BYTES = 32 * 2**20
TENSORS = "transformer_engine.pytorch.tensor.float8_blockwise_tensor"
GEMM = "transformer_engine.pytorch.cpp_extensions.gemm"


class TransformerEngineBackend(VendorBackend):
    """Quantiser and FP8 GEMM of TransformerEngine."""

    name = "te"
    note = "TransformerEngine's blockwise quantiser and FP8 GEMM"

    def unavailable(self, device_type: str) -> str | None:
        """See Backend."""
        if reason := no_gpu(device_type, (9, 0)):
            return reason
        for name in ("transformer_engine_torch", TENSORS, GEMM):
            module = imported(name)
            if isinstance(module, str):
                return f"{module}; pip install --no-build-isolation 'transformer-engine[pytorch]>=2.9'"
        return None

    def quantize(self, x: Tensor, spec: QuantSpec, transpose: bool) -> QTensor:
        """See Backend."""
        if not _serves(x, spec):
            return super().quantize(x, spec, transpose)
        made = _quantized(x, spec, rowwise=not transpose, columnwise=transpose)
        return _columns(made, x, spec) if transpose else _rows(made, x, spec)

    def quantize_dual(self, x: Tensor, row: QuantSpec, col: QuantSpec) -> tuple[QTensor, QTensor]:
        """See Backend."""
        if row != col or not _serves(x, row) or row.block != (1, 128):
            return self.quantize(x, row, False), self.quantize(x, col, True)
        made = _quantized(x, row, rowwise=True, columnwise=True)
        return _rows(made, x, row), _columns(made, x, col)

    def quantize_square(self, x: Tensor, spec: QuantSpec, out: Square | None = None, turned: bool = True) -> Square:
        """See Backend."""
        if not _serves(x, spec):
            return super().quantize_square(x, spec, out, turned)
        made = _quantized(x, spec, rowwise=True, columnwise=turned)
        return _rows(made, x, spec), _columns(made, x, spec) if turned else None

    def scaled_mm(
        self, a: QTensor, b: QTensor, bias: Tensor | None, out: Tensor | None, accumulate: bool, out_dtype: torch.dtype
    ) -> Tensor:
        """See Backend."""
        (M, K), N = a.shape, b.shape[0]
        if (a.spec.block, b.spec.block) not in BLOCKWISE_PAIRS or 0 in (M, N, K):
            return device_gemm.decoded_mm(a, b, bias, out, accumulate, out_dtype)
        direct = bias is None and out is None
        dtype = out_dtype if direct else torch.float32
        general_gemm = required(GEMM).general_gemm
        # TransformerEngine is column-major: its A is our right operand
        arguments: dict[str, Any] = {"out_dtype": dtype, "layout": "TN", "use_split_accumulator": True}
        if "workspace" in inspect.signature(general_gemm).parameters:
            arguments["workspace"] = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=a.qdata.device)
        product = general_gemm(_wrapped(b), _wrapped(a), **arguments)[0][:M, :N]
        return product if direct else reference.finish(product, bias, out, accumulate, out_dtype)


def _serves(x: Tensor, spec: QuantSpec) -> bool:
    whole = x.numel() > 0 and x.shape[0] % WHOLE == 0 and x.shape[1] % WHOLE == 0
    return whole and spec.format is E4M3 and spec.block in ((1, 128), (128, 128))


def _quantizer(spec: QuantSpec, rowwise: bool, columnwise: bool) -> Any:
    return required(TENSORS).Float8BlockQuantizer(
        required("transformer_engine_torch").DType.kFloat8E4M3,
        rowwise=rowwise,
        columnwise=columnwise,
        amax_epsilon=0.0,
        force_pow_2_scales=spec.scale == "pow2",
        block_scaling_dim=2 if spec.block == (128, 128) else 1,
    )


def _quantized(x: Tensor, spec: QuantSpec, rowwise: bool, columnwise: bool) -> Any:
    return _quantizer(spec, rowwise, columnwise)(x.contiguous())


def _rows(made: Any, x: Tensor, spec: QuantSpec) -> QTensor:
    """The row copy of TransformerEngine's tensor, with our scale layout [ceil(M/rows), ceil(K/128)]."""
    return QTensor(made._rowwise_data.view(E4M3.dtype), _logical(made._rowwise_scale_inv, spec, x.shape), spec)


def _columns(made: Any, x: Tensor, spec: QuantSpec) -> QTensor:
    """The transposed column copy."""
    return QTensor(
        made._columnwise_data.view(E4M3.dtype), _logical(made._columnwise_scale_inv, spec, x.shape[::-1]), spec
    )


def _logical(scale: Tensor, spec: QuantSpec, shape: tuple[int, ...]) -> Tensor:
    rows, cols = spec.scale_shape(*shape)
    if spec.block == (128, 128):
        return scale[:rows, :cols].contiguous()
    return codes_like(scale, spec, shape[0], shape[1], False)[1].copy_(scale.T[:rows, :cols])


def _wrapped(q: QTensor) -> Any:
    """One of our operands as TransformerEngine's tensor, padded to whole units of 16."""
    rows, cols = (round_up(size, MULTIPLE) for size in q.shape)
    square = q.spec.block == (128, 128)
    return required(TENSORS).Float8BlockwiseQTensor(
        shape=(rows, cols),
        dtype=torch.bfloat16,
        fp8_dtype=required("transformer_engine_torch").DType.kFloat8E4M3,
        rowwise_data=dense_codes(q, rows, cols).view(torch.uint8),
        rowwise_scale_inv=blocks_first(q.scale_inv) if square else rows_first(q.scale_inv, rows).T,
        columnwise_data=None,
        columnwise_scale_inv=None,
        quantizer=_quantizer(q.spec, rowwise=True, columnwise=False),
        is_2D_scaled=square,
    )
