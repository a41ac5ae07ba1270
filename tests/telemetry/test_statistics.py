from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fp8train.quant.formats import E4M3, E5M2, QuantSpec
from fp8train.quant.reference import quantize
from fp8train.telemetry.statistics import STATS, as_numbers, operand_statistics
from tests.kernels.products import DEVICE

SPECS = [
    "e4m3 1x128 pow2",
    "e4m3 1x128 fp32",
    "e4m3 128x128 pow2",
    "e5m2 1x128 pow2",
    "e4m3 row pow2",
    "e4m3 tensor fp32",
]


def stats(x: torch.Tensor, spec: str, **options: object) -> dict[str, float]:
    values = operand_statistics(x, QuantSpec.parse(spec), **options)  # type: ignore[arg-type]
    return dict(zip(STATS, values.tolist(), strict=True))


def heavy_tailed(rows: int = 300, cols: int = 200) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(rows, cols, generator=generator)
    x[:, 3] *= 1e4  # an outlier channel flushes its neighbours
    x[5] = 0.0
    x[6, :10] = -0.0
    return x


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("text", SPECS)
def test_statistics_are_those_of_a_computation_in_numpy(text: str, backend: str):
    x = heavy_tailed()
    found = stats(x, text, backend=backend)
    q = quantize(x, QuantSpec.parse(text))
    wide, decoded = x.numpy().astype(np.float64), q.dequantize().numpy().astype(np.float64)
    error, scales = wide - decoded, q.scale_inv.numpy()
    sums = np.add.reduceat(np.abs(wide), np.arange(0, wide.shape[1], 128), axis=1)
    live = scales[sums != 0] if sums.shape == scales.shape else scales[scales != 1]  # blocks that are not all zero
    rows = np.linalg.norm(wide, axis=1)
    relative = np.sort(np.divide(np.linalg.norm(error, axis=1), rows, out=np.zeros_like(rows), where=rows > 0))
    centred = wide - wide.mean()
    expected = {
        "amax": np.abs(wide).max(),
        "scale_inv_max": live.max(),
        "scale_inv_min": live.min(),
        "underflow_frac": ((decoded == 0) & (wide != 0)).mean(),
        "saturated_frac": 0.0,
        "nonfinite": 0.0,
        "sqnr_db": 10 * math.log10((wide**2).sum() / (error**2).sum()),
        "row_error_p99": relative[math.ceil(0.99 * len(relative)) - 1],
        "row_error_max": relative[-1],
        "kurtosis": (centred**4).mean() / (centred**2).mean() ** 2,
    }
    assert found["underflow_frac"] > 0 or "e5m2" in text  # the outlier did flush something, but for E5M2's wider range
    for name, value in expected.items():
        # sums of squares in FP32 where numpy has FP64: relative error below 60,000 * 2^-24, in dB 4.3 times that
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-12), name


def test_negative_zero_is_no_underflow():
    x = torch.ones(4, 128)
    x[:, :64] = -0.0
    assert stats(x, "e4m3 1x128")["underflow_frac"] == 0.0
    x[0, 0] = 1e-9
    assert stats(x, "e4m3 1x128")["underflow_frac"] == 1 / 512


@pytest.mark.parametrize(("fmt", "limit"), [(E4M3, 464.0), (E5M2, 61440.0)], ids=["e4m3", "e5m2"])
def test_saturated_is_what_rounding_would_take_beyond_the_largest_code(fmt, limit: float):
    x = torch.zeros(1, 128)
    x[0, :3] = torch.tensor([limit, -math.nextafter(limit, math.inf) * 1.001, fmt.max])
    given = operand_statistics(x, QuantSpec(fmt, (1, 128)), scale_inv=torch.ones(1, 1))
    assert given[STATS.index("saturated_frac")] == 1 / 128  # exactly half a step beyond still rounds to the largest


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_values_are_counted_and_leave_other_blocks_alone(bad: float):
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    clean = stats(x[1:], "e4m3 1x128")
    x[0] = bad
    found = stats(x, "e4m3 1x128")
    assert found["nonfinite"] == 256
    assert not math.isfinite(found["amax"])
    for name in ("sqnr_db", "scale_inv_max", "scale_inv_min", "row_error_max", "kurtosis"):
        assert found[name] == pytest.approx(clean[name], rel=1e-6), name
    assert as_numbers(operand_statistics(x, QuantSpec(E4M3, (1, 128))))[0] is None  # strict JSON has no infinity


def test_tiny_gradients_have_the_statistics_of_large_ones():
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    small, large = stats(x * 2.0**-80, "e4m3 1x128"), stats(x, "e4m3 1x128")
    for name in ("sqnr_db", "kurtosis", "underflow_frac", "row_error_p99"):
        assert small[name] == pytest.approx(large[name], rel=1e-6), name


@pytest.mark.parametrize("text", SPECS)
def test_rows_measures_some_rows_but_amax_of_all(text: str):
    x = torch.randn(1024, 256, generator=torch.Generator().manual_seed(2))
    x[1023, 7] = 50.0
    part, whole = stats(x, text, rows=256), stats(x, text)
    assert part["amax"] == whole["amax"] == 50.0
    # SQNR of a quarter of normal rows: its standard deviation is far below 0.2 dB
    assert part["sqnr_db"] == pytest.approx(whole["sqnr_db"], abs=0.3)


def test_empty_operand_has_no_statistics():
    assert as_numbers(operand_statistics(torch.empty(0, 128), QuantSpec(E4M3, (1, 128)))) == [None] * len(STATS)


def test_all_zero_operand_has_no_sqnr_and_no_error():
    found = as_numbers(operand_statistics(torch.zeros(3, 128), QuantSpec(E4M3, (1, 128))))
    assert dict(zip(STATS, found, strict=True))["sqnr_db"] is None
    assert dict(zip(STATS, found, strict=True))["row_error_max"] == 0.0


@pytest.mark.parametrize("text", ["e4m3 1x128 pow2", "e4m3 1x128 fp32", "e4m3 128x128 pow2"])
def test_counters_of_the_kernels_are_the_numbers_of_the_definition_for_all_rows(text: str):
    pytest.importorskip("triton", reason="needs Triton: pip install fp8train[triton]")
    x = heavy_tailed()
    expected = stats(x, text)
    assert stats(x.to(DEVICE), text, backend="triton") == pytest.approx(expected, rel=1e-6)  # sums in another order
    # the outlier channel flushes only in the upper half: a sample of rows would not give the share of all
    x[150:, 3] = 1.0
    few, every = stats(x.to(DEVICE), text, backend="triton", rows=128), stats(x, text)
    counted = ("underflow_frac", "saturated_frac", "nonfinite")
    assert [few[name] for name in counted] == [every[name] for name in counted]
    assert stats(x, text, rows=128)["underflow_frac"] != every["underflow_frac"] > 0


def test_counters_say_how_many_are_not_finite():
    pytest.importorskip("triton", reason="needs Triton: pip install fp8train[triton]")
    x = heavy_tailed()
    x[3, 7], x[200, 9] = math.nan, math.inf
    assert stats(x.to(DEVICE), SPECS[0], backend="triton")["nonfinite"] == 2
