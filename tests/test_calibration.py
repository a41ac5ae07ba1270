from __future__ import annotations

import pytest
import torch
from pytest import approx, fixture, raises

from fp8train.calibration import METRICS, Calibration, LinearSensitivity, _range, ranked
from fp8train.errors import ConfigError
from fp8train.nn.shared_inputs import group_of
from fp8train.nn.weights import evaluation_precision
from fp8train.quant.formats import BF16, BLOCKWISE, LinearPrecision
from tests.planted import PLANTED, own_text, planted_model


@fixture(scope="module")
def calibration() -> Calibration:
    model = planted_model("blockwise")
    return Calibration(model, own_text(model, windows=1, seed=1))


@fixture(scope="module")
def measured(calibration: Calibration) -> dict[str, LinearSensitivity]:
    return {row.fqn: row for row in calibration.measure()}


@pytest.mark.parametrize("metric", list(METRICS))
def test_planted_outliers_rank_first(metric: str, measured: dict[str, LinearSensitivity]):
    """As groups, by their most sensitive member: where attention is nearly uniform, little depends on q."""
    order = [row.fqn for row, _ in ranked(list(measured.values()), metric)]
    first = list(dict.fromkeys(tuple(group_of(fqn, measured)) for fqn in order))[:2]
    assert {fqn for group in first for fqn in group} == PLANTED


def test_measuring_is_deterministic_and_leaves_the_model_as_it_was(
    calibration: Calibration, measured: dict[str, LinearSensitivity]
):
    before = {fqn: linear.precision for fqn, linear in calibration.linears.items()}
    again = calibration.measure(gradients=False)
    assert before == {fqn: linear.precision for fqn, linear in calibration.linears.items()} == calibration.rules
    for row in again:
        assert row.gemms["fprop"].loss_change == approx(measured[row.fqn].gemms["fprop"].loss_change, abs=1e-12)
        assert row.range_parm == measured[row.fqn].range_parm
        assert row.gemms["dgrad"].gradient_cosine is None


def test_loss_change_is_that_of_quantising_fprop_alone(
    calibration: Calibration, measured: dict[str, LinearSensitivity]
):
    fqn = "layers.2.mlp.up_proj"
    alone = dict.fromkeys(calibration.candidates, BF16) | {fqn: LinearPrecision("x", fprop=BLOCKWISE.fprop)}
    high = calibration.loss(dict.fromkeys(calibration.candidates, BF16))
    assert measured[fqn].gemms["fprop"].loss_change == approx(calibration.loss(alone) - high, abs=1e-9)


def test_gradient_cosines_are_those_of_gradients_with_one_gemm_quantised(
    calibration: Calibration, measured: dict[str, LinearSensitivity]
):
    """wgrad's is computed on the side from its error alone; here all three come from whole backward passes."""
    fqn = "layers.3.mlp.down_proj"
    model, linear = calibration.model, calibration.linears[fqn]
    with evaluation_precision(model, BF16):
        exact = _gradient(calibration)
        for gemm in ("fprop", "dgrad", "wgrad"):
            linear.set_precision(LinearPrecision("x", **{gemm: BLOCKWISE.gemms[gemm]}))
            other = _gradient(calibration)
            linear.set_precision(BF16)
            cosine = float(torch.dot(exact, other) / (exact.norm() * other.norm()))
            # wgrad: the reference gradient is BF16's, the side computation's error is against FP32: 2^-9 apart
            assert 1 - measured[fqn].gemms[gemm].gradient_cosine == approx(1 - cosine, rel=0.05, abs=1e-9), gemm


def _gradient(calibration: Calibration) -> torch.Tensor:
    _, gradient = calibration._pass(True, {})
    return torch.cat([part.double().flatten() for part in gradient.values()])


def test_output_sqnr_of_undisturbed_linears_is_that_of_two_e4m3_operands(measured: dict[str, LinearSensitivity]):
    for row in measured.values():
        if row.fqn.startswith("layers.0."):
            for gemm in row.gemms.values():
                # 28.5 dB for N(0,1) operands (STYLE.md); heavy-tailed products lie around it
                assert 25 < gemm.sqnr_db < 40, row.fqn


def test_range_parm_is_the_ascend_tools():
    x = torch.tensor([[1.0, -4.0], [3.0, 0.0], [2.0, 2.0]])
    moved = x - torch.tensor([[4.0, -2.0]])  # channel maximum + channel minimum
    assert _range(x) == (4.0, approx(float(moved.std())))


def test_ties_are_broken_by_name():
    rows = [LinearSensitivity(fqn=name, shape=(1, 1), kurtosis=3.0) for name in ("b", "c", "a")]
    rows.append(LinearSensitivity(fqn="none", shape=(1, 1)))
    assert [row.fqn for row, _ in ranked(rows, "kurtosis")] == ["a", "b", "c", "none"]


def test_model_without_quantised_linears_is_refused():
    model = planted_model("bf16")
    with raises(ConfigError, match="none of the 29 linears is quantised"):
        Calibration(model, own_text(model, 1, 0))
