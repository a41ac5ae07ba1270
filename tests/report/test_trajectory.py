"""What is read from two curves: trends, decay, tokens to the same loss, norms, spikes; numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fp8train.report.run_record import TRAIN_KEYS, Table
from fp8train.report.trajectory import (
    decay_gap,
    early_rows,
    gap_slope,
    grad_norm_ratio,
    spikes,
    tokens_to_loss,
)

ROWS = 400
STEPS = np.arange(1, ROWS + 1)
FALL = 2.0 + 3.0 / np.sqrt(STEPS)


def curve(loss: np.ndarray, **columns: np.ndarray) -> Table:
    steps = np.arange(1, len(loss) + 1)
    known = {key: np.ones(len(loss)) for key in TRAIN_KEYS} | {"loss": loss, "tokens_seen": 1000.0 * steps}
    return Table(steps=steps, columns=known | columns)


def test_slope_is_that_of_the_last_half() -> None:
    gap = np.where(STEPS <= 200, 5.0, 0.1 + 0.002 * (STEPS - 200))  # percent; 2 % per 1000 steps
    found = gap_slope(curve(FALL), curve(FALL * (1 + gap / 100)))
    assert found["percent_per_1000_steps"] == pytest.approx(2.0)
    assert found["percent_over_half"] == pytest.approx(0.002 * 199)
    assert gap_slope(curve(FALL[:2]), curve(FALL[:2]))["percent_per_1000_steps"] is None


def test_gap_in_the_decay_is_held_against_the_gap_before_it() -> None:
    lr = np.interp(STEPS, [1, 20, 300, 400], [0.0, 1.0, 1.0, 0.0])  # warm-up, stable, decay
    gap = np.where(STEPS < 18, 9.0, np.where(STEPS <= 310, 0.1, 0.5))
    found = decay_gap(curve(FALL, lr=lr), curve(FALL * (1 + gap / 100), lr=lr))
    assert found["from_step"] == 311, "the last step at 90 % of the peak is 310"
    assert (found["before_percent"], found["inside_percent"]) == pytest.approx((0.1, 0.5))
    assert found["change_percent"] == pytest.approx(0.4)


def test_constant_learning_rate_has_no_decay() -> None:
    assert decay_gap(curve(FALL), curve(FALL))["inside_percent"] is None


@pytest.mark.parametrize("factor", [1.25, 1.02, 0.98], ids=["slower", "little slower", "little faster"])
def test_run_that_needs_more_tokens_has_that_ratio(factor: float) -> None:
    noise = 0.01 * np.random.default_rng(0).standard_normal(ROWS)  # of the batches, which the runs share
    slow = 2.0 + 3.0 / np.sqrt(STEPS / factor)  # reaches at `factor` n what the other reaches at n
    found = tokens_to_loss(curve(FALL + noise), curve(slow + noise))
    # the gap is exact but for its smoothing; the slope by which it becomes tokens is estimated from the noisy curve, at
    # its end from about 117 rows over 0.35 of ln(tokens): error 0.01 sqrt(12/117) / 0.35 = 0.009 of 0.075, doubled
    near = abs(factor - 1) * 0.25 + 0.002
    assert found["common"]["ratio"] == pytest.approx(factor, abs=near)
    assert [target["share"] for target in found["targets"]] == [0.5, 0.75, 0.9]
    assert found["targets"][0]["ratio"] == pytest.approx(factor, abs=near)
    if factor > 1.2:
        assert found["targets"][2]["ratio"] is None, "0.9 * 1.25 is beyond its end"


def test_equal_runs_need_equal_tokens_and_a_run_without_loss_has_none() -> None:
    assert tokens_to_loss(curve(FALL), curve(FALL))["common"]["ratio"] == 1.0
    nothing = tokens_to_loss(curve(FALL), curve(np.full(ROWS, math.nan)))
    assert nothing["common"]["ratio"] is None and nothing["targets"] == []


def test_a_loss_is_not_read_where_the_curve_rises_and_comes_back() -> None:
    """A bump would make of a gap of a ten-thousandth the tokens of the whole way around it."""
    bump = FALL + 0.6 * np.exp(-(((np.log(STEPS) - np.log(150)) / 0.25) ** 2))
    assert (np.diff(bump) > 0).any()
    found = tokens_to_loss(curve(bump), curve(bump * 1.0001))
    shares = {target["share"]: target["ratio"] for target in found["targets"]}
    assert shares[0.5] is None, "before the curve is as low again as before the bump"
    assert shares[0.9] == pytest.approx(1.0, abs=0.01) == found["common"]["ratio"]
    equal = tokens_to_loss(curve(bump), curve(bump))["targets"]
    assert [target["ratio"] for target in equal] == [None, pytest.approx(1.0), pytest.approx(1.0)]


def test_norm_ratio_is_the_median_after_warm_up() -> None:
    base, other = np.full(ROWS, 2.0), np.full(ROWS, 3.0)
    other[:20] = 100.0
    assert grad_norm_ratio(curve(FALL, grad_norm=base), curve(FALL, grad_norm=other)) == 1.5


def test_spikes_are_of_finite_losses_only() -> None:
    loss = FALL.copy()
    loss[[100, 200]] = 9.0, math.nan
    assert spikes(curve(loss)) == 1


@pytest.mark.parametrize(("rows", "skipped"), [(3, 0), (4, 1), (100, 5), (10_000, 20)])
def test_early_rows_are_a_twentieth_within_limits(rows: int, skipped: int) -> None:
    assert early_rows(rows) == skipped
