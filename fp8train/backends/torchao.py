"""Backend `torchao`: torchao's blockwise FP8 GEMMs, kernels of its prototype in Triton, behind our quantisers.

They read operands by stride, but sizes and tiles bind the caller: the contracted dimension is padded to whole blocks,
since their mask looks at the first block of it only, and scales are loaded without a mask, so that there is memory
behind them up to the end of the largest tile. Their offsets are 32 bits wide: beyond them operands are decoded instead.

They are autotuned: the first call for an N, a K (wgrad: an M too) and a dtype of the result compiles six tilings and
times each, so it takes far longer than the calls after it. The choice holds for the process; fprop and dgrad keep that
of the first M. `bench gemm` checks every product before it times one, and has this behind it by then.

Source: torchao/prototype/blockwise_fp8_training/kernels.py, whose GEMMs are the same from 0.14.0, the first version
with functions of these names, to 0.18.0. Versions before 0.17.0 cannot be imported with Triton 3.9.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8train.backends import device_gemm
from fp8train.backends.device_gemm import dense_codes, round_up
from fp8train.backends.machine import BLOCKWISE_PAIRS, no_gpu
from fp8train.backends.vendor import (
    VendorBackend,
    blocks_first,
    imported,
    required,
    rows_first,
)
from fp8train.quant import reference
from fp8train.quant.qtensor import QTensor

KERNELS = "torchao.prototype.blockwise_fp8_training.kernels"
SQUARE, ROWS = "triton_fp8_gemm_1x128_128x128", "triton_fp8_gemm_1x128_128x1"
BLOCK = 128
TILE = 256  # the largest that its autotuner tries, either way
ADDRESSED = 2**31  # elements that an offset of 32 bits reaches


class TorchaoBackend(VendorBackend):
    """FP8 GEMMs of torchao."""

    name = "torchao"
    note = "torchao's blockwise FP8 GEMMs"

    def unavailable(self, device_type: str) -> str | None:
        """See Backend."""
        if reason := no_gpu(device_type, (9, 0)):  # torchao's own linear asks for sm_90
            return reason
        module = imported(KERNELS)
        if isinstance(module, str):
            return f"{module}; pip install fp8train[triton] 'torchao>=0.17'"
        if missing := [name for name in (SQUARE, ROWS) if not hasattr(module, name)]:
            return f"this torchao has no {' and no '.join(missing)}; needs torchao 0.17 or newer"
        return None

    def scaled_mm(
        self, a: QTensor, b: QTensor, bias: Tensor | None, out: Tensor | None, accumulate: bool, out_dtype: torch.dtype
    ) -> Tensor:
        """See Backend."""
        (M, K), N = a.shape, b.shape[0]
        depth = round_up(K, BLOCK)
        beyond = max(M * depth, N * depth, M * N) > ADDRESSED
        if (a.spec.block, b.spec.block) not in BLOCKWISE_PAIRS or 0 in (M, N, K) or beyond:
            return device_gemm.decoded_mm(a, b, bias, out, accumulate, out_dtype)
        direct = bias is None and out is None
        square = b.spec.block == (BLOCK, BLOCK)
        product = getattr(required(KERNELS), SQUARE if square else ROWS)(
            dense_codes(a, M, depth),
            dense_codes(b, N, depth).T,
            _scale_of_rows(a.scale_inv),
            (_scale_of_blocks if square else _scale_of_rows)(b.scale_inv).T,
            block_size=BLOCK,
            out_dtype=out_dtype if direct else torch.float32,
        )
        return product if direct else reference.finish(product, bias, out, accumulate, out_dtype)


def _scale_of_rows(scale: Tensor) -> Tensor:
    """1x128 scales, rows contiguous: those of our kernels as they are, for they leave a tile of room; else a copy."""
    rows = round_up(scale.shape[0], TILE)
    return scale if scale.stride(0) == 1 and _holds(scale, rows) else rows_first(scale, rows)


def _scale_of_blocks(scale: Tensor) -> Tensor:
    """128x128 scales, blocks of K contiguous, with memory for a whole tile of rows: a copy if needed."""
    rows = round_up(scale.shape[0], TILE // BLOCK)
    if scale.stride(1) == 1 and _holds(scale, rows):
        return scale
    return blocks_first(F.pad(scale, (0, 0, 0, rows - scale.shape[0]), value=1.0))


def _holds(scale: Tensor, rows: int) -> bool:
    """Whether the storage goes on to where an element in the last of `rows` rows would be."""
    last = (rows - 1) * scale.stride(0) + (scale.shape[1] - 1) * scale.stride(1)
    return scale.storage_offset() + last < scale.untyped_storage().nbytes() // scale.itemsize
