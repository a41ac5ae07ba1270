"""What a GEMM must get right on a GPU before it may be used there: products against FP64, sums against torch's."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fp8train.backends.device_gemm import fp32_product, sum_of_blocks
from fp8train.backends.kernel_codes import ROW, SQUARE
from fp8train.quant.formats import FORMATS, LinearPrecision, QuantSpec
from fp8train.quant.qtensor import QTensor
from fp8train.quant.reference import finish, quantize

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
USUAL = ("e4m3", "e4m3")  # formats of both operands


def entry_for(entry: str, left: QuantSpec, right: QuantSpec) -> str:
    """What the verdict on an entry is kept under: with the formats of its operands where they are not USUAL."""
    formats = left.format.name, right.format.name
    return entry if formats == USUAL else f"{entry} {' x '.join(formats)}"


def pairs_of(operation: str, precision: LinearPrecision) -> list[tuple[QuantSpec, QuantSpec]]:
    """Operands that linears of a precision have multiplied by gemm or by gemm_wgrad."""
    blocks = ROW, SQUARE if operation == "gemm" else ROW
    pairs = [(gemm.left, gemm.right) for gemm in precision.gemms.values()]
    return [(a, b) for a, b in pairs if a is not None and b is not None and (a.block, b.block) == blocks]


def check_entry(operation: str, entry: str, device: torch.device) -> str | None:
    """What is wrong with an entry of a GEMM's CONFIGS, as `entry_for` says it, on a device; or None."""
    entry, _, said = entry.partition(" ")
    left, right = said.split(" x ") if said else USUAL
    shapes = (*SHAPES, UNALIGNED) if entry.startswith("pointer") else SHAPES
    reason = check_product(operation, entry, device, shapes, (left, right))
    return reason or check_crowd(operation, entry, device, CROWD, formats=(left, right))


def check_product(
    operation: str,
    entry: str,
    device: torch.device,
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    formats: tuple[str, str] = USUAL,
) -> str | None:
    """Multiply random and positive operands with an entry; what is wrong with the product, or None.

    Args:
        operation: gemm or gemm_wgrad.
        entry: a key of its CONFIGS.
        device: where to multiply.
        shapes: M, N, K of the products.
        formats: of the left and of the right operand.
    """
    module = importlib.import_module(f"fp8train.kernels.{operation}")
    launch, right = getattr(module, operation), "128x128" if operation == "gemm" else "1x128"
    multiple = module.GEMM.columns_multiple(entry)
    for number, (M, wanted_N, K) in enumerate(shapes):
        N = -(-wanted_N // multiple) * multiple
        for positive in (False, True):
            a = _operand(M, K, f"{formats[0]} 1x128", 2 * number, positive, device)
            b = _operand(N, K, f"{formats[1]} {right}", 2 * number + 1, positive, device)
            if reason := module.refusal(entry, a.qdata, b.qdata, b.scale_inv):
                return f"{entry} refuses operands of its table: {reason}"
            # each variant is compiled for seconds: all on whole and on ragged tiles, two on other shapes
            for arguments, plus in _variants(operation, M, N, device)[: None if number < 2 else 2]:
                y = launch(a.qdata, b.qdata, a.scale_inv, b.scale_inv, config=entry, **arguments)
                expected = a.dequantize().double() @ b.dequantize().double().T + plus.double()
                if reason := _difference(y, expected, positive):
                    return f"{reason} for M, N, K = {M}, {N}, {K}"
    return None


def check_crowd(
    operation: str,
    entry: str,
    device: torch.device,
    sizes: tuple[int, int, int] = CROWD,
    tries: int = TRIES,
    formats: tuple[str, str] = USUAL,
) -> str | None:
    """Multiply over and over where every program has several tiles; where it differs from torch's products, or None.

    Codes are integers of three bits at most, whose sums are exact in any order; scales are powers of two that differ
    from one to the next and from block to block, and blocks are added up in the same order, so that torch's sums agree
    in every bit.

    Args:
        operation, entry, device, formats: as for check_product.
        sizes: M, N, K.
        tries: products of each kind.
    """
    module, (M, N, K) = importlib.import_module(f"fp8train.kernels.{operation}"), sizes
    launch, generator = getattr(module, operation), torch.Generator(device=device).manual_seed(0)
    codes = [
        torch.randint(-8, 9, (size, K), generator=generator, dtype=torch.int8, device=device).to(FORMATS[name].dtype)
        for size, name in zip((M, N), formats, strict=True)
    ]
    scales = [
        torch.randint(-3, 4, (-(-K // 128), size), generator=generator, device=device).float().exp2().t()
        for size in (M, -(-N // 128) if operation == "gemm" else N)
    ]
    blocks = ("1x128", "128x128" if operation == "gemm" else "1x128")
    kinds = zip(formats, blocks, strict=True)
    specs = [QuantSpec.parse(f"{name} {block} fp32") for name, block in kinds]  # fp32: block by block, as kernels add
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


def _operand(rows: int, cols: int, spec: str, seed: int, positive: bool, device: torch.device) -> QTensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator) * torch.exp2(torch.randint(-8, 9, (rows, 1), generator=generator))
    q = quantize(x.abs() if positive else x, QuantSpec.parse(spec))
    return QTensor(q.qdata.to(device), q.scale_inv.t().contiguous().t().to(device), q.spec)


def _variants(operation: str, M: int, N: int, device: torch.device) -> list[tuple[dict[str, Any], Tensor]]:
    """Arguments of the launcher, and what they add to the product."""
    nothing, bias = torch.zeros((), device=device), torch.linspace(-1, 1, N, device=device)
    filled = torch.full((M, N), float("nan"), device=device)
    if operation == "gemm":
        rounded = filled.to(torch.bfloat16)
        first = [({"out": rounded}, nothing), ({"out": filled, "bias": bias}, bias)]
        return [*first, ({"out": rounded.clone(), "bias": bias}, bias), ({"out": filled.clone()}, nothing)]
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
