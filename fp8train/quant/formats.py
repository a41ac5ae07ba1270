"""Element formats, and the specifications that say which numbers a linear layer computes with."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch

ScaleKind = Literal["pow2", "fp32"]
Block = str | tuple[int, int]  # "tensor" | "row" | (rows, cols)

MAX_NOISE = 0.5  # beyond, uniform noise (at most sqrt(3) noise) could turn signs around
_BLOCK_PATTERN = re.compile(r"(\d+)x(\d+)")


@dataclass(frozen=True, slots=True)
class Format:
    """An 8-bit floating-point format. `max` is the largest finite magnitude. Source: OCP 8-bit floating point 1.0."""

    name: str
    dtype: torch.dtype
    max: float
    exponent_bits: int
    mantissa_bits: int

    @property
    def bias(self) -> int:
        """Exponent bias: 7 for E4M3, 15 for E5M2."""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def nan_code(self) -> int:
        """The byte that stands for a NaN of positive sign, the one that quantisers write."""
        return 0x7F

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or unpickled format is the format itself, so that `is` compares it."""
        return _named, (self.name,)


E4M3 = Format("e4m3", torch.float8_e4m3fn, 448.0, 4, 3)
E5M2 = Format("e5m2", torch.float8_e5m2, 57344.0, 5, 2)
FORMATS: dict[str, Format] = {"e4m3": E4M3, "e5m2": E5M2}


