"""Statistics of one operand: how well its FP8 codes hold its numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fp8train.backends import get_backend
from fp8train.quant.formats import Format, QuantSpec
from fp8train.quant.qtensor import QTensor
from fp8train.quant.reference import dequantize, encode, expand_scale, to_blocks
from fp8train.quant.scaling import amax_bits, scale_inv_from_amax

STATS = (
    "amax",  # largest magnitude
    "scale_inv_min",  # of the blocks that are not all zero
    "scale_inv_max",
    "underflow_frac",  # share of elements that are not zero and whose code is; a negative zero is zero
    "saturated_frac",  # share of elements beyond the largest code by more than rounding
    "nonfinite",  # number of NaN and Inf
    "sqnr_db",  # 10 log10(sum x^2 / sum error^2)
    "row_error_p99",  # |error| / |x| of a row (token, output channel) in the 2-norm: 99th percentile of the rows
    "row_error_max",
    "kurtosis",  # fourth moment about the mean over variance squared: 3 for a normal distribution
)


def operand_statistics(
    x: Tensor, spec: QuantSpec, *, rows: int | None = None, backend: str = "reference", scale_inv: Tensor | None = None
) -> Tensor:
    """The numbers named by STATS for x rounded to `spec`; NaN where one is not defined. Waits for no device.

    Blocks that hold a NaN or Inf enter none of them but amax and nonfinite. Where the backend's quantiser counts, its
    counts of what is flushed, saturated or not finite are taken, which are of all rows.

    Args:
        x: [M, K] bf16 or fp32.
        spec: as the GEMM reads it, blocks along K.
        rows: at most so many rows are rounded, evenly spread, those that share a block together; None takes all.
        backend: whose quantiser rounds; all give the same codes.
        scale_inv: [ceil(rows/r), ceil(K/c)] fp32, scales to round with in place of those of the blocks.

    Returns:
        Tensor: [len(STATS)] fp64, on x's device.
    """
    x = x.detach()
    if x.numel() == 0:
        return torch.full((len(STATS),), math.nan, dtype=torch.float64, device=x.device)
    bits = amax_bits(torch.stack(torch.aminmax(x)).float(), dim=0)
    part = _spread(x, spec, rows).contiguous()
    if scale_inv is None and spec.block == "tensor":
        scale_inv = scale_inv_from_amax(bits, spec.format, spec.scale).reshape(1, 1)
    executor = get_backend(backend)
    q = executor.quantize(part, spec, False) if scale_inv is None else _rounded(part, spec, scale_inv)
    values = [bits.view(torch.float32).double(), *_of_codes(part.float(), q, (~x.isfinite()).sum())]
    counted = executor.counters(x, spec) if scale_inv is None else None
    if counted is not None:
        _, flushed, saturated, nonfinite, elements = counted.double()
        counts = {"underflow_frac": flushed / elements, "saturated_frac": saturated / elements, "nonfinite": nonfinite}
        for name, value in counts.items():
            values[STATS.index(name)] = value
    return torch.stack(values)


def _of_codes(x: Tensor, q: QTensor, nonfinite: Tensor) -> list[Tensor]:
    """All statistics but amax, of x [m, K] fp32 and its codes."""
    scale = expand_scale(q)
    decoded = dequantize(q)
    good = decoded.isfinite()
    zero = torch.zeros((), device=x.device)
    x, decoded = torch.where(good, x, zero), torch.where(good, decoded, zero)
    error = x - decoded
    limit, half = q.spec.format.max, _half_top_step(q.spec.format)
    saturated = (decoded.abs() == limit * scale) & (error.abs() > half * scale)
    row_norm, row_error = (torch.linalg.vector_norm(t, dim=-1, dtype=torch.float64) for t in (x, error))
    relative = torch.where(row_norm > 0, row_error / row_norm, torch.zeros_like(row_norm)).sort().values
    p99 = relative[math.ceil(0.99 * relative.numel()) - 1]
    blocks = to_blocks(decoded, q.spec)[0].abs().amax(dim=(-3, -1))
    # a block of zeros has scale 1 whatever its neighbours have, one with a NaN has none
    used = (blocks > 0) & q.scale_inv.isfinite()
    power, noise = row_norm.square().sum(), row_error.square().sum()
    undefined = torch.where(good.any(), 0.0, math.nan)  # where no block is finite, no share and no error is defined
    values = [
        torch.where(used, q.scale_inv, math.inf).amin(),
        torch.where(used, q.scale_inv, -math.inf).amax(),
        ((decoded == 0) & (x != 0)).double().mean() + undefined,
        saturated.double().mean() + undefined,
        nonfinite,
        torch.where(noise > 0, 10 * (power / noise).log10(), math.nan),
        p99 + undefined,
        relative[-1] + undefined,
        _kurtosis(x, good),
    ]
    return [value.double() for value in values]


def _kurtosis(x: Tensor, good: Tensor) -> Tensor:
    count = good.sum()
    centred = torch.where(good, x - x.sum(dtype=torch.float64) / count, 0.0)
    square = (centred / centred.abs().amax()).square()  # fourth powers of gradients would underflow
    return count * square.square().sum() / square.sum().square()


def _spread(x: Tensor, spec: QuantSpec, rows: int | None) -> Tensor:
    """At most `rows` rows of x, evenly spread, whole blocks of them; at least one block."""
    block = 1 if spec.block == "tensor" else spec.block_shape(*x.shape)[0]
    groups = -(-x.shape[0] // block)
    wanted = groups if rows is None else max(rows // block, 1)
    if wanted >= groups:
        return x
    starts = [number * groups // wanted * block for number in range(wanted)]
    if block == 1:
        return x[torch.tensor(starts, device=x.device)]
    return torch.cat([x[start : start + block] for start in starts])


def _rounded(x: Tensor, spec: QuantSpec, scale_inv: Tensor) -> QTensor:
    """x as codes with given scales."""
    encode_scale = torch.ones_like(scale_inv) / scale_inv
    expanded = expand_scale(QTensor(x, encode_scale, spec))
    codes = encode(x.float() * expanded, spec)
    codes = torch.where(expanded.isnan(), torch.full_like(codes, spec.format.nan_code), codes)
    return QTensor(codes.view(spec.format.dtype), scale_inv, spec)


def _half_top_step(fmt: Format) -> float:
    """Half of the distance between the two largest numbers of a format: 16 for E4M3, 4096 for E5M2."""
    return 2.0 ** (math.floor(math.log2(fmt.max)) - fmt.mantissa_bits - 1)


def as_numbers(values: Tensor) -> list[float | None]:
    """Statistics as plain numbers of four digits; None for those that are not defined or not finite."""
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values.tolist()]
