"""Inference from a handful of runs: the run is the unit. Student's t, equivalence by two one-sided tests, power.

Windows or tokens of one run are no replicates: what differs between two runs is their trajectory, which all windows of
a run share, so that a bootstrap over windows calls chance significant (reference: Schuirmann 1987 for the tests).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Status = Literal["indicative", "equivalent", "inferior", "superior", "inconclusive"]

ALPHA = 0.05  # of each one-sided test; the interval of two of them covers 90 %
POWER = 0.8  # of the comparison that `seeds_needed` plans
MAX_SEEDS = 1000
_GRID = 2000  # points of the integral over the estimated sd: 4e-6 of the power for two runs, 1e-6 for more
_FRACTION_STEPS = 500


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A mean over runs and where it may lie.

    count: runs. mean, low, high: in the unit of the values; sd: between runs, None for one; low and high too.
    confidence: that the interval covers the true mean.
    """

    count: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None
    confidence: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Equivalence:
    """Outcome of the two one-sided tests.

    status: equivalent: the interval lies within +-margin. inferior, superior: all of it lies beyond. inconclusive: it
        reaches over an edge. indicative: one run.
    interval: of 1 - 2 alpha confidence.
    p_equivalent: the larger p of the tests "mean <= -margin" and "mean >= +margin"; None for one run.
    p_worse: of "mean <= 0" against "mean > 0", one-sided; None for one run.
    """

    status: Status
    interval: Interval
    p_equivalent: float | None
    p_worse: float | None


def t_cdf(t: float, df: float) -> float:
    """P(T <= t) of Student's t with df > 0 degrees of freedom (which may be fractional)."""
    tail = 0.5 * incomplete_beta(df / (df + t * t), 0.5 * df, 0.5)
    return tail if t < 0 else 1.0 - tail


@functools.lru_cache(maxsize=1024)
def t_quantile(p: float, df: float) -> float:
    """The t with P(T <= t) = p, 0 < p < 1, by bisection to the last bits."""
    if not 0 < p < 1:
        raise ValueError(f"t_quantile: p is {p}; needs 0 < p < 1.")
    if p < 0.5:
        return -t_quantile(1 - p, df)
    low, high = 0.0, 1.0
    while t_cdf(high, df) < p:
        low, high = high, 2 * high
    while (middle := 0.5 * (low + high)) not in (low, high):
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return high


