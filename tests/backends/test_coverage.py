"""Counts of what ran."""

from __future__ import annotations

from fp8train.backends.coverage import GEMMS, NOT_COUNTED, CoverageCounter, GemmCount


def test_calls_and_rows_are_summed_by_site_gemm_and_precision() -> None:
    counter = CoverageCounter()
    counter.add(1, "fprop", 10, fp8=True)
    counter.add(1, "fprop", 5, fp8=True)
    counter.add(1, "fprop", 7, fp8=False)
    counter.add(2, "wgrad", 3, fp8=True)
    assert counter.snapshot() == {1: {"fprop": GemmCount(2, 1, 15, 7)}, 2: {"wgrad": GemmCount(1, 0, 3, 0)}}


def test_empty_call_is_a_call_of_no_rows() -> None:
    counter = CoverageCounter()
    counter.add(1, "dgrad", 0, fp8=True)
    assert counter.snapshot() == {1: {"dgrad": GemmCount(1, 0, 0, 0)}}


def test_gemm_of_no_linear_is_not_counted() -> None:
    counter = CoverageCounter()
    counter.add(NOT_COUNTED, "fprop", 10, fp8=True)
    assert counter.snapshot() == {}


def test_snapshot_does_not_change_with_later_counts_and_reset_forgets() -> None:
    counter = CoverageCounter()
    counter.add(1, "fprop", 1, fp8=True)
    before = counter.snapshot()
    counter.add(1, "fprop", 1, fp8=True)
    assert before[1]["fprop"].fp8_calls == 1
    counter.reset()
    assert counter.snapshot() == {}


def test_gemms_are_named_in_the_words_of_the_field() -> None:
    assert GEMMS == ("fprop", "dgrad", "wgrad")
