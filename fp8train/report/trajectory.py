"""How two runs of one seed differ along the way: gaps of loss, their trend, tokens to the same loss, gradient norms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fp8train.report.run_record import OF_SOURCE, Table
from fp8train.spikes import count_spikes
from fp8train.units import finite

SMOOTHING = 0.9  # DeepSeek-V3 (arXiv:2412.19437) shows its losses smoothed like that; its 0.25 % refers to those
EARLY_FRACTION = 0.05
MAX_EARLY_ROWS = 20
PEAK_SHARE = 0.9  # of the largest learning rate; below it, and after it, is the decay
TARGETS = (0.5, 0.75, 0.9)  # of the baseline's tokens: where tokens-to-loss is read, beside the last common loss
SMOOTHED_SPAN = 0.35  # of ln(tokens): half a window of the curve on which tokens-to-loss is read
SMOOTHED_POINTS, SMOOTHED_ROWS = 400, 4000  # of that curve, and means of rows that it is made from
LEAST_ROWS = 8
FLAT = 0.02  # of ln(tokens): so long a stretch without a lower loss moves no ratio by more than 2 %


def ema(values: np.ndarray, decay: float = SMOOTHING) -> np.ndarray:
    """Exponential moving average: e_0 = v_0, e_t = decay e_(t-1) + (1 - decay) v_t; a NaN is passed over.

    Args:
        values: [rows] float64.

    Returns:
        [rows] float64; NaN until the first finite value.
    """
    smoothed = np.empty(len(values), dtype=np.float64)
    current = math.nan
    for index, value in enumerate(values.tolist()):
        if math.isfinite(value):
            current = decay * current + (1 - decay) * value if math.isfinite(current) else value
        smoothed[index] = current
    return smoothed


def paired(baseline: Table, other: Table, column: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps that both tables have with a finite value, and the two values there: (steps, baseline, other)."""
    steps, left, right = np.intersect1d(baseline.steps, other.steps, assume_unique=True, return_indices=True)
    base, new = baseline.columns[column][left], other.columns[column][right]
    both = np.isfinite(base) & np.isfinite(new)
    return steps[both], base[both], new[both]


def relative_loss_error(baseline: Table, other: Table) -> dict[str, Any]:
    """Relative error of the training loss, 100 (other - baseline) / baseline in percent, over the steps of both.

    Returns:
        final_percent: at the last step, unsmoothed. ema_final_percent: both losses smoothed by `ema` first.
        ema_max_percent: largest magnitude of the smoothed error over all steps, at ema_max_step. steps: how many
        steps entered.
    """
    steps, base, new = paired(baseline, other, "loss")
    if not len(steps):
        keys = ("final_percent", "ema_final_percent", "ema_max_percent", "ema_max_step")
        return dict.fromkeys(keys) | {"steps": 0}
    smooth_base = ema(base)
    smoothed = 100 * (ema(new) - smooth_base) / smooth_base
    worst = int(np.argmax(np.abs(smoothed)))
    return {
        "final_percent": finite(100 * (new[-1] - base[-1]) / base[-1]),
        "ema_final_percent": finite(smoothed[-1]),
        "ema_max_percent": finite(abs(smoothed[worst])),
        "ema_max_step": int(steps[worst]),
        "steps": len(steps),
    }


def heldout_gap(
    baseline: Table, other: Table, column: str = "eval_loss", bytes_column: str = "bits_per_byte"
) -> dict[str, Any]:
    """Gap of the held-out loss at the last step that both evaluated: nats (other - baseline), percent of the baseline,
    bits per byte. None where a loss was not finite there.
    """
    steps, left, right = np.intersect1d(baseline.steps, other.steps, assume_unique=True, return_indices=True)
    if not len(steps):
        return {"step": None, "nats": None, "percent": None, "bits_per_byte": None}
    base, new = baseline.columns[column][left[-1]], other.columns[column][right[-1]]
    bits = other.columns[bytes_column][right[-1]] - baseline.columns[bytes_column][left[-1]]
    return {
        "step": int(steps[-1]),
        "nats": finite(new - base),
        "percent": finite(100 * (new - base) / base),
        "bits_per_byte": finite(bits),
    }


