"""What the kernels of RMSNorm and SwiGLU must compute before they quantise it: the definition, but for a last place.

The tests of these kernels keep the same tolerances, which are derived here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8train.backends.kernel_codes import kernel
from fp8train.backends.reference import ReferenceBackend

PRODUCERS = ("rmsnorm_quantize", "swiglu_quantize", "swiglu_backward_quantize")
DEFINITION = ReferenceBackend()
EPS = 1e-5
# Rows of up to 2048 numbers: a sum of 2 rounds a lane and 10 levels of pairs, all positive: 12 of 2^-24, halved by the
# root as are those of the mean and eps; root and inverse.
RSTD_ERROR = 10 * 2.0**-24
# A BF16 number that is one place off, at most 2^-7 of it, times another and rounded, by half a place on either side.
PLACE = 2.0**-7
PLACES = 2 * PLACE + 2.0**-13


def swiglu_inputs(shape: tuple[int, int], dtype: torch.dtype, device: str | torch.device) -> list[Tensor]:
    """dh, gate and up; gate from far in silu's flat to far in its linear part, rows of different magnitude."""
    generator = torch.Generator().manual_seed(0)
    dh, gate, up = (torch.randn(*shape, generator=generator) for _ in range(3))
    magnitude = 2.0 ** torch.randint(-8, 9, (shape[0], 1), generator=generator)
    return [x.to(device, dtype) for x in (dh * magnitude, 6 * gate, up * magnitude)]


def swiglu_error(wanted: Tensor, dh: Tensor, up: Tensor) -> Tensor:
    """Largest error of h, dgate or dup in FP32.

    exp and a division of 2 ulp each on either side and three products of half an ulp; s + silu (1 - s) has a zero near
    gate = -1.28, where its terms of s leave an error of 2^-22 of dh * up * s.
    """
    return 16 * 2.0**-24 * (wanted.abs() + (dh * up).abs().clamp_min(up.abs()))


def norm_input(shape: tuple[int, int], dtype: torch.dtype, device: str | torch.device) -> Tensor:
    """Rows of magnitudes from 1e-3 to 1e3, so that rstd and eps matter."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, shape[0])[:, None]
    return x.to(device, dtype)


def rstd_is_off(made: Tensor, x: Tensor) -> bool:
    """Whether some rstd of x, of at most 2048 columns, is not within the roundings of its sum."""
    exact = (x.double().square().mean(1) + EPS).rsqrt()
    return not bool(((made.double() - exact).abs() <= RSTD_ERROR * exact).all())


def wrong_norm_gradient(
    made: tuple[Tensor, Tensor, Tensor | None],
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    dtotal: Tensor | None = None,
) -> str | None:
    """What of RMSNorm's gradients is not the formula's in FP64, or None.

    Args:
        made: dx, dweight, and dx in the dtype of the branch or None: what `rms_norm_backward` of a backend returns.
        dy, x: [M, K] bf16 or fp32, of numbers of one magnitude.
        weight, rstd: [K] and [M] fp32.
        dtotal: [M, K] in the dtype of x that was added to dx.
    """
    dx, dweight, branch = made
    exact_dweight = torch.zeros_like(weight, dtype=torch.float64)
    for start in range(0, dy.shape[0], 1024):
        rows = slice(start, start + 1024)
        wide, scale = x[rows].double(), rstd[rows, None].double()
        g = dy[rows].double() * weight
        exact = g * scale - wide * scale**3 * (g * wide).mean(1, keepdim=True)
        exact_dweight += (dy[rows].double() * wide * scale).sum(0)
        rounded = exact.abs()
        if dtotal is not None:
            exact = exact + dtotal[rows].double()
            rounded = rounded + exact.abs()
        if _is_off(dx[rows], exact, rounded):
            return "dx differs from the formula" if dtotal is None else "sum with dtotal differs from the formula"
    if _is_off(dweight, exact_dweight, exact_dweight.abs()):
        return "dweight differs from the formula"
    if branch is not None and not torch.equal(branch, dx.to(branch.dtype)):
        return "sum rounded to the branch's dtype is another"
    return None


def _is_off(made: Tensor, exact: Tensor, rounded: Tensor) -> bool:
    """Whether an error is larger than half a place of each BF16 rounding, and a few 2^-24 of FP32 sums of 4096."""
    limit = rounded * (2.0**-8 if made.dtype is torch.bfloat16 else 0) + 1e-5 * exact.abs().max()
    return not bool(((made.double() - exact).abs() <= limit).all())


def check_producer(operation: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> str | None:
    """What a fused kernel computes otherwise than the definition, its quantiser left out; or None.

    Args:
        operation: of PRODUCERS.
        shape: of a matrix that it reads.
        dtype: of what it reads.
        device: where to compute.
    """
    module = kernel(operation)
    if operation == "rmsnorm_quantize":
        x = norm_input(shape, dtype, device)
        weight, rstd = torch.linspace(0.5, 1.5, shape[1], device=device), DEFINITION.rstd(x, EPS)
        for out_dtype in dict.fromkeys((dtype, torch.bfloat16)):
            y = module.rmsnorm(x, weight, rstd, out_dtype=out_dtype)
            if not torch.equal(y, DEFINITION.rms_norm(x, weight, rstd, out_dtype)):
                return "y"
        return None
    dh, gate, up = swiglu_inputs(shape, dtype, device)
    if operation == "swiglu_quantize":
        pairs = {"h": (module.swiglu(gate, up), DEFINITION.swiglu(gate, up))}
    else:
        gradients = module.swiglu_backward(dh, gate, up), DEFINITION.swiglu_backward(dh, gate, up)
        pairs = dict(zip(("dgate", "dup"), zip(*gradients, strict=True), strict=True))
    return next((name for name, pair in pairs.items() if swiglu_is_off(name, *pair, dh, gate, up)), None)


def swiglu_is_off(name: str, mine: Tensor, theirs: Tensor, dh: Tensor, gate: Tensor, up: Tensor) -> bool:
    """Whether two results of the same arithmetic are further apart than the errors of their exponentials.

    In BF16 they are the same bits wherever every number within these errors is rounded to one and the same. How many
    are not is no question of chance: gate has few different numbers, and all its elements of one fall together.

    Args:
        name: "h", "dgate" or "dup".
        mine, theirs: the results, [M, K].
        dh, gate, up: as for swiglu_backward.
    """
    if mine.dtype is not torch.bfloat16:
        return not bool(((mine - theirs).abs() <= swiglu_error(theirs, dh, up)).all())
    x, s = gate.double(), torch.sigmoid(gate.double())
    # of s: an argument of exp that was rounded, exp, the sum and the division
    error = (1 - s) * x.abs() * 2.0**-23 + 2.0**-21
    if name == "dgate":  # (dh * up) s (1 + gate (1 - s)), the product in BF16
        factor = (dh * up).double().abs() * s
        exact = (dh * up).double() * s * (1 + x * (1 - s))
        error = factor * ((1 + x.abs() * (1 - s)) * (error + 2.0**-22) + x.abs() * (2.0**-23 + s * error))
        limit = 2 * error + PLACE * (exact.abs() + error)
    else:  # silu in BF16, and its product with up or dh
        exact, error = x * s, x.abs() * s * (error + 2.0**-24)
        limit = PLACES * theirs.double().abs()
    decided = (exact - error).to(torch.bfloat16) == (exact + error).to(torch.bfloat16)
    apart = (mine.double() - theirs.double()).abs()
    return not bool((apart <= torch.where(decided, 0.0, limit)).all())
