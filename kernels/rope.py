"""Rotary embedding: channel i of a head is rotated with channel i + head_dim / 2, in one pass over x.

first' = first * cos - second * sin; second' = second * cos + first * sin, each product and their sum rounded in FP32,
then once to the dtype of the result: no FMA, so that the bits are those of the formula written in torch. The inverse,
sin negated, is the gradient. x [B, heads, T, head_dim] bf16 or fp32, any strides but the last; cos, sin [T, head_dim/2]
fp32 -> [B, heads, T, head_dim] with memory [B, T, heads, head_dim]: flash attention reads queries and keys so, and then
gives its result and their gradients so, which the projections around it view as matrices. A program: 1024 pairs.
Source: arXiv:2104.09864, in the layout of Hugging Face's models. Time that torch takes for it: kernels/README.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8train.kernels.launch import SIZE_LIMIT, Rest, launch

PAIRS = 1024  # of a program
MOST_ROWS = 2**30  # so that their numbers are 32 bits wide: each is divided twice


@triton.jit
def _rope_kernel(
    x_ptr,  # [B, heads, T, 2 * half] bf16 or fp32
    cos_ptr, sin_ptr,  # [T, half] fp32
    out_ptr,  # [B, T, heads, 2 * half] bf16 or fp32
    rows_in_all, T, heads, half, stride_xb, stride_xh, stride_xt,
    INVERSE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(half, COLS)
    rows = (tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)  # at most MOST_ROWS + ROWS
    cols = ((tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS))[None, :]
    inside = (rows < rows_in_all)[:, None] & (cols < half)
    token, head = rows // heads, (rows % heads).to(tl.int64)
    batch, position = (token // T).to(tl.int64), (token % T).to(tl.int64)

    x_rows = x_ptr + (batch * stride_xb + head * stride_xh + position * stride_xt)[:, None]
    first = tl.load(x_rows + cols, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_rows + half + cols, mask=inside, other=0.0).to(tl.float32)
    angles = (position * half)[:, None] + cols
    cos = tl.load(cos_ptr + angles, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + angles, mask=inside, other=0.0)
    if INVERSE:  # not -sin, which Triton 3.6 makes 0 - sin: another zero
        rotated_first, rotated_second = first * cos + second * sin, second * cos - first * sin
    else:
        rotated_first, rotated_second = first * cos - second * sin, second * cos + first * sin
    out_rows = out_ptr + (rows.to(tl.int64) * (2 * half))[:, None]
    dtype = out_ptr.dtype.element_ty
    tl.store(out_rows + cols, rotated_first.to(dtype), mask=inside)
    tl.store(out_rows + half + cols, rotated_second.to(dtype), mask=inside)


def _tile(half: int) -> tuple[dict[str, int], dict[str, object]]:
    """Constants and options: 8 pairs to a thread, products and sums apart."""
    cols = min(triton.next_power_of_2(half), PAIRS)
    return {"ROWS": PAIRS // cols, "COLS": cols}, {"num_warps": 4, "enable_fp_fusion": False}


def _compile_cases() -> list[tuple]:
    """What tests compile: dtypes of x and of the result, the inverse, heads of other sizes, and sizes of any kind."""
    sizes = dict.fromkeys(("rows_in_all", "T", "heads", "half", "stride_xb", "stride_xh", "stride_xt"), "i32")
    cases = []
    for x, out, half, inverse in (
        ("bf16", "bf16", 64, False), ("bf16", "bf16", 64, True), ("fp32", "fp32", 64, False),
        ("bf16", "fp32", 64, False), ("fp32", "bf16", 64, True), ("bf16", "bf16", 32, False),
    ):  # fmt: skip
        signature = {"x_ptr": f"*{x}", "cos_ptr": "*fp32", "sin_ptr": "*fp32", "out_ptr": f"*{out}"} | sizes
        constants, options = _tile(half)
        title = f"rope {x} {out} {2 * half}{' inverse' if inverse else ''}"
        cases.append((title, _rope_kernel, signature, constants | {"INVERSE": inverse}, options))
    title, kernel, signature, constants, options = cases[0]
    cases.append((f"{title} 8 heads", kernel, signature, constants, options | {"odd": ("heads",)}))
    cases.append((f"{title} ragged", kernel, signature, constants, options | {"odd": tuple(sizes)}))
    for one in ("T", "heads", "half"):  # a size of 1 is a constant of the kernel
        rest = {name: kind for name, kind in signature.items() if name != one}
        tile = _tile(1)[0] if one == "half" else {}
        cases.append((f"{title} {one} = 1", kernel, rest, constants | tile | {one: 1}, options))
    return cases


# (name, kernel, signature, constexprs, options); pointers and integers are multiples of 16 but those in options["odd"]
COMPILE_CASES = _compile_cases()


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, out_dtype: torch.dtype, inverse: bool = False) -> Tensor:
    """x rotated by the angles of its positions.

    Args:
        x: [B, heads, T, head_dim] bf16 or fp32 on a GPU, with any strides whose last is 1; head_dim even.
        cos, sin: [T, head_dim / 2] fp32, contiguous.
        out_dtype: of the result, bf16 or fp32.
        inverse: rotate back, which is the gradient of the rotation.

    Returns:
        Tensor: [B, heads, T, head_dim] in out_dtype, a view of contiguous memory [B, T, heads, head_dim].

    Raises:
        ValueError: a shape, a stride or a dtype does not fit.
    """
    _check(x, cos, sin, out_dtype)
    B, heads, T, head_dim = x.shape
    out = torch.empty((B, T, heads, head_dim), dtype=out_dtype, device=x.device)
    if out.numel() > 0:
        rows, half = B * T * heads, head_dim // 2

        def rest() -> Rest:
            constants, options = _tile(half)
            grid = (triton.cdiv(rows, constants["ROWS"]) * triton.cdiv(half, constants["COLS"]),)
            return grid, (rows, T, heads, half, *x.stride()[:3]), constants | {"INVERSE": inverse}, options

        launch(_rope_kernel, (inverse,), (x, cos, sin, out), rest)
    return out.transpose(1, 2)


def _check(x: Tensor, cos: Tensor, sin: Tensor, out_dtype: torch.dtype) -> None:
    dtypes = (torch.bfloat16, torch.float32)
    if x.dim() != 4 or x.dtype not in dtypes or x.shape[3] % 2:
        raise ValueError(
            f"rope: x is {list(x.shape)} {x.dtype}; needs [B, heads, T, head_dim] in torch.bfloat16 or torch.float32, "
            "head_dim even. Reshape or cast it."
        )
    if x.numel() > 0 and x.stride(3) != 1:
        raise ValueError(f"rope: x has strides {x.stride()}; needs (any, any, any, 1). Pass x.contiguous().")
    B, heads, T, head_dim = x.shape
    if max(x.shape) >= SIZE_LIMIT or B * heads * T > MOST_ROWS:
        raise ValueError(
            f"rope: x is {list(x.shape)}; needs dimensions below 2^31 - 4096, and at most 2^30 rows of head_dim. "
            "Split it."
        )
    for label, table in (("cos", cos), ("sin", sin)):
        if table.shape != (T, head_dim // 2) or table.dtype is not torch.float32 or not table.is_contiguous():
            got = f"{list(table.shape)} {table.dtype}, strides {table.stride()}"
            wanted = f"{[T, head_dim // 2]} torch.float32, contiguous"
            raise ValueError(f"rope: {label} is {got}; needs {wanted}. Make the table for these positions.")
    if out_dtype not in dtypes:
        raise ValueError(f"rope: out_dtype is {out_dtype}; needs torch.bfloat16 or torch.float32. Cast the result.")