def source_gaps(baseline: Table, other: Table) -> dict[str, float | None]:
    """Source of a mix -> gap of its held-out loss in percent of the baseline's, where heldout_gap looks."""
    sources = [source for source in baseline.last_of_sources() if source in other.last_of_sources()]
    return {source: heldout_gap(baseline, other, f"{OF_SOURCE[0]}{source}")["percent"] for source in sources}


def gap_slope(baseline: Table, other: Table) -> dict[str, Any]:
    """Trend of the relative training loss gap over the last half of the steps, by least squares on every step.

    Returns:
        percent_per_1000_steps; percent_over_half: by how much the fitted line rises over that half.
    """
    steps, base, new = paired(baseline, other, "loss")
    late = steps > (steps[-1] + steps[0]) / 2 if len(steps) else np.array([], dtype=bool)
    if late.sum() < 3:
        return {"percent_per_1000_steps": None, "percent_over_half": None}
    at = steps[late].astype(np.float64)
    gaps = 100 * (new[late] - base[late]) / base[late]
    centred = at - at.mean()
    slope = float((centred * gaps).sum() / (centred**2).sum())
    return {"percent_per_1000_steps": 1000 * slope, "percent_over_half": slope * float(at[-1] - at[0])}


def decay_gap(baseline: Table, other: Table) -> dict[str, Any]:
    """Mean relative training loss gap at the peak of the learning rate, and in its decay.

    The decay is what follows the last step at PEAK_SHARE of the largest learning rate; what precedes the first one is
    warm-up and left out. NVFP4 (arXiv:2509.25149) reports its gap to widen in the decay.

    Returns:
        before_percent, inside_percent, change_percent (inside - before), from_step: None without a decay.
    """
    steps, base, new = paired(baseline, other, "loss")
    nothing = dict.fromkeys(("before_percent", "inside_percent", "change_percent", "from_step"))
    rates = baseline.columns["lr"][np.isin(baseline.steps, steps, assume_unique=True)]
    if not len(steps) or not np.isfinite(rates).any():
        return nothing
    high = np.flatnonzero(rates >= PEAK_SHARE * np.nanmax(rates))
    gaps = 100 * (new - base) / base
    before, inside = gaps[high[0] : high[-1] + 1], gaps[high[-1] + 1 :]
    if not len(inside):
        return nothing
    means = {"before_percent": float(before.mean()), "inside_percent": float(inside.mean())}
    change = means["inside_percent"] - means["before_percent"]
    return {**means, "change_percent": change, "from_step": int(steps[high[-1] + 1])}


def tokens_to_loss(baseline: Table, other: Table) -> dict[str, Any]:
    """How many times the baseline's tokens the other run needs to get to the same training loss.

    The baseline's curve is smoothed by local lines over ln(tokens), the other's is that curve plus the smoothed paired
    gap, so that the noise of the batches, which both share, does not decide where a loss is reached. `common` is read
    at the lowest loss that both reach, so that a run which ends above the baseline is charged for it as much as one
    that ends below is credited.

    A loss is not read where a curve stands still, or rises and comes back: within the gap of the two it is reached at
    the beginning as well as at the end of that stretch, if that is longer than FLAT.

    Returns:
        targets: [{share of the baseline's tokens, loss, ratio (None where the other run never got there, or at a
        stretch as above)}]; common: the same at the last common loss; ratio None without a finite curve.
    """
    steps, base, new = paired(baseline, other, "loss")
    tokens = baseline.columns["tokens_seen"][np.isin(baseline.steps, steps, assume_unique=True)]
    keep = np.isfinite(tokens) & (tokens > 0) & (np.arange(len(tokens)) >= early_rows(len(tokens)))
    if keep.sum() < LEAST_ROWS:
        return {"targets": [], "common": {"loss": None, "ratio": None}}
    at, curve, gap = _smoothed(np.log(tokens[keep]), base[keep], (new - base)[keep])
    grid = np.exp(at)
    base_loss, new_loss = np.minimum.accumulate(curve), np.minimum.accumulate(curve + gap)

    def ratio(loss: float) -> float | None:
        reach = float(np.abs(gap)[np.argmin(np.abs(curve - loss))])
        stands = any(_stands_still(loss, reach, at, lowest) for lowest in (base_loss, new_loss))
        return None if stands else _tokens_ratio(loss, grid, base_loss, new_loss)

    targets = []
    for share in TARGETS:
        loss = float(np.interp(share * grid[-1], grid, base_loss))
        targets.append({"share": share, "loss": loss, "ratio": ratio(loss)})
    common = max(float(base_loss[-1]), float(new_loss[-1]))
    return {"targets": targets, "common": {"loss": common, "ratio": ratio(common)}}


