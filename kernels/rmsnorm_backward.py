"""Backward of RMSNorm, y = x * rstd * weight with rstd = 1 / sqrt(mean(x^2) + eps), in one pass over dy and x.

g = dy * weight; dx = g * rstd - x * rstd^3 * mean(g * x); dweight = sum over rows of dy * x * rstd; all in FP32.
dy, x [M, K] bf16 or fp32, row-major, any leading strides; weight [K] and rstd [M] fp32 -> dx [M, K] in the dtype of x,
dweight [K] fp32. Where x is the residual stream, its own gradient dtotal is added to dx, rounded as two operations of
torch would round, and the sum can be written a second time in the dtype of the branch that had been added.
A program takes every so many-th row whole, so that nothing is read twice, and keeps its share of dweight in registers;
the shares are added up behind it, in the same order every time.
Source: arXiv:1910.07467. torch's own kernel reads FP32 copies of both, twice: bytes in kernels/README.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8train.kernels.gemm_tile import multiprocessors
from fp8train.kernels.launch import Rest, launch
from fp8train.kernels.tile_launch import check_matrix, check_vector

WIDEST = 8192  # columns that the registers of a program hold


@triton.jit
def _rmsnorm_backward_kernel(
    dy_ptr, x_ptr,  # [M, K] bf16 or fp32
    weight_ptr, rstd_ptr,  # [K] fp32, [M] fp32
    dtotal_ptr,  # [M, K] in the dtype of x, or None
    dx_ptr,  # [M, K] in the dtype of x
    dbranch_ptr,  # [M, K] bf16 or fp32, or None
    shares_ptr,  # [programs, K] fp32
    M, K, stride_dym, stride_xm, stride_dtm, stride_dxm, stride_dbm,
    COLS: tl.constexpr,
):  # fmt: skip
    # in fours, whatever the dtype: a thread that read 8 of BF16 and 4 of FP32 would pass them on through shared memory
    cols = 4 * tl.arange(0, COLS // 4)[:, None] + tl.arange(0, 4)[None, :]
    inside = cols < K
    weight = tl.load(weight_ptr + cols, mask=inside, other=0.0)
    share = tl.zeros([COLS // 4, 4], tl.float32)
    for index in range(tl.program_id(0), M, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        dy = tl.load(dy_ptr + row * stride_dym + cols, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * stride_xm + cols, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        g = dy * weight
        slope = tl.sum(g * x) * (rstd * rstd * rstd) / K
        dx = tl.fma(-slope, x, g * rstd).to(dx_ptr.dtype.element_ty)
        if dtotal_ptr is not None:
            dtotal = tl.load(dtotal_ptr + row * stride_dtm + cols, mask=inside, other=0.0)
            dx = (dx.to(tl.float32) + dtotal.to(tl.float32)).to(dx.dtype)
        tl.store(dx_ptr + row * stride_dxm + cols, dx, mask=inside)
        if dbranch_ptr is not None:
            tl.store(dbranch_ptr + row * stride_dbm + cols, dx.to(dbranch_ptr.dtype.element_ty), mask=inside)
        share += dy * (x * rstd)
    tl.store(shares_ptr + tl.cast(tl.program_id(0), tl.int64) * K + cols, share, mask=inside)


def _tile(K: int) -> tuple[dict[str, int], dict[str, int], int]:
    """Constants and options, and the programs of a multiprocessor: a thread holds 8 numbers of a row, 16 of the widest.

    With 16 a thread of rows of 4096, a third fewer threads fit.
    """
    columns = max(triton.next_power_of_2(K), 1024)
    return {"COLS": columns}, {"num_warps": min(columns // 256, 16)}, WIDEST // columns


def _compile_cases() -> list[tuple]:
    """What tests compile: dtypes of dy and x, the widest rows, rows that begin anywhere, sums with dtotal."""
    pointers = dict.fromkeys(("weight_ptr", "rstd_ptr", "shares_ptr"), "*fp32")
    sizes = dict.fromkeys(("M", "K", "stride_dym", "stride_xm", "stride_dtm", "stride_dxm", "stride_dbm"), "i32")
    cases = []
    for dy, x, columns in (
        ("bf16", "fp32", 4096), ("bf16", "bf16", 4096), ("fp32", "fp32", 4096), ("bf16", "fp32", WIDEST),
    ):  # fmt: skip
        signature = {"dy_ptr": f"*{dy}", "x_ptr": f"*{x}", "dx_ptr": f"*{x}"} | pointers | sizes
        constants, options, _ = _tile(columns)
        title = f"rmsnorm_backward {dy} {x} {columns}"
        cases.append((title, _rmsnorm_backward_kernel, signature, constants, options))
        summed = signature | {"dtotal_ptr": f"*{x}"} | ({"dbranch_ptr": f"*{dy}"} if dy != x else {})
        cases.append((f"{title} sum", _rmsnorm_backward_kernel, summed, constants, options))
    title, kernel, signature, constants, options = cases[1]
    cases.append((f"{title} ragged", kernel, signature, constants, options | {"odd": tuple(sizes)}))
    for one in ("M", "K"):  # a size of 1 is a constant of the kernel
        rest = {name: kind for name, kind in signature.items() if name != one}
        cases.append((f"{title} {one} = 1", kernel, rest, constants | {one: 1}, options))
    return cases


# (name, kernel, signature, constexprs, options); pointers and integers are multiples of 16 but those in options["odd"]
COMPILE_CASES = _compile_cases()


def rmsnorm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    *,
    dtotal: Tensor | None = None,
    branch_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x and of weight, and of what x is the sum of.

    Args:
        dy: [M, K] bf16 or fp32, row-major with any leading stride, on a GPU; any M >= 0, 0 <= K <= WIDEST.
        x: [M, K] bf16 or fp32, likewise.
        weight: [K] fp32.
        rstd: [M] fp32, of rmsnorm_rstd.
        dtotal: [M, K] in the dtype of x, row-major with any leading stride: added to dx. None: 0.
        branch_dtype: bf16 or fp32, to have dx in this dtype too.

    Returns:
        (dx [M, K] in the dtype of x, contiguous; dweight [K] fp32; dx in branch_dtype, or None).

    Raises:
        ValueError: a shape, a stride or a dtype does not fit.
    """
    _check(dy, x, weight, rstd, dtotal, branch_dtype)
    M, K = x.shape
    dx = torch.empty((M, K), dtype=x.dtype, device=x.device)
    dbranch = None if branch_dtype is None else torch.empty_like(dx, dtype=branch_dtype)
    if dx.numel() == 0:
        return dx, torch.zeros_like(weight), dbranch
    constants, options, resident = _tile(K)
    programs = min(M, resident * multiprocessors(x.device))
    shares = torch.empty((programs, K), dtype=torch.float32, device=x.device)

    def rest() -> Rest:
        strides = [0 if tensor is None else tensor.stride(0) for tensor in (dy, x, dtotal, dx, dbranch)]
        return (programs,), (M, K, *strides), constants, options

    launch(_rmsnorm_backward_kernel, (), (dy, x, weight, rstd, dtotal, dx, dbranch, shares), rest)
    return dx, shares.sum(0), dbranch


