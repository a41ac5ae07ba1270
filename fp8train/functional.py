"""fp8train.quantize and fp8train.scaled_mm: the quantiser and the GEMM on their own."""

from __future__ import annotations

import torch
from torch import Tensor

from fp8train.backends import ops as _ops  # noqa: F401  registers torch.ops.fp8train
from fp8train.backends import select_backend
from fp8train.backends.coverage import NOT_COUNTED
from fp8train.quant.formats import FORMATS, Block, QuantSpec, ScaleKind
from fp8train.quant.qtensor import QTensor
from fp8train.quant.reference import check_quantize_input, check_scaled_mm, finish


@torch.no_grad()
def quantize(
    x: Tensor,
    *,
    block: Block = (1, 128),
    fmt: str = "e4m3",
    scale: ScaleKind = "pow2",
    transpose: bool = False,
    backend: str = "auto",
) -> QTensor:
    """Round a matrix to FP8 with one scale per block.

    Args:
        x: [M, K] bf16 or fp32; any sizes.
        block: "tensor", "row" or (rows, cols).
        fmt: "e4m3" or "e5m2".
        scale: "pow2" (rounded up to a power of two) or "fp32".
        transpose: quantize x.T, with blocks along M, as wgrad needs.
        backend: "auto" or a backend's name; the codes are the same on all but `te`, whose blocks with NaN, Inf or
            subnormal numbers differ.

    Returns:
        QTensor: qdata [M, K] (transposed [K, M]) and scale_inv; x ~ qdata * scale_inv.

    Raises:
        ValueError: x, block, fmt or scale is not of that kind.

    Source: DeepSeek-V3 (arXiv:2412.19437) 3.3.
    """
    check_quantize_input(x)
    if x.dim() != 2:
        raise ValueError(f"quantize: x is {list(x.shape)}; needs a matrix [M, K]. Reshape it first.")
    if fmt not in FORMATS:
        raise ValueError(f"quantize: fmt is {fmt!r}; needs one of {', '.join(FORMATS)}.")
    spec = QuantSpec(FORMATS[fmt], block, scale)
    # through the operators, so that meta tensors are served too
    chosen = select_backend(backend, x.device.type).backend.name
    qdata, scale_inv = torch.ops.fp8train.quantize(x, str(spec), transpose, chosen)
    return QTensor(qdata, scale_inv, spec)


@torch.no_grad()
def scaled_mm(
    qa: QTensor,
    qb: QTensor,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    accumulate: bool = False,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: str = "auto",
) -> Tensor:
    """a @ b.T from FP8 operands, summed in FP32: per 128 of K, acc = fma(partial, scale_a * scale_b, acc).

    Args:
        qa: [M, K].
        qb: [N, K].
        bias: [N], added in FP32.
        out: [M, N] bf16 or fp32, written in place.
        accumulate: add to `out`, which must be fp32.
        out_dtype: of a new result; torch.bfloat16 or torch.float32.
        backend: "auto" or a backend's name.

    Returns:
        Tensor: [M, N]; `out` if given.

    Raises:
        ValueError: shapes, bias, out or accumulate do not fit.
    """
    check_scaled_mm(qa, qb, bias, out, accumulate, out_dtype)
    chosen = select_backend(backend, qa.qdata.device.type).backend.name
    left, right = (qa.qdata, qa.scale_inv, str(qa.spec)), (qb.qdata, qb.scale_inv, str(qb.spec))
    made = out_dtype if out is None else torch.float32
    y = torch.ops.fp8train.scaled_mm(*left, *right, bias, made, chosen, NOT_COUNTED, "scaled_mm")
    return y if out is None else finish(y, None, out, accumulate, out_dtype)
