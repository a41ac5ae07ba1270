"""Launcher of the Gluon entries: descriptors of the boxes that TMA brings, and registers of the warpgroups."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fp8train.kernels import gemm_gluon
from fp8train.kernels.gemm_tile import BLOCK_K, multiprocessors, scale_rows, tile_of, tma_reads
from fp8train.kernels.launch import first_launch

# Of the 512 registers that a thread of each warpgroup has together: by number of math warpgroups, those of a math
# thread and of the producer's (multiples of 8).
REGISTERS = {2: (232, 40), 3: (160, 32)}


def launch(
    key: Hashable,
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None,
    entry: Mapping[str, int],
    b_rows: int,
    accumulate: bool,
) -> None:
    """out = a @ b.T + bias, or out += a @ b.T, the first time with operands of these properties.

    Args:
        key: as for first_launch.
        a, b, out, a_scale, b_scale, bias: as gemm_launch.py has checked them.
        entry: of the operation's CONFIGS.
        b_rows: rows of a block of b, 128 or 1.
    """
    (M, K), N = a.shape, b.shape[0]
    constants = {name: value for name, value in entry.items() if name != "GROUP_M"}
    box_n = entry["BLOCK_N"]
    boxes = {
        "a_desc": _described(a, gemm_gluon.BOX_M.value, BLOCK_K.value),
        "b_desc": _described_quads(b, box_n) if entry["AHEAD"] else _described(b, box_n, BLOCK_K.value),
    }
    tensors = {"a_desc": 0, "b_desc": 1, "c_ptr": 2, "a_scale_ptr": 3, "b_scale_ptr": 4, "bias_ptr": 5}
    if b_rows == 1:
        boxes["b_scale_desc"] = _described(scale_rows(b_scale), 1, box_n)
        tensors["b_scale_desc"] = 4
    if out.dtype is torch.bfloat16 and tma_reads(out):
        boxes["c_desc"] = _described(out, gemm_gluon.BOX_M.value, box_n)
        tensors["c_desc"] = 2
    rows, cols = tile_of(entry)
    tiles = -(-M // rows) * -(-N // cols)
    arguments = {
        "b_scale_desc": None, "c_desc": None, **boxes, "c_ptr": out, "a_scale_ptr": a_scale, "b_scale_ptr": b_scale,
        "bias_ptr": bias, "M": M, "N": N, "K": K, "group_m": entry["GROUP_M"], "stride_cm": out.stride(0),
        "stride_sam": a_scale.stride(0), "stride_sak": a_scale.stride(1), "stride_sbn": b_scale.stride(0),
        "stride_sbk": b_scale.stride(1), "B_ROWS": b_rows, "BIAS": bias is not None, "ACCUMULATE": accumulate,
        **constants, **registers(entry),
    }  # fmt: skip
    grid = (min(tiles, multiprocessors(a.device)),)
    first_launch(
        key, gemm_gluon._gemm_gluon_kernel, grid, arguments, tensors, a.device, num_warps=4, enable_fp_fusion=True
    )


def _described(x: torch.Tensor, rows: int, cols: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, cols], box_layout(rows, x.element_size()))


def _described_quads(b: torch.Tensor, rows: int) -> TensorDescriptor:
    """Rows 16 p + 4 q + 2 h + e of b [N, K] by p, q, h, e; boxes of one h.

    Each stride is that of the dimension within times its size, as cuTensorMapEncodeTiled wants them.
    """
    (N, K), step = b.shape, b.stride(0)
    shape, strides = [N // 16, 4, 2, 2, K], [16 * step, 4 * step, 2 * step, step, 1]
    return TensorDescriptor(b, shape, strides, [rows // 16, 4, 1, 2, BLOCK_K.value], box_layout(rows, 1, rank=5))


def box_layout(rows: int, element_size: int, rank: int = 2) -> gl.NVMMASharedLayout:
    """Boxes of operands and results are swizzled as the tensor cores read them; a row of scales lies as it is."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128 if rows > 1 else 0, element_bitwidth=8 * element_size, rank=rank)


def registers(entry: Mapping[str, int]) -> dict[str, int]:
    return dict(zip(("MATH_REGISTERS", "PRODUCER_REGISTERS"), REGISTERS[entry["MATH_GROUPS"]], strict=True))
