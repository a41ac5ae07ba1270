"""What a kernel must get right on a GPU before it may be used there: products against FP64, codes bit for bit.

Run by admission.py in a process of its own, since a kernel that a toolchain compiles wrongly may crash or never end.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fp8train.backends.device_gemm import fp32_product, sum_of_blocks
from fp8train.backends.producer_checks import (
    EPS,
    PRODUCERS,
    check_producer,
    norm_input,
    rstd_is_off,
    wrong_norm_gradient,
)
from fp8train.backends.producers import rotated, row_rstd
from fp8train.quant.formats import QuantSpec
from fp8train.quant.qtensor import QTensor
from fp8train.quant.reference import finish, quantize

KERNEL_GEMMS = ("gemm", "gemm_wgrad")
SHAPES = ((128, 128, 128), (300, 200, 272), (1, 512, 1040), (513, 129, 64), (2048, 1536, 1024), (384, 256, 16384))
UNALIGNED = (77, 131, 303)  # no rows that start at 16 bytes: for entries that load by pointers
# Several tiles to a program: entries that gave slots back too early were right in SHAPES, and wrong in a few columns of
# every product of this size that added to its result (H200, 2026-11-26).
CROWD = (2112, 7168, 4096)
TRIES = 3
# Hopper cuts each of 32 products and their sum so far to 14 bits of the largest. In that model (backends/hopper.py) the
# first shape's rows have a calc_diff of 9e-9 in the mean and 4.4e-8 at most; rows of positive ones, whose cuts all go
# one way, 2.3e-7 and 5.2e-7 (so has an H100), and their sums are 6e-4 too small. A wrong tile gives more than 1e-3.
FP32_CALC_DIFF = 1e-7  # mean over rows
ROW_CALC_DIFF = 1e-6  # of any row
BF16_CALC_DIFF = 5e-6  # of any row; rounding to BF16 is 1.3e-6
SIGNED_BIAS = 1e-3  # of a sum of positive products; without promotion it grows with K
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
PLAIN = "_plain"
STREAM = (("rmsnorm_rstd", "fp32"), ("rmsnorm_backward", "fp32"))  # likewise; dtype of the residual stream
ROTATIONS = (("rope", "bf16"),)  # likewise; dtype of what is rotated
TRANSPOSES = (("transpose_codes", "codes"),)  # for runs with weight_copies=one
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_ONE_DTYPE = [kernel for kernel in (*QUANTISERS, *STREAM, *ROTATIONS) if kernel[1] in DTYPES]
_BOTH_DTYPES = [(operation, name) for operation, _ in _ONE_DTYPE for name in DTYPES]
OTHER_DTYPES = tuple(kernel for kernel in dict.fromkeys(_BOTH_DTYPES) if kernel not in _ONE_DTYPE)
MATRICES = ((256, 384), (300, 200))  # whole blocks in rows that start at 16 bytes; neither
SUMS = (*MATRICES, (300, 2048))  # and several rounds of rmsnorm_rstd
NORMS = (*SUMS, (2048, 4096), (65, 4095), (300, 8192))  # and each tile of rmsnorm_backward
WEIGHTS = (*MATRICES, (1, 129), (2048, 4096))
# B, heads, T, head_dim: heads and angles that begin at 16 bytes, and such that do not
HEADS = ((2, 32, 128, 128), (1, 8, 129, 128), (2, 16, 33, 64), (3, 5, 77, 80), (1, 3, 50, 6), (1, 1, 3, 2052))


def variants(operation: str, name: str) -> tuple[str, ...]:
    """A variant of a quantiser, and the one that stands by."""
    return (name, name + PLAIN) if (operation, name + PLAIN) in STANDBY else (name,)


def check(operation: str, entry: str, device: torch.device) -> str | None:
    """What is wrong with a kernel on a device, or None.

    Args:
        operation: a file of kernels/.
        entry: of its launch entries, or a variant as in QUANTISERS, STANDBY, STREAM, ROTATIONS and TRANSPOSES.
        device: where to run it.
    """
    if operation in KERNEL_GEMMS:
        shapes = (*SHAPES, UNALIGNED) if entry.startswith("pointer") else SHAPES
        return check_product(operation, entry, device, shapes) or check_crowd(operation, entry, device)
    if operation in dict(STREAM):
        return (check_sums if operation == "rmsnorm_rstd" else check_norm_gradients)(entry, device)
    if operation in dict(ROTATIONS):
        return check_rotation(entry, device)
    if operation in dict(TRANSPOSES):
        return check_transposes(device)
    return check_codes(operation, entry, device)


def check_product(
    operation: str, entry: str, device: torch.device, shapes: Sequence[tuple[int, int, int]] = SHAPES
) -> str | None:
    """Multiply random and positive operands with an entry; what is wrong with the product, or None.

    Args:
        operation: of KERNEL_GEMMS.
        entry: a key of its CONFIGS.
        device: where to multiply.
        shapes: M, N, K of the products.
    """
    module = importlib.import_module(f"fp8train.kernels.{operation}")
    launch, right = getattr(module, operation), "128x128" if operation == "gemm" else "1x128"
    multiple = module.GEMM.columns_multiple(entry)
    for number, (M, wanted_N, K) in enumerate(shapes):
        N = -(-wanted_N // multiple) * multiple
        for positive in (False, True):
            a = _operand(M, K, "1x128", 2 * number, positive, device)
            b = _operand(N, K, right, 2 * number + 1, positive, device)
            if reason := module.refusal(entry, a.qdata, b.qdata, b.scale_inv):
                return f"{entry} refuses operands of its table: {reason}"
            for arguments, plus in _variants(operation, M, N, device):
                y = launch(a.qdata, b.qdata, a.scale_inv, b.scale_inv, config=entry, **arguments)
                expected = a.dequantize().double() @ b.dequantize().double().T + plus.double()
                if reason := _difference(y, expected, positive):
                    return f"{reason} for M, N, K = {M}, {N}, {K}"
    return None


def check_crowd(
    operation: str, entry: str, device: torch.device, sizes: tuple[int, int, int] = CROWD, tries: int = TRIES
) -> str | None:
    """Multiply over and over where every program has several tiles; where it differs from torch's products, or None.

    Codes are small integers, whose sums are exact in any order; scales are powers of two that differ from one to the
    next and from block to block, and blocks are added up in the same order, so that torch's sums agree in every bit.

    Args:
        operation, entry, device: as for check_product.
        sizes: M, N, K.
        tries: products of each kind.
    """
    module, (M, N, K) = importlib.import_module(f"fp8train.kernels.{operation}"), sizes
    launch, generator = getattr(module, operation), torch.Generator(device=device).manual_seed(0)
    codes = [
        torch.randint(-8, 9, (size, K), generator=generator, dtype=torch.int8, device=device).to(torch.float8_e4m3fn)
        for size in (M, N)
    ]
    scales = [
        torch.randint(-3, 4, (-(-K // 128), size), generator=generator, device=device).float().exp2().t()
        for size in (M, -(-N // 128) if operation == "gemm" else N)
    ]
    blocks = ("1x128", "128x128" if operation == "gemm" else "1x128")
    specs = [QuantSpec.parse(f"e4m3 {block} fp32") for block in blocks]  # fp32: block by block, as the kernels add
    a, b = (QTensor(*parts) for parts in zip(codes, scales, specs, strict=True))
    acc = sum_of_blocks(a, b, a.qdata.float(), b.qdata.float(), fp32_product)
    for number in range(len(_variants(operation, 1, 1, device))):
        into = _variants(operation, M, N, device)[number][0]
        wanted = finish(acc, into.get("bias"), into["out"], into.get("accumulate", False), into["out"].dtype)
        for _ in range(tries):
            y = launch(*codes, *scales, config=entry, **_variants(operation, M, N, device)[number][0])
            if wrong := int((y != wanted).sum()):
                return f"{wrong} of its sums differ from torch's for M, N, K = {M}, {N}, {K}"
    return None


def _operand(rows: int, cols: int, block: str, seed: int, positive: bool, device: torch.device) -> QTensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator) * torch.exp2(torch.randint(-8, 9, (rows, 1), generator=generator))
    q = quantize(x.abs() if positive else x, QuantSpec.parse(f"e4m3 {block}"))
    return QTensor(q.qdata.to(device), q.scale_inv.t().contiguous().t().to(device), q.spec)


def _variants(operation: str, M: int, N: int, device: torch.device) -> list[tuple[dict[str, Any], Tensor]]:
    """Arguments of the launcher, and what they add to the product."""
    nothing, bias = torch.zeros((), device=device), torch.linspace(-1, 1, N, device=device)
    filled = torch.full((M, N), float("nan"), device=device)
    if operation == "gemm":
        return [({"out": filled.to(torch.bfloat16)}, nothing), ({"out": filled, "bias": bias}, bias)]
    before = bias.repeat(M, 1)
    return [({"out": filled}, nothing), ({"out": before.clone(), "accumulate": True}, before)]


def _difference(y: Tensor, expected: Tensor, positive: bool) -> str | None:
    error = y.double() - expected
    energy = (y.double() ** 2 + expected**2).sum(dim=1)
    rows = (error**2).sum(dim=1) / energy  # each by itself: their magnitudes differ by up to 2^16
    limits = [(float(rows.max()), BF16_CALC_DIFF if y.dtype is torch.bfloat16 else ROW_CALC_DIFF)]
    if y.dtype is torch.float32 and not positive:
        limits.append((float(rows.mean()), FP32_CALC_DIFF))
    for diff, limit in limits:
        if not diff <= limit:  # NaN too
            return f"its product has calc_diff {diff:.1e} against FP64, above {limit:.0e}"
    bias = float(error.sum() / expected.sum()) if positive else 0.0
    if abs(bias) > SIGNED_BIAS:
        return f"its sums of positive products are off by {bias:.1e}, more than {SIGNED_BIAS:.0e}"
    return None


def check_codes(
    operation: str, variant: str, device: torch.device, matrices: Sequence[tuple[int, int]] = MATRICES
) -> str | None:
    """Quantise matrices with a kernel; which copy of which, or what it is of, differs from the definition, or None.

    Args:
        operation, variant: as in QUANTISERS and STANDBY.
        device: where to quantise.
        matrices: their rows and columns.
    """
    for number, (rows, cols) in enumerate(matrices):
        name = variant.removesuffix(PLAIN)
        for dtype in [DTYPES[name]] if name in DTYPES else DTYPES.values():
            what = f"{[rows, cols]} {_name(dtype)}"
            if operation in PRODUCERS and (part := check_producer(operation, (rows, cols), dtype, device)):
                return f"its {part} differs from the definition for {what}"
            for scale in ("pow2", "fp32"):
                inputs = [_matrix(rows, cols, 3 * number + part, dtype, device) for part in range(3)]
                for name, q, x, transposed in _copies(operation, variant, inputs, scale):
                    if not q.same_bits(quantize(x.cpu(), q.spec, transpose=transposed)):
                        return f"its {name} differs from the definition for {what} with {scale} scales"
    return None


def check_sums(variant: str, device: torch.device, matrices: Sequence[tuple[int, int]] = SUMS) -> str | None:
    """Where the residual stream's sum is not torch's, or rstd not that of its rows; or None.

    Args:
        variant: dtype of x.
        device: where to compute.
        matrices: rows and columns of x, at most 2048.
    """
    module = importlib.import_module("fp8train.kernels.rmsnorm_rstd")
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
    run = importlib.import_module("fp8train.kernels.rmsnorm_backward").rmsnorm_backward
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
    run = importlib.import_module("fp8train.kernels.transpose_codes").transpose_codes
    for number, (rows, cols) in enumerate(matrices):
        generator = torch.Generator().manual_seed(number)
        codes = torch.randint(0, 256, (rows, cols + 16), dtype=torch.uint8, generator=generator).to(device)[:, :cols]
        scale_inv = torch.rand(-(-rows // 128), -(-cols // 128), generator=generator).to(device)
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            turned, scale_inv_t = run(codes.view(dtype), scale_inv)
            whole = turned.view(torch.uint8).as_strided((cols, turned.stride(0)), (turned.stride(0), 1))
            same = torch.equal(whole[:, :rows], codes.t()) and torch.equal(scale_inv_t, scale_inv.t())
            if not same or bool(whole[:, rows:].any()):
                return f"its codes or scales are not those of the transpose for {[rows, cols]} {_name(dtype)}"
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
    run = importlib.import_module("fp8train.kernels.rope").rope
    for number, (B, heads, T, head_dim) in enumerate(shapes):
        angles = torch.arange(T).float().outer(torch.logspace(0, -4, head_dim // 2))
        cos, sin = angles.cos(), angles.sin()
        rows = _matrix(B * T, heads * head_dim, number, DTYPES[variant], torch.device("cpu"))
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


def _matrix(rows: int, cols: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Each row of its own magnitude; a block of zeros, a NaN and an Inf, which strike their blocks only."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator)
    x *= torch.exp2(torch.randint(-20, 3, (rows, 1), generator=generator).float())
    x[:, 3:5] = 0.0
    x[rows // 2, cols // 2], x[rows - 1, 0] = float("nan"), float("inf")
    return x.to(dtype).to(device)


def _copies(
    operation: str, variant: str, inputs: Sequence[Tensor], scale: str
) -> list[tuple[str, QTensor, Tensor, bool]]:
    """What a kernel makes: the copy's name, its codes, the matrix that they are of, whether they are transposed."""
    square = operation == "quantize_weight"
    spec = QuantSpec.parse(f"e4m3 {'128x128' if square else '1x128'} {scale}")
    options: dict[str, Any] = {"fp8_dtype": spec.format.dtype, "fp8_max": spec.format.max, "pow2": scale == "pow2"}
    words, variant = not variant.endswith(PLAIN), variant.removesuffix(PLAIN)
    module = importlib.import_module(f"fp8train.kernels.{operation}")
    x, gate, up = inputs

    def both(copies: Sequence[Tensor], source: Tensor, of: str = "") -> list[tuple[str, QTensor, Tensor, bool]]:
        row, column = QTensor(copies[0], copies[1], spec), QTensor(copies[2], copies[3], spec)
        return [(f"row copy{of}", row, source, False), (f"column copy{of}", column, source, True)]

    if operation == "quantize" and variant != "dual":
        run: Callable[..., tuple[Tensor, Tensor]] = getattr(module, f"quantize_{variant}")
        return [(f"copy by {variant}", QTensor(*run(x, **options), spec), x, variant == "columns")]
    if operation == "quantize":
        return both(module.quantize_dual(x, words=words, **options), x)
    if square:
        return both(module.quantize_weight(x, two_launches=variant == "two_launches", **options), x)
    if operation == "rmsnorm_quantize":
        made, weight = [], torch.linspace(0.5, 1.5, x.shape[1], device=x.device)
        for out_dtype in dict.fromkeys((x.dtype, torch.bfloat16)):
            inputs = x, weight, row_rstd(x, EPS)
            y = module.rmsnorm(*inputs, out_dtype=out_dtype)
            copies = module.rmsnorm_quantize(*inputs, out_dtype=out_dtype, words=words, **options)
            made += both(copies, y, f" of y in {_name(out_dtype)}")
        return made
    if operation == "swiglu_quantize":
        h, alone = module.swiglu(gate, up), module.swiglu_quantize(gate, up, columns=False, **options)
        copies = both(module.swiglu_quantize(gate, up, words=words, **options), h)
        return [*copies, ("row copy alone", QTensor(alone[0], alone[1], spec), h, False)]
    h_format = tuple(options.values())
    dgate, dup, h_t = module.swiglu_backward_quantize(x, gate, up, h=h_format, words=words, **options)
    sources = module.swiglu_backward(x, gate, up)
    copies = both(dgate, sources[0], " of dgate") + both(dup, sources[1], " of dup")
    return [*copies, ("column copy of h", QTensor(h_t[0], h_t[1], spec), _h(gate, up), True)]


def _h(gate: Tensor, up: Tensor) -> Tensor:
    return importlib.import_module("fp8train.kernels.swiglu_quantize").swiglu(gate, up)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