def _stands_still(loss: float, reach: float, at: np.ndarray, lowest: np.ndarray) -> bool:
    """Whether a running minimum over `at` has a stretch longer than FLAT within `reach` of a loss."""
    ends = np.flatnonzero(np.append(np.diff(lowest) != 0, True))
    begins = np.append(0, ends[:-1] + 1)
    flat = at[ends] - at[begins] > FLAT
    return bool((flat & (np.abs(lowest[begins] - loss) <= reach)).any())


def _smoothed(at: np.ndarray, *values: np.ndarray) -> list[np.ndarray]:
    """Local lines through values over `at` (ascending): [points, values there, ...]; tricube weights."""
    pieces = min(len(at), SMOOTHED_ROWS)
    columns = [np.array([part.mean() for part in np.array_split(column, pieces)]) for column in (at, *values)]
    x, *ys = columns
    points = np.linspace(x[0], at[-1], SMOOTHED_POINTS)
    # a window narrower than its rows are apart would hold none of them
    width = np.maximum(SMOOTHED_SPAN, np.interp(points, x, np.gradient(x)) * LEAST_ROWS)
    distance = x[None, :] - points[:, None]
    weights = np.clip(1 - np.abs(distance / width[:, None]) ** 3, 0, None) ** 3
    total, first, second = (np.sum(weights * distance**power, axis=1) for power in (0, 1, 2))
    bend = total * second - first**2
    fits = [((weights @ y) * second - (weights * distance) @ y * first) / bend for y in ys]
    return [points, *fits]


def _tokens_ratio(loss: float, tokens: np.ndarray, base: np.ndarray, other: np.ndarray) -> float | None:
    first, second = _tokens_at(loss, tokens, base), _tokens_at(loss, tokens, other)
    return None if first is None or second is None else second / first


def _tokens_at(loss: float, tokens: np.ndarray, lowest: np.ndarray) -> float | None:
    """Tokens at which a falling curve first is at `loss`; None where it stays above."""
    index = int(np.argmax(lowest <= loss))
    if lowest[index] > loss:
        return None
    if index == 0:
        return float(tokens[0])
    high, low = lowest[index - 1], lowest[index]
    return float(tokens[index - 1] + (high - loss) / (high - low) * (tokens[index] - tokens[index - 1]))


def grad_norm_ratio(baseline: Table, other: Table) -> float | None:
    """Median over the steps, without the early_rows, of the ratio of the gradient norms before clipping."""
    _, base, new = paired(baseline, other, "grad_norm")
    skip = early_rows(len(base))
    ratios = new[skip:][base[skip:] > 0] / base[skip:][base[skip:] > 0]
    return finite(np.median(ratios)) if len(ratios) else None


def spikes(table: Table) -> int:
    """Spikes among the logged steps, as fp8train/spikes.py says. A loss that is not finite is none: it is counted by
    itself.
    """
    loss = table.columns["loss"]
    return count_spikes(loss[np.isfinite(loss)].tolist())


def early_rows(count: int) -> int:
    """Rows at the start that no norm or curve is taken from: a twentieth, at least one and at most MAX_EARLY_ROWS."""
    return min(MAX_EARLY_ROWS, max(1, math.ceil(EARLY_FRACTION * count))) if count > 3 else 0
