"""Inference across seeds: tables of Student's t, the answers of the two one-sided tests, and their error rates."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fp8train.report.run_record import Table
from fp8train.report.statistics import (
    MAX_SEEDS,
    equivalence,
    incomplete_beta,
    interval,
    power,
    ratio_interval,
    seeds_needed,
    t_cdf,
    t_quantile,
)
from fp8train.report.trajectory import heldout_gap

MARGIN = 0.25
DRAWS = 2000


@pytest.mark.parametrize(
    ("p", "df", "wanted"),
    [
        (0.95, 1, 6.313751514675043),  # tan(0.45 pi)
        (0.95, 2, 2.919985580353726),  # 0.9 sqrt(2 / (1 - 0.81))
        (0.95, 3, 2.353363434801823),
        (0.95, 4, 2.131846786326649),
        (0.975, 1, 12.706204736174696),  # tan(0.475 pi)
        (0.975, 4, 2.776445105197793),
        (0.975, 10, 2.228138851964939),
        (0.99, 30, 2.457261542400586),
        (0.999, 5, 5.893429531356044),
        (0.975, 120, 1.97993040508244),
        (0.025, 10, -2.228138851964939),
    ],
)
def test_quantiles_are_those_of_the_tables(p: float, df: float, wanted: float) -> None:
    # Abramowitz and Stegun, table 26.10, to more digits from closed forms and from Simpson's rule on the density
    assert t_quantile(p, df) == pytest.approx(wanted, rel=1e-11)
    assert t_cdf(wanted, df) == pytest.approx(p, rel=1e-12)


def test_t_with_one_and_two_degrees_has_its_closed_forms() -> None:
    for t in (-40.0, -2.0, -0.1, 0.0, 0.3, 1.0, 7.0):
        assert t_cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi, abs=1e-14)
        assert t_cdf(t, 2) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)), abs=1e-14)


def test_incomplete_beta_agrees_with_the_binomial_sum() -> None:
    for x in (0.0, 0.01, 0.3, 0.5, 0.87, 1.0):
        for a, n in ((1, 1), (3, 7), (10, 30)):
            wanted = sum(math.comb(n, j) * x**j * (1 - x) ** (n - j) for j in range(a, n + 1))
            assert incomplete_beta(x, a, n - a + 1) == pytest.approx(wanted, abs=1e-13)


@pytest.mark.parametrize("p", [0.0, 1.0, -1.0, math.nan])
def test_quantile_of_no_probability_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match="needs 0 < p < 1"):
        t_quantile(p, 3)


def test_interval_by_hand() -> None:
    found = interval([1.0, 2.0, 6.0])
    reach = 2.919985580353726 * math.sqrt(7) / math.sqrt(3)
    assert (found.mean, found.sd) == pytest.approx((3.0, math.sqrt(7)))
    assert (found.low, found.high) == pytest.approx((3 - reach, 3 + reach))
    ratios = ratio_interval([0.5, 2.0])
    assert ratios.mean == pytest.approx(1.0) and ratios.low is not None and ratios.high is not None
    assert ratios.low * ratios.high == pytest.approx(1.0), "symmetric in the logarithm"


@pytest.mark.parametrize("values", [[0.1], [5.0]], ids=["small", "large"])
def test_one_run_is_indicative_and_has_no_interval(values: list[float]) -> None:
    found = equivalence(values, MARGIN)
    assert found.status == "indicative" and found.interval.low is None and found.p_equivalent is None


@pytest.mark.parametrize(
    ("gaps", "status"),
    [
        ([0.01, -0.02, 0.03], "equivalent"),
        ([0.1, 0.1, 0.1], "equivalent"),
        ([0.5, 0.6, 0.55], "inferior"),
        ([-0.5, -0.6, -0.55], "superior"),
        ([0.3, -0.3, 0.4], "inconclusive"),
        ([0.2, 0.3, 0.25], "inconclusive"),
        ([0.1, 0.9], "inconclusive"),
    ],
)
def test_status_says_where_the_interval_lies(gaps: list[float], status: str) -> None:
    found = equivalence(gaps, MARGIN)
    assert found.status == status
    assert found.interval.low is not None and found.p_equivalent is not None
    assert (found.p_equivalent < 0.05) == (status == "equivalent"), "tests and interval say the same"


def relative_gaps(count: int, gap: float, sd: float, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Gaps in percent of simulated comparisons, [draws, count]: runs whose losses vary by 1 % between seeds, with an
    arm that is `gap` +- `sd` percent above the baseline, read back as the report reads them.
    """
    random = np.random.default_rng(seed)
    base = 2.25 * (1 + 0.01 * random.standard_normal((draws, count)))
    other = base * (1 + 0.01 * (gap + sd * random.standard_normal((draws, count))))
    gaps = 100 * (other - base) / base
    assert [_gap(b, o) for b, o in zip(base[0], other[0], strict=True)] == pytest.approx(gaps[0].tolist())
    return gaps