def _named(name: str) -> Format:
    return FORMATS[name]


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """How a matrix [M, K] is rounded: element format, the block that shares a scale, and the kind of scale.

    Args:
        format: E4M3 or E5M2.
        block: "tensor" (one scale), "row" (one per row) or (rows, cols); a last short block is a block of its own.
        scale: "pow2" (rounded up to a power of two) or "fp32".
    """

    format: Format
    block: Block
    scale: ScaleKind = "pow2"
    _text: str = field(default="", init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.block, list):
            object.__setattr__(self, "block", tuple(self.block))
        sizes = self.block if isinstance(self.block, tuple) else ()
        positive = len(sizes) == 2 and all(isinstance(size, int) and size > 0 for size in sizes)
        if self.block not in ("tensor", "row") and not positive:
            raise ValueError(f"QuantSpec: block is {self.block!r}; needs 'tensor', 'row' or two positive sizes.")
        if self.scale not in ("pow2", "fp32"):
            raise ValueError(f"QuantSpec: scale is {self.scale!r}; needs 'pow2' or 'fp32'.")
        block = self.block if isinstance(self.block, str) else f"{self.block[0]}x{self.block[1]}"
        object.__setattr__(self, "_text", f"{self.format.name} {block} {self.scale}")  # operators ask for it each call

    @staticmethod
    def parse(text: str, scale: str = "pow2") -> QuantSpec:
        """Read "FORMAT BLOCK [SCALE]", e.g. "e4m3 1x128" or "e4m3 row fp32"; `scale` is used where the text names none.

        Raises:
            ValueError: the text is not of that form; the message says which word is wrong and what it may be.
        """
        return _parse(text, scale)

    def __str__(self) -> str:
        return self._text

    def __hash__(self) -> int:
        return hash(self._text)  # which says all that is compared

    def block_shape(self, rows: int, cols: int) -> tuple[int, int]:
        """Block size for a matrix [rows, cols]; sizes are at least 1, so that an empty matrix has a block too."""
        if isinstance(self.block, str):
            return max(rows, 1) if self.block == "tensor" else 1, max(cols, 1)
        return self.block

    def scale_shape(self, rows: int, cols: int) -> tuple[int, int]:
        """Shape of scale_inv for a matrix [rows, cols]: (ceil(rows/block_rows), ceil(cols/block_cols))."""
        block_rows, block_cols = self.block_shape(rows, cols)
        return -(-rows // block_rows), -(-cols // block_cols)

    @property
    def transposable(self) -> bool:
        """Whether the codes of x.T are the transposed codes of x: true where the block is the same both ways round."""
        return self.block == "tensor" or (not isinstance(self.block, str) and self.block[0] == self.block[1])


@lru_cache(maxsize=256)
def _parse(text: str, scale: str) -> QuantSpec:
    words = str(text).split()
    if len(words) not in (2, 3):
        raise ValueError(f"operand {text!r} has {len(words)} word(s); needs 'FORMAT BLOCK [SCALE]', e.g. 'e4m3 1x128'.")
    if words[0] not in FORMATS:
        raise ValueError(f"operand {text!r} has format {words[0]!r}; needs one of {', '.join(FORMATS)}.")
    size = _BLOCK_PATTERN.fullmatch(words[1])
    if size is None and words[1] not in ("tensor", "row"):
        raise ValueError(
            f"operand {text!r} has block {words[1]!r}; needs 'tensor', 'row' or ROWSxCOLS such as '1x128'."
        )
    block: Block = words[1] if size is None else (int(size[1]), int(size[2]))
    kind = words[2] if len(words) == 3 else scale
    if kind not in ("pow2", "fp32"):
        raise ValueError(f"operand {text!r} has scale {kind!r}; needs 'pow2' or 'fp32'.")
    return QuantSpec(FORMATS[words[0]], block, kind)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class GemmPrecision:
    """Operands of one NT GEMM, left @ right.T: fprop x, w; dgrad dy, w; wgrad dy, x. None: high precision."""

    left: QuantSpec | None = None
    right: QuantSpec | None = None

    @property
    def fp8(self) -> bool:
        """Whether the GEMM itself multiplies FP8 by FP8."""
        return self.left is not None and self.right is not None


@dataclass(frozen=True, slots=True)
class LinearPrecision:
    """The numbers that a linear y[M,N] = x[M,K] w[N,K]^T computes with, GEMM by GEMM.

    Args:
        name: its name in the recipe, e.g. "fp8".
        fprop, dgrad, wgrad: operands of the three GEMMs.
        wgrad_source: "dual" makes wgrad's copy of x from the high-precision x; "requant" re-blocks the FP8 copy that
            fprop read.
        high: dtype of operands that are left out, torch.bfloat16 or torch.float32.
        noise: relative root mean square of unbiased noise on every operand that is left out; 0 for none. A placebo:
            what rounding errors of that size do to a run by chance alone.
    """

    name: str
    fprop: GemmPrecision = GemmPrecision()
    dgrad: GemmPrecision = GemmPrecision()
    wgrad: GemmPrecision = GemmPrecision()
    wgrad_source: Literal["dual", "requant"] = "dual"
    high: torch.dtype = torch.bfloat16
    noise: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.noise < MAX_NOISE:
            raise ValueError(f"precision {self.name!r}: noise is {self.noise}; needs 0 <= noise < {MAX_NOISE}.")
        if self.wgrad_source == "requant" and (self.wgrad.right is None or self.fprop.left is None):
            raise ValueError(
                f"precision {self.name!r}: wgrad source 'requant' needs x in FP8 in both fprop and wgrad. Use 'dual'."
            )

    @property
    def gemms(self) -> dict[str, GemmPrecision]:
        """The three GEMMs by name."""
        return {"fprop": self.fprop, "dgrad": self.dgrad, "wgrad": self.wgrad}

    @property
    def any_fp8(self) -> bool:
        """Whether at least one GEMM runs in FP8."""
        return any(gemm.fp8 for gemm in self.gemms.values())

    @property
    def quantized(self) -> bool:
        """Whether any operand is quantised, also where the GEMM itself stays in high precision."""
        return any(operand is not None for gemm in self.gemms.values() for operand in (gemm.left, gemm.right))

    def describe(self, gemm: str) -> str:
        """One GEMM in words: "e4m3 1x128 pow2 * e4m3 128x128 pow2", or "bf16"."""
        operands = self.gemms[gemm]
        high = "fp32" if self.high is torch.float32 else "bf16"
        if self.noise:
            high += f" with {100 * self.noise:.3g} % noise"
        if operands.left is None and operands.right is None:
            return high
        return f"{operands.left or high} * {operands.right or high}"


BF16 = LinearPrecision("bf16")
FP32 = LinearPrecision("fp32", high=torch.float32)

_ACTIVATION = QuantSpec(E4M3, (1, 128))
_WEIGHT = QuantSpec(E4M3, (128, 128))
BLOCKWISE = LinearPrecision(
    "fp8",
    fprop=GemmPrecision(_ACTIVATION, _WEIGHT),
    dgrad=GemmPrecision(_ACTIVATION, _WEIGHT),
    wgrad=GemmPrecision(_ACTIVATION, _ACTIVATION),
)
