"""Backward of RMSNorm, y = x * rstd * weight with rstd = 1 / sqrt(mean(x^2) + eps), in one pass over dy and x.

g = dy * weight; dx = g * rstd - x * rstd^3 * mean(g * x); dweight = sum over rows of dy * x * rstd; all in FP32.
dy, x [M, K] bf16 or fp32, row-major, any leading strides; weight [K] and rstd [M] fp32 -> dx [M, K] in the dtype of x,
dweight [K] fp32. A program takes every so many-th row whole, so that nothing is read twice, and keeps its share of
dweight in registers; the shares are added up behind it, in the same order every time.
Source: arXiv:1910.07467. torch's own kernel reads FP32 copies of both, twice: bytes in kernels/README.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8train.kernels.gemm_tile import multiprocessors
from fp8train.kernels.launch import Rest, launch
from fp8train.kernels.tile_launch import check_matrix

WIDEST = 8192  # columns that the registers of a program hold


@triton.jit
def _rmsnorm_backward_kernel(
    dy_ptr, x_ptr,  # [M, K] bf16 or fp32
    weight_ptr, rstd_ptr,  # [K] fp32, [M] fp32
    dx_ptr,  # [M, K] in the dtype of x
    shares_ptr,  # [programs, K] fp32
    M, K, stride_dym, stride_xm, stride_dxm,
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
        dx = g * rstd - slope * x
        tl.store(dx_ptr + row * stride_dxm + cols, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        share += dy * (x * rstd)
    tl.store(shares_ptr + tl.cast(tl.program_id(0), tl.int64) * K + cols, share, mask=inside)


def _tile(K: int) -> tuple[dict[str, int], dict[str, int], int]:
    """Constants and options, and the programs of a multiprocessor: a thread holds 8 numbers of a row, 16 of the widest.

    With 16 a thread of rows of 4096, a third fewer threads fit.
    """
    columns = max(triton.next_power_of_2(K), 1024)
    return {"COLS": columns}, {"num_warps": min(columns // 256, 16)}, WIDEST // columns


def _compile_cases() -> list[tuple]:
    """What tests compile: dtypes of dy and x, the widest rows, and rows that begin anywhere."""
    pointers = dict.fromkeys(("weight_ptr", "rstd_ptr", "shares_ptr"), "*fp32")
    sizes = dict.fromkeys(("M", "K", "stride_dym", "stride_xm", "stride_dxm"), "i32")
    cases = []
    for dy, x, columns in (
        ("bf16", "fp32", 4096), ("bf16", "bf16", 4096), ("fp32", "fp32", 4096), ("bf16", "fp32", WIDEST),
    ):  # fmt: skip
        signature = {"dy_ptr": f"*{dy}", "x_ptr": f"*{x}", "dx_ptr": f"*{x}"} | pointers | sizes
        constants, options, _ = _tile(columns)
        title = f"rmsnorm_backward {dy} {x} {columns}"
        cases.append((title, _rmsnorm_backward_kernel, signature, constants, options))
    title, kernel, signature, constants, options = cases[0]
    cases.append((f"{title} ragged", kernel, signature, constants, options | {"odd": tuple(sizes)}))
    for one in ("M", "K"):  # a size of 1 is a constant of the kernel
        rest = {name: kind for name, kind in signature.items() if name != one}
        cases.append((f"{title} {one} = 1", kernel, rest, constants | {one: 1}, options))
    return cases


# (name, kernel, signature, constexprs, options); pointers and integers are multiples of 16 but those in options["odd"]
COMPILE_CASES = _compile_cases()


def rmsnorm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of weight.

    Args:
        dy: [M, K] bf16 or fp32, row-major with any leading stride, on a GPU; any M >= 0, 0 <= K <= WIDEST.
        x: [M, K] bf16 or fp32, likewise.
        weight: [K] fp32.
        rstd: [M] fp32, as rmsnorm_quantize.rmsnorm returns it.

    Returns:
        (dx [M, K] in the dtype of x, contiguous; dweight [K] fp32).

    Raises:
        ValueError: a shape, a stride or a dtype does not fit.
    """
    _check(dy, x, weight, rstd)
    M, K = x.shape
    dx = torch.empty((M, K), dtype=x.dtype, device=x.device)
    if dx.numel() == 0:
        return dx, torch.zeros_like(weight)
    constants, options, resident = _tile(K)
    programs = min(M, resident * multiprocessors(x.device))
    shares = torch.empty((programs, K), dtype=torch.float32, device=x.device)

    def rest() -> Rest:
        return (programs,), (M, K, dy.stride(0), x.stride(0), dx.stride(0)), constants, options

    launch(_rmsnorm_backward_kernel, (), (dy, x, weight, rstd, dx, shares), rest)
    return dx, shares.sum(0)


def _check(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> None:
    name = "rmsnorm_backward"
    check_matrix(name, "x", x)
    check_matrix(name, "dy", dy)
    M, K = x.shape
    if dy.shape != x.shape:
        raise ValueError(f"{name}: dy is {list(dy.shape)}; needs {[M, K]}, the shape of x. Reshape one of them.")
    if K > WIDEST:
        raise ValueError(f"{name}: x is {[M, K]}; needs at most {WIDEST} columns. Use backends.producers.")
    for label, vector, size in (("weight", weight, K), ("rstd", rstd, M)):
        if vector.shape != (size,) or vector.dtype is not torch.float32 or not vector.is_contiguous():
            got = f"{list(vector.shape)} {vector.dtype}, strides {vector.stride()}"
            remedy = "Pass what rmsnorm took and gave"
            raise ValueError(f"{name}: {label} is {got}; needs [{size}] torch.float32, contiguous. {remedy}.")
