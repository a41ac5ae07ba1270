"""Numbers as text: enough digits, the right unit, no surprise at the edges."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fp8train.units import (
    bytes_text,
    count_text,
    finite,
    flops_text,
    percent_text,
    ratio_text,
    seconds_text,
    short_count_text,
    signed_text,
)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (bytes_text(1023), "1023 B"),
        (bytes_text(1024), "1.00 KiB"),
        (bytes_text(1.4e9), "1.30 GiB"),
        (short_count_text(950), "950"),
        (short_count_text(999_600), "1.00 M"),
        (short_count_text(3_468_544), "3.47 M"),
        (flops_text(2.5e13), "25.0 TFLOP"),
        (count_text(1_228_800), "1,228,800"),
        (ratio_text(0.708), "0.71x"),
        (seconds_text(8.23), "8.2 s"),
        (seconds_text(59.9), "1 min 00 s"),
        (seconds_text(192), "3 min 12 s"),
        (seconds_text(18_420), "5 h 07 min"),
        (seconds_text(187_200), "2 d 04 h"),
    ],
)
def test_unit_and_digits(text: str, wanted: str) -> None:
    assert text == wanted


@pytest.mark.parametrize(("value", "wanted"), [(0.0027, "+0.0027"), (-0.0027, "-0.0027"), (-0.00001, "0.0000")])
def test_difference_has_a_sign_unless_it_is_zero(value: float, wanted: str) -> None:
    assert signed_text(value) == wanted


@pytest.mark.parametrize("value", [None, math.nan, math.inf], ids=str)
def test_absent_number_is_a_dash(value: float | None) -> None:
    for text in (signed_text, percent_text, ratio_text, count_text, bytes_text, seconds_text):
        assert text(value) == "-"


@pytest.mark.parametrize("nothing", [None, "1", math.nan, -math.inf, np.float32("nan"), [1.0]], ids=repr)
def test_what_is_no_finite_number_is_none(nothing: object) -> None:
    assert finite(nothing) is None
    assert [finite(number) for number in (3, np.int64(-2), np.float32(0.5))] == [3.0, -2.0, 0.5]
