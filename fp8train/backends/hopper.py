"""Backend `hopper`: what the FP8 tensor cores of a Hopper GPU add up, emulated on the CPU, bit for bit. For study.

An FP8 MMA of 32 products aligns them and its accumulator to the largest exponent among them, cuts each to `bits`
significant bits of that, adds, and cuts the sum to `bits` again. The exponent of a product is the sum of its operands'
(a subnormal number has that of the smallest normal one, a product with 0 has none). Every `promote` elements of K the
sum goes to an FP32 accumulator outside, where the scales of its block are applied, and starts again from 0. Codes,
scales and high-precision GEMMs are the backend `cpu`'s.

Options follow the name: `hopper:bits=14,promote=128` (the default), `hopper:promote=none`. A block that ends sooner
than `promote` promotes there too, because its scales end with it: only tensorwise and rowwise operands run unpromoted.

Source: DeepSeek-V3 (arXiv:2412.19437) 3.3.2: "around 14 bits", nearly 2 % at K = 4096, cured every 128 elements. The
rest is fitted to an H100 (2026-11-26): all of 172,032 sums over K of 16 to 256, signed, positive and of wide range,
are equal; tests/golden/h100_fp8_sums.safetensors has 49,152 of them. For operands uniform in [0, 1) sums are too small
by 7.5 % at K = 4096 and 1.5 % at K = 1024 unpromoted, 0.055 % at either with 128.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8train.backends.cpu import CpuBackend
from fp8train.errors import BackendError
from fp8train.quant import reference
from fp8train.quant.formats import Format
from fp8train.quant.qtensor import QTensor

BITS, PROMOTE = 14, 128
MMA_K = 32  # products that one FP8 instruction adds to its accumulator
LEAST_BITS, MOST_BITS = 8, 46  # below, a product of two codes is cut; above, 33 addends overflow the 53 bits of FP64
FP32_BITS = 17  # up to here, 33 addends of that many bits and one before the point are added exactly in FP32
NO_EXPONENT = -10000  # of 0: below all others
ELEMENTS = 1 << 20  # products that exist at once


class HopperBackend(CpuBackend):
    """FP8 GEMMs with limited-mantissa partial sums; all else as CpuBackend.

    Args:
        bits: significant bits that an addend keeps, counted from the largest; 24 are those of FP32.
        promote: elements of K between promotions to FP32, a multiple of 32; None: only where scales change.

    Raises:
        BackendError: bits or promote out of range.
    """

    def __init__(self, bits: int = BITS, promote: int | None = PROMOTE) -> None:
        super().__init__()
        if not LEAST_BITS <= bits <= MOST_BITS:
            raise BackendError(f"backend: hopper:bits is {bits}; needs {LEAST_BITS} to {MOST_BITS}. Hopper has 14.")
        if promote is not None and (promote < MMA_K or promote % MMA_K):
            raise BackendError(f"backend: hopper:promote is {promote}; needs a multiple of {MMA_K}, or none.")
        self.bits, self.promote = bits, promote
        interval = "none" if promote is None else str(promote)
        self.name = f"hopper:bits={bits},promote={interval}"
        when = "never promoted within a block" if promote is None else f"promoted to FP32 every {promote} of K"
        self.note = f"emulates Hopper's FP8 sums: {bits} significant bits, {when}; slow"

    def scaled_mm(
        self, a: QTensor, b: QTensor, bias: Tensor | None, out: Tensor | None, accumulate: bool, out_dtype: torch.dtype
    ) -> Tensor:
        """See Backend; here with partial sums of limited precision."""
        dtype = torch.float32 if self.bits <= FP32_BITS else torch.float64
        left, right = a.qdata.to(torch.float32).to(dtype), b.qdata.to(torch.float32).to(dtype)
        exponents = _exponents(left, a.spec.format), _exponents(right, b.spec.format)
        scale_a, scale_b = reference.expand_scale(a), reference.expand_scale(b)
        acc = torch.zeros(a.shape[0], b.shape[0])
        for start, stop in self._spans(a, b):
            part = (x[:, start:stop] for x in (left, right, *exponents))
            partial = self._partial_sum(*part).to(torch.float32)
            scale = scale_a[:, start, None] * scale_b[None, :, start]
            acc = reference.fma(partial, scale, acc)
        return reference.finish(acc, bias, out, accumulate, out_dtype)

    def _spans(self, a: QTensor, b: QTensor) -> list[tuple[int, int]]:
        """Parts of K that are added up before a promotion, in order."""
        return [
            (first, min(first + (self.promote or stop - start), stop))
            for start, stop in reference.contraction_blocks(a, b)
            for first in range(start, stop, self.promote or stop - start)
        ]

    def _partial_sum(self, left: Tensor, right: Tensor, left_exponents: Tensor, right_exponents: Tensor) -> Tensor:
        """left [M, k] @ right [N, k].T of codes, in steps of MMA_K."""
        rows = max(1, ELEMENTS // max(right.shape[0] * MMA_K, 1))
        parts = zip(left.split(rows), left_exponents.split(rows), strict=True)
        made = [self._rows(part, right, exponents, right_exponents) for part, exponents in parts]
        return torch.cat(made) if len(left) else left @ right.T

    def _rows(self, left: Tensor, right: Tensor, left_exponents: Tensor, right_exponents: Tensor) -> Tensor:
        acc = left.new_zeros(left.shape[0], right.shape[0])
        for start in range(0, left.shape[1], MMA_K):
            step = slice(start, start + MMA_K)
            products = left[:, None, step] * right[None, :, step]
            exponents = left_exponents[:, None, step] + right_exponents[None, :, step]
            quantum = self._quantum(acc, torch.maximum(exponents.amax(-1), _exponent(acc)))
            acc = (products / quantum[..., None]).trunc_().sum(-1).add_((acc / quantum).trunc_()).mul_(quantum)
            quantum = self._quantum(acc, _exponent(acc))
            acc = (acc / quantum).trunc_().mul_(quantum)
        return acc

    def _quantum(self, like: Tensor, exponent: Tensor) -> Tensor:
        """The last of `bits` bits of a number with that exponent; 1 where there is none, and NaN stays NaN."""
        last = torch.where(exponent <= NO_EXPONENT // 2, 0, exponent - (self.bits - 1))
        return torch.ldexp(torch.ones_like(like), last)


def _exponent(x: Tensor) -> Tensor:
    """floor(log2(|x|)), and NO_EXPONENT of 0."""
    return torch.where(x == 0, NO_EXPONENT, torch.frexp(x).exponent - 1)


def _exponents(codes: Tensor, fmt: Format) -> Tensor:
    """Exponents of FP8 numbers as their codes have them; NO_EXPONENT of 0."""
    return torch.where(codes == 0, NO_EXPONENT, _exponent(codes).clamp_min(1 - fmt.bias))


def hopper_backend(options: str) -> HopperBackend:
    """The backend of `hopper:OPTIONS`, such as "bits=14,promote=128"; "" takes the defaults.

    Raises:
        BackendError: an option of another name, or a value that is not a number.
    """
    values: dict[str, int | None] = {}
    for option in filter(None, options.split(",")):
        name, _, text = option.partition("=")
        none = name == "promote" and text == "none"
        if name not in ("bits", "promote") or not (none or text.isdecimal()):
            raise BackendError(
                f"backend: hopper got {option!r}; needs bits=NUMBER, promote=NUMBER or promote=none. "
                f"Write backend=hopper:bits={BITS},promote={PROMOTE}."
            )
        values[name] = None if none else int(text)
    return HopperBackend(**values)  # type: ignore[arg-type]