def _check(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dtotal: Tensor | None, branch_dtype: torch.dtype | None
) -> None:
    name = "rmsnorm_backward"
    check_matrix(name, "x", x)
    M, K = x.shape
    for label, tensor in (("dy", dy), ("dtotal", dtotal)):
        if tensor is None:
            continue
        check_matrix(name, label, tensor)
        if tensor.shape != x.shape:
            got = f"{list(tensor.shape)}; needs {[M, K]}, the shape of x"
            raise ValueError(f"{name}: {label} is {got}. Reshape one of them.")
    if dtotal is not None and dtotal.dtype is not x.dtype:
        raise ValueError(f"{name}: dtotal is {dtotal.dtype}; needs {x.dtype}, the dtype of x. Cast it.")
    if branch_dtype not in (None, torch.bfloat16, torch.float32):
        wanted = "torch.bfloat16, torch.float32 or None"
        raise ValueError(f"{name}: branch_dtype is {branch_dtype}; needs {wanted}. Cast the result.")
    if K > WIDEST:
        raise ValueError(f"{name}: x is {[M, K]}; needs at most {WIDEST} columns. Use backends.producers.")
    check_vector(name, "weight", weight, K, "Pass what rmsnorm took and gave")
    check_vector(name, "rstd", rstd, M, "Pass what rmsnorm took and gave")
