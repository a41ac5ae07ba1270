"""What RMSNorm divides by: rstd = 1 / sqrt(mean(x^2) + eps) of each row, of x itself or of the sum that it writes.

x [M, K] bf16 or fp32, row-major, any leading stride -> rstd [M] fp32. `add_rstd` takes a branch [M, K] besides, bf16 or
fp32, and writes total = x + branch in the dtype of x: the residual stream is read once where it is added to, and what
rmsnorm_quantize reads next is all that it needs. Squares are those of the rounded total.
Source: RMSNorm: arXiv:1910.07467.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8train.kernels.launch import Rest, launch
from fp8train.kernels.tile_launch import check_matrix

ROWS, COLS = 4, 1024  # 32 numbers a thread
NUM_WARPS = 4


@triton.jit
def _rstd_kernel(
    x_ptr,  # [M, K] bf16 or fp32
    branch_ptr,  # [M, K] bf16 or fp32, or None: x is the total
    total_ptr,  # [M, K] in the dtype of x, or None
    rstd_ptr,  # [M] fp32
    M, K, stride_xm, stride_bm, stride_tm, eps,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows = first + tl.arange(0, ROWS)[:, None, None]
    # in fours, whatever the dtype: a thread that read 8 of BF16 and 4 of FP32 would pass them on through shared memory
    cols = 4 * tl.arange(0, COLS // 4)[None, :, None] + tl.arange(0, 4)[None, None, :]
    squares = tl.zeros([ROWS, COLS // 4, 4], tl.float32)
    for start in range(0, K, COLS):
        inside = (rows < M) & (cols < K - start)
        x = tl.load(x_ptr + rows * stride_xm + start + cols, mask=inside, other=0.0)
        if branch_ptr is not None:
            branch = tl.load(branch_ptr + rows * stride_bm + start + cols, mask=inside, other=0.0)
            x = (x.to(tl.float32) + branch.to(tl.float32)).to(x.dtype)
            tl.store(total_ptr + rows * stride_tm + start + cols, x, mask=inside)
        wide = x.to(tl.float32)
        squares = tl.fma(wide, wide, squares)
    mean = tl.div_rn(tl.sum(tl.sum(squares, axis=2), axis=1), tl.cast(K, tl.float32))
    index = first + tl.arange(0, ROWS)
    tl.store(rstd_ptr + index, tl.div_rn(1.0, tl.sqrt_rn(mean + eps)), mask=index < M)


def _compile_cases() -> list[tuple]:
    """What tests compile: x alone, a branch of either dtype, rows that begin anywhere."""
    sizes = dict.fromkeys(("M", "K", "stride_xm", "stride_bm", "stride_tm"), "i32") | {"eps": "fp32"}
    tile, options = {"ROWS": ROWS, "COLS": COLS}, {"num_warps": NUM_WARPS, "odd": ("eps",)}
    cases = []
    for x in ("bf16", "fp32"):
        signature = {"x_ptr": f"*{x}", "rstd_ptr": "*fp32"} | sizes
        cases.append((f"rmsnorm_rstd {x}", _rstd_kernel, signature, tile, options))
        if x == "bf16":  # a size of 1 is a constant of the kernel
            one = {name: kind for name, kind in signature.items() if name != "K"}
            cases.append(("rmsnorm_rstd bf16 one column", _rstd_kernel, one, tile | {"K": 1}, options))
        for branch in ("bf16", "fp32"):
            pair = signature | {"branch_ptr": f"*{branch}", "total_ptr": f"*{x}"}
            cases.append((f"rmsnorm_rstd {x} + {branch}", _rstd_kernel, pair, tile, options))
    title, kernel, signature, constants, options = cases[-2]
    ragged = options | {"odd": tuple(sizes)}
    cases.append((f"{title} ragged", kernel, signature, constants, ragged))
    return cases


# (name, kernel, signature, constexprs, options); pointers and integers are multiples of 16 but those in options["odd"]
COMPILE_CASES = _compile_cases()


def rstd(x: Tensor, *, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) of each row.

    Args:
        x: [M, K] bf16 or fp32, row-major with any leading stride, on a GPU; any M, K >= 0.
        eps: added to the mean square.

    Returns:
        [M] fp32; NaN where rows have no numbers.

    Raises:
        ValueError: x does not fit.
    """
    check_matrix("rstd", "x", x)
    return _launch(x, None, None, eps)


def add_rstd(x: Tensor, branch: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """(x + branch [M, K] in the dtype of x, contiguous; its rstd [M] fp32), from one read of both.

    Args:
        x: as for rstd.
        branch: [M, K] bf16 or fp32, likewise.
        eps: added to the mean square.

    Raises:
        ValueError: x or branch does not fit.
    """
    check_matrix("add_rstd", "x", x)
    check_matrix("add_rstd", "branch", branch)
    if branch.shape != x.shape:
        got, wanted = list(branch.shape), list(x.shape)
        raise ValueError(f"add_rstd: branch is {got}; needs {wanted}, the shape of x. Reshape one of them.")
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return total, _launch(x, branch, total, eps)


def _launch(x: Tensor, branch: Tensor | None, total: Tensor | None, eps: float) -> Tensor:
    M, K = x.shape
    made = torch.empty(M, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return made.fill_(float("nan"))  # the mean of no numbers

    def rest() -> Rest:
        strides = [0 if tensor is None else tensor.stride(0) for tensor in (x, branch, total)]
        return (triton.cdiv(M, ROWS),), (M, K, *strides, eps), {"ROWS": ROWS, "COLS": COLS}, {"num_warps": NUM_WARPS}

    launch(_rstd_kernel, (eps,), (x, branch, total, made), rest)
    return made