def incomplete_beta(x: float, a: float, b: float) -> float:
    """Regularised I_x(a, b) for 0 <= x <= 1, to about 1e-14.

    Continued fraction by the modified Lentz method. Source: NIST Digital Library of Mathematical Functions, 8.17.22.
    """
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):  # where the fraction of the complement converges faster
        return 1.0 - incomplete_beta(1.0 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    c, d, value = 1.0, 0.0, 1.0
    for step in range(_FRACTION_STEPS):
        m = step // 2
        if step == 0:
            term = 1.0
        elif step % 2 == 0:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1.0 / _away_from_zero(1.0 + term * d)
        c = _away_from_zero(1.0 + term / c)
        value *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    return front * (value - 1.0)


def interval(values: Sequence[float], confidence: float = 1 - 2 * ALPHA) -> Interval:
    """Mean of values that vary between runs, with its t-interval; without one for a single run."""
    data = np.asarray(values, dtype=np.float64)
    mean = float(data.mean())
    if len(data) < 2:
        return Interval(count=len(data), mean=mean, sd=None, low=None, high=None, confidence=confidence)
    sd = float(data.std(ddof=1))
    reach = t_quantile(0.5 + 0.5 * confidence, len(data) - 1) * sd / math.sqrt(len(data))
    return Interval(count=len(data), mean=mean, sd=sd, low=mean - reach, high=mean + reach, confidence=confidence)


def ratio_interval(ratios: Sequence[float], confidence: float = 0.95) -> Interval:
    """Geometric mean of ratios, with its t-interval on the logarithms; sd is that of the logarithms."""
    logs = interval([math.log(ratio) for ratio in ratios], confidence)
    low, high = (None if edge is None else math.exp(edge) for edge in (logs.low, logs.high))
    return Interval(count=logs.count, mean=math.exp(logs.mean), sd=logs.sd, low=low, high=high, confidence=confidence)


def equivalence(gaps: Sequence[float], margin: float, alpha: float = ALPHA) -> Equivalence:
    """Two one-sided t-tests on gaps, one a run: is the mean within +-margin, beyond it, or is that open?

    Args:
        gaps: arm - baseline of each seed, larger is worse.
        margin: largest mean gap that counts as none, > 0.
        alpha: of each test; each of the three definite answers is wrong with at most this probability, where the number
            of runs was fixed before any was looked at. Adding runs until one comes out is wrong more often.

    Source: Schuirmann, J. Pharmacokinet. Biopharm. 15 (1987) 657.
    """
    found = interval(gaps, 1 - 2 * alpha)
    if found.sd is None or found.low is None or found.high is None:
        return Equivalence(status="indicative", interval=found, p_equivalent=None, p_worse=None)
    status: Status = "inconclusive"
    if -margin < found.low and found.high < margin:
        status = "equivalent"
    elif found.low > margin:
        status = "inferior"
    elif found.high < -margin:
        status = "superior"
    above, zero = (_p_above(found, edge) for edge in (-margin, 0.0))
    below = _p_above(dataclasses.replace(found, mean=-found.mean), -margin)
    return Equivalence(status=status, interval=found, p_equivalent=max(above, below), p_worse=zero)


def power(count: int, gap: float, sd: float, margin: float, alpha: float = ALPHA) -> float:
    """Probability that `equivalence` says "equivalent" (|gap| < margin), or "inferior" or "superior" (beyond it).

    Exact for normal gaps: P(status | s) integrated over the distribution of the estimated standard deviation s.

    Args:
        count: runs, >= 2.
        gap, sd: true mean and standard deviation of the gaps between runs.
    """
    df, error = count - 1, sd / math.sqrt(count)
    if error == 0:
        return 1.0 if abs(gap) != margin else 0.0
    # s/sd ~ chi(df)/sqrt(df), which lies within 8 standard deviations (1/sqrt(2 df)) of 1
    spread = 8 / math.sqrt(2 * df)
    edges = np.linspace(max(0.0, 1 - spread), 1 + spread, _GRID + 1)
    ratio = (edges[1:] + edges[:-1]) / 2  # for two runs the density is largest at 0
    log_density = (df - 1) * np.log(ratio) - 0.5 * df * ratio**2
    log_density += math.log(2) + 0.5 * df * math.log(df / 2) - math.lgamma(0.5 * df)
    reach = t_quantile(1 - alpha, df) * ratio  # half the interval, in standard errors
    edge = margin / error
    if abs(gap) < margin:
        wins = np.maximum(_normal_cdf(edge - reach - gap / error) - _normal_cdf(-edge + reach - gap / error), 0)
        wins[edge <= reach] = 0
    else:
        wins = 1 - _normal_cdf(edge + reach - abs(gap) / error)
    return float(np.clip((wins * np.exp(log_density)).sum() * (ratio[1] - ratio[0]), 0, 1))


def seeds_needed(gap: float, sd: float, margin: float, alpha: float = ALPHA, wanted: float = POWER) -> int | None:
    """Fewest runs an arm for a definite answer with probability `wanted`, if gap and sd are the true ones.

    Of a few runs sd is known badly, and so is this number: a plan, not a promise.

    None where more than MAX_SEEDS would be needed, as when the gap lies at the margin.
    """
    if power(MAX_SEEDS, gap, sd, margin, alpha) < wanted:
        return None
    low, high = 1, MAX_SEEDS  # where it is near `wanted`, power grows with the number of runs
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle, gap, sd, margin, alpha) >= wanted else (middle, high)
    return high


def _p_above(found: Interval, edge: float) -> float:
    """p of "the mean is at most `edge`" against "it is above"."""
    assert found.sd is not None
    if found.sd == 0:
        return 0.0 if found.mean > edge else 1.0
    return 1 - t_cdf((found.mean - edge) / (found.sd / math.sqrt(found.count)), found.count - 1)


def _normal_cdf(z: np.ndarray) -> np.ndarray:
    return np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in z.tolist()])


def _away_from_zero(value: float) -> float:
    return value if abs(value) > 1e-300 else 1e-300