def _gap(base: float, other: float) -> float:
    tables = [
        Table(steps=np.array([10]), columns={"eval_loss": np.array([loss]), "bits_per_byte": np.array([loss])})
        for loss in (base, other)
    ]
    return float(heldout_gap(*tables)["percent"])


def rate(gaps: np.ndarray, status: str) -> float:
    return float(np.mean([equivalence(row, MARGIN).status == status for row in gaps.tolist()]))


@pytest.mark.parametrize("count", [2, 3, 5, 8])
@pytest.mark.parametrize(("gap", "sd"), [(MARGIN, 0.05), (-MARGIN, 0.1), (MARGIN, 0.3)], ids=["tight", "below", "wide"])
def test_gap_at_the_margin_is_rarely_called_equivalent(count: int, gap: float, sd: float) -> None:
    # 5 % plus three standard errors of 2000 draws, sqrt(0.05 * 0.95 / 2000) = 0.49 %
    gaps = relative_gaps(count, gap, sd, seed=count)
    assert rate(gaps, "equivalent") <= 0.065
    assert rate(gaps, "inferior" if gap > 0 else "superior") <= 0.065


@pytest.mark.parametrize("sd", [0.05, 0.1, 0.2, 0.35])
@pytest.mark.parametrize("gap", [0.0, 0.05], ids=["no gap", "small gap"])
def test_planned_number_of_seeds_decides_in_four_of_five_comparisons(gap: float, sd: float) -> None:
    count = seeds_needed(gap, sd, MARGIN)
    assert count is not None
    reached = rate(relative_gaps(count, gap, sd, seed=int(100 * sd)), "equivalent")
    assert reached >= 0.8
    # the plan is the least one, and its power is the measured one: three standard errors of 2000 draws at 80 %
    assert reached == pytest.approx(power(count, gap, sd, MARGIN), abs=3 * math.sqrt(0.8 * 0.2 / DRAWS))
    assert count == 2 or power(count - 1, gap, sd, MARGIN) < 0.8


def test_gap_beyond_the_margin_is_found_with_the_planned_seeds() -> None:
    count = seeds_needed(0.5, 0.2, MARGIN)
    assert count is not None and rate(relative_gaps(count, 0.5, 0.2), "inferior") >= 0.8
    assert seeds_needed(-0.5, 0.2, MARGIN) == count


def test_power_grows_with_seeds_and_a_gap_at_the_margin_is_never_decided() -> None:
    for count in (2, 3, 5):  # at the margin either answer is given with the probability of its error
        assert power(count, MARGIN, 1e-3, MARGIN) == pytest.approx(0.05, abs=1e-6)
    powers = [power(count, 0.0, 0.3, MARGIN) for count in range(2, 40)]
    assert all(low < high + 1e-9 for low, high in zip(powers, powers[1:], strict=False))
    assert seeds_needed(MARGIN, 0.1, MARGIN) is None
    assert seeds_needed(0.0, 5.0, MARGIN) is None and MAX_SEEDS == 1000
    assert power(3, 0.1, 0.0, MARGIN) == 1.0


def test_windows_are_no_replicates() -> None:
    """What a bootstrap over windows would do: 500 windows of one run that share its trajectory look significant."""
    random = np.random.default_rng(0)
    trajectory, windows = 0.2, 0.1 * random.standard_normal(500)  # percent; every window carries the run's own drift
    naive = equivalence((trajectory + windows).tolist(), MARGIN)
    assert naive.status == "equivalent" and naive.p_worse is not None and naive.p_worse < 1e-6
    assert equivalence([trajectory], MARGIN).status == "indicative"
