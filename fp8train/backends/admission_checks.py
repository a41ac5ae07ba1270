"""What a kernel must get right on a GPU before it may be used there; products and codes: the two modules beside it.

Run by admission.py in a process of its own, since a kernel that a toolchain compiles wrongly may crash or never end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fp8train.backends.code_checks import (
    MATRICES,
    PLAIN,
    check_codes,
    dtype_text,
    forms_of,
    uneven_matrix,
    variant_in_form,
)
from fp8train.backends.kernel_codes import DTYPES, kernel
from fp8train.backends.producer_checks import EPS, norm_input, rstd_is_off, wrong_norm_gradient
from fp8train.backends.producers import rotated
from fp8train.backends.product_checks import check_entry, entry_for, pairs_of
from fp8train.quant.formats import LinearPrecision

KERNEL_GEMMS = ("gemm", "gemm_wgrad")
# (operation, variant) of the quantisers that every model may use; each has a plain way that takes its place where it is
# refused. The fused ones are compiled for seconds, so each dtype is a variant: here those of a BF16 model, whose norms
# read an FP32 stream; OTHER_DTYPES are checked when they are wanted.
QUANTISERS = (
    ("quantize", "rows"), ("quantize", "columns"), ("quantize", "dual"), ("quantize_weight", "one_read"),
    ("quantize_weight", "two_launches"), ("rmsnorm_quantize", "bf16"), ("rmsnorm_quantize", "fp32"),
    ("swiglu_quantize", "bf16"), ("swiglu_backward_quantize", "bf16"),
)  # fmt: skip
# Checked where the variant of that name that takes words of two numbers is refused (kernels/tile_words.py).
STANDBY = (
    ("quantize", "dual_plain"), ("rmsnorm_quantize", "bf16_plain"), ("rmsnorm_quantize", "fp32_plain"),
    ("swiglu_quantize", "bf16_plain"), ("swiglu_backward_quantize", "bf16_plain"),
)  # fmt: skip
STREAM = (("rmsnorm_rstd", "fp32"), ("rmsnorm_backward", "fp32"))  # likewise; dtype of the residual stream
ROTATIONS = (("rope", "bf16"),)  # likewise; dtype of what is rotated
TRANSPOSES = (("transpose_codes", "codes"),)  # for runs with weight_copies=one
_ONE_DTYPE = [kernel for kernel in (*QUANTISERS, *STREAM, *ROTATIONS) if kernel[1] in DTYPES]
_BOTH_DTYPES = [(operation, name) for operation, _ in _ONE_DTYPE for name in DTYPES]
OTHER_DTYPES = tuple(kernel for kernel in dict.fromkeys(_BOTH_DTYPES) if kernel not in _ONE_DTYPE)
SUMS = (*MATRICES, (300, 2048))  # and several rounds of rmsnorm_rstd
NORMS = (*SUMS, (2048, 4096), (65, 4095), (300, 8192))  # and each tile of rmsnorm_backward
WEIGHTS = (*MATRICES, (1, 129), (2048, 4096))
# B, heads, T, head_dim: heads and angles that begin at 16 bytes, and such that do not
HEADS = ((2, 32, 128, 128), (1, 8, 129, 128), (2, 16, 33, 64), (3, 5, 77, 80), (1, 3, 50, 6), (1, 1, 3, 2052))


def variants(operation: str, name: str) -> tuple[str, ...]:
    """A variant of a quantiser, and the one that stands by."""
    return (name, name + PLAIN) if (operation, name + PLAIN) in STANDBY else (name,)


def asked_of(operation: str, entry: str, precision: LinearPrecision) -> list[str]:
    """What `check` takes for the entry where linears of a precision use it."""
    if operation in KERNEL_GEMMS:
        return [entry_for(entry, *pair) for pair in pairs_of(operation, precision)]
    if (operation, entry) not in QUANTISERS:
        return []
    return [variant_in_form(operation, entry, form) for form in forms_of(operation, entry, precision)]


def check(operation: str, entry: str, device: torch.device) -> str | None:
    """What is wrong with a kernel on a device, or None.

    Args:
        operation: a file of kernels/.
        entry: of its launch entries, or a variant as in QUANTISERS, STANDBY, STREAM, ROTATIONS and TRANSPOSES; other
            formats and scales than recipes of this package ask for stand behind it.
        device: where to run it.
    """
    if operation in KERNEL_GEMMS:
        return check_entry(operation, entry, device)
    if operation in dict(STREAM):
        return (check_sums if operation == "rmsnorm_rstd" else check_norm_gradients)(entry, device)
    if operation in dict(ROTATIONS):
        return check_rotation(entry, device)
    if operation in dict(TRANSPOSES):
        return check_transposes(device)
    return check_codes(operation, entry, device)


def check_sums(variant: str, device: torch.device, matrices: Sequence[tuple[int, int]] = SUMS) -> str | None:
    """Where the residual stream's sum is not torch's, or rstd not that of its rows; or None.

    Args:
        variant: dtype of x.
        device: where to compute.
        matrices: rows and columns of x, at most 2048.
    """
    module = kernel("rmsnorm_rstd")
    for number, shape in enumerate(matrices):
        x = norm_input(shape, DTYPES[variant], device)
        for dtype in DTYPES.values():
            branch = torch.randn(*shape, generator=torch.Generator().manual_seed(number)).to(device, dtype)
            total, made = module.add_rstd(x, branch, eps=EPS)
            what = f"for {list(shape)}, branch {dtype}"
            if not _same_bits(total, (x + branch).to(x.dtype)):
                return f"its sum differs from torch's {what}"
            if rstd_is_off(made, total) or rstd_is_off(module.rstd(x, eps=EPS), x):
                return f"its rstd differs from the formula {what}"
    return None


def check_norm_gradients(variant: str, device: torch.device, matrices: Sequence[tuple[int, int]] = NORMS) -> str | None:
    """Where gradients of RMSNorm are not the formula's in FP64, or None.

    Args:
        variant: dtype of x.
        device: where to compute.
        matrices: rows and columns of x.
    """
    run = kernel("rmsnorm_backward").rmsnorm_backward
    for number, (rows, cols) in enumerate(matrices):
        for dtype in DTYPES.values():
            generator = torch.Generator().manual_seed(number)
            dy, x, dtotal = (torch.randn(rows, cols, generator=generator) for _ in range(3))
            dy, x, dtotal = dy.to(device, dtype), x.to(device, DTYPES[variant]), dtotal.to(device, DTYPES[variant])
            weight = torch.linspace(0.5, 1.5, cols, device=device)
            rstd = (x.double().square().mean(1) + EPS).rsqrt().float()
            alone = run(dy, x, weight, rstd)
            summed = run(dy, x, weight, rstd, dtotal=dtotal, branch_dtype=dtype)
            what = wrong_norm_gradient(alone, dy, x, weight, rstd) or wrong_norm_gradient(
                summed, dy, x, weight, rstd, dtotal
            )
            if what is not None:
                return f"its {what} for {[rows, cols]}, dy {dtype}"
    return None


def check_transposes(device: torch.device, matrices: Sequence[tuple[int, int]] = WEIGHTS) -> str | None:
    """Where the transpose of codes, or of their scales, is not torch's, or None.

    Args:
        device: where to compute.
        matrices: rows and columns of the codes, of which every one is a byte as good as another.
    """
    run = kernel("transpose_codes").transpose_codes
    for number, (rows, cols) in enumerate(matrices):
        generator = torch.Generator().manual_seed(number)
        codes = torch.randint(0, 256, (rows, cols + 16), dtype=torch.uint8, generator=generator).to(device)[:, :cols]
        scale_inv = torch.rand(-(-rows // 128), -(-cols // 128), generator=generator).to(device)
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            turned, scale_inv_t = run(codes.view(dtype), scale_inv)
            whole = turned.view(torch.uint8).as_strided((cols, turned.stride(0)), (turned.stride(0), 1))
            same = torch.equal(whole[:, :rows], codes.t()) and torch.equal(scale_inv_t, scale_inv.t())
            if not same or bool(whole[:, rows:].any()):
                return f"its codes or scales are not those of the transpose for {[rows, cols]} {dtype_text(dtype)}"
    return None


def check_rotation(
    variant: str, device: torch.device, shapes: Sequence[tuple[int, int, int, int]] = HEADS
) -> str | None:
    """Where the rotary embedding or its gradient differs from the definition, or None.

    Args:
        variant: dtype of x.
        device: where to compute.
        shapes: of x, [B, heads, T, head_dim].
    """
    run = kernel("rope").rope
    for number, (B, heads, T, head_dim) in enumerate(shapes):
        angles = torch.arange(T).float().outer(torch.logspace(0, -4, head_dim // 2))
        cos, sin = angles.cos(), angles.sin()
        rows = uneven_matrix(B * T, heads * head_dim, number, DTYPES[variant], torch.device("cpu"))
        rows[:, 5] = -0.0
        apart = rows.view(B, T, heads, head_dim).transpose(1, 2)  # as a projection gives them
        for x in (apart, apart.contiguous()):
            for dtype in DTYPES.values():
                for inverse in (False, True):
                    made = run(x.to(device), cos.to(device), sin.to(device), out_dtype=dtype, inverse=inverse)
                    if not _same_bits(made.cpu(), rotated(x, cos, sin, dtype, inverse)):
                        what = f"{[B, heads, T, head_dim]}, strides {x.stride()}, to {dtype}, inverse={inverse}"
                        return f"its result differs from the definition for {what}"
    return None


def _same_bits(x: Tensor, wanted: Tensor) -> bool:
    """Whether two tensors have the same bits, zeros of either sign told apart; any NaN equals any other."""
    differs = (x != wanted) | (x.signbit() != wanted.signbit())
    return not bool((differs & ~(x.isnan() & wanted.isnan())).any())
