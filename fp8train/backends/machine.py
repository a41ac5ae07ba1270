"""What a GPU backend asks of the machine and of a precision, answered in words."""

from __future__ import annotations

import re

import torch

from fp8train.quant.formats import E5M2, GemmPrecision, LinearPrecision

FP8_CAPABILITY = (8, 9)
Pair = tuple[object, object]  # blocks of left and right operand

BLOCKWISE_PAIRS: frozenset[Pair] = frozenset({((1, 128), (128, 128)), ((1, 128), (1, 128))})
WHOLE_PAIRS: frozenset[Pair] = frozenset({("tensor", "tensor"), ("row", "row")})


def major_minor(version: str | None) -> tuple[int, int]:
    """(2, 13) of "2.13.0+cpu"; (0, 0) of nothing."""
    found = [int(number) for number in re.findall(r"\d+", version or "")[:2]]
    return (found[0], found[1]) if len(found) == 2 else (0, 0)


def no_gpu(device_type: str, capability: tuple[int, int] = FP8_CAPABILITY) -> str | None:
    """Why a model on a device of that type cannot run on an NVIDIA GPU of that compute capability here, or None."""
    if device_type not in ("cuda", "meta"):
        return f"it computes on NVIDIA GPUs, and the model is on {device_type}"
    if torch.version.hip is not None:
        return f"it computes on NVIDIA GPUs, and torch {torch.__version__} is built for ROCm"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA GPU"
    found = torch.cuda.get_device_capability()
    if found < capability:
        name, have, want = torch.cuda.get_device_name(), "".join(map(str, found)), "".join(map(str, capability))
        return f"{name} is sm_{have}; needs sm_{want} or newer"
    return None


def not_served(precision: LinearPrecision, pairs: frozenset[Pair], mixed: bool = True) -> str | None:
    """Why a backend with FP8 GEMMs for `pairs` of blocks cannot serve a precision, or None.

    Args:
        precision: of one linear.
        pairs: blocks of left and right operand that have a GEMM.
        mixed: whether two blockwise operands may each be in either format.
    """
    for name, gemm in precision.gemms.items():
        if gemm.left is None or gemm.right is None:
            continue
        if (gemm.left.block, gemm.right.block) not in pairs:
            served = ", ".join(sorted(" * ".join(map(_block_name, pair)) for pair in pairs))
            return f"it has no FP8 GEMM for {name} of {precision.name!r}, {gemm.left} * {gemm.right}; it has {served}"
        if reason := _formats_not_served(gemm, mixed):
            return f"{reason}: {name} of {precision.name!r} is {gemm.left} * {gemm.right}"
    return None


def _formats_not_served(gemm: GemmPrecision, mixed: bool) -> str | None:
    assert gemm.left is not None and gemm.right is not None
    whole = (gemm.left.block, gemm.right.block) in WHOLE_PAIRS
    if whole and gemm.left.format is E5M2 and gemm.right.format is E5M2:
        return "cuBLASLt multiplies no E5M2 by E5M2"
    if not whole and not mixed and E5M2 in (gemm.left.format, gemm.right.format):
        return "it multiplies blockwise operands in E4M3 only"
    return None


def _block_name(block: object) -> str:
    return block if isinstance(block, str) else "x".join(map(str, block))  # type: ignore[call-overload]
