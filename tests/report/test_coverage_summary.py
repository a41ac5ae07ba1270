"""Coverage in few words: shares by hand, groups, exceptions first."""

from __future__ import annotations

import pytest

from fp8train.report.coverage_summary import (
    exceptions,
    gemm_shares,
    group_linears,
    layer_numbers,
    merged_coverage,
    refused_kernels,
)
from tests.run_folders import LINEARS, make_coverage

PER_LAYER = sum(N * K for N, K in LINEARS.values())
HEAD = 256 * 256
DOWN = LINEARS["mlp.down_proj"][0] * LINEARS["mlp.down_proj"][1]


def test_share_of_each_gemm_is_that_of_its_flops() -> None:
    shares = {share.gemm: share for share in gemm_shares(make_coverage("blockwise", layers=4, rows=10))}
    total = 4 * PER_LAYER + HEAD
    assert shares["fprop"].flops == shares["wgrad"].flops == 2 * 10 * total
    assert shares["fprop"].fp8_flops == 2 * 10 * (total - HEAD)
    assert shares["wgrad"].fp8_flops == 2 * 10 * (total - HEAD - DOWN)


def test_linears_of_one_kind_are_one_group_and_the_odd_one_is_its_own() -> None:
    groups = group_linears(make_coverage("blockwise", layers=4))
    by_pattern = {group.pattern: group for group in groups}
    assert len(groups) == len(LINEARS) + 2
    assert len(by_pattern["layers.*.mlp.down_proj"].fqns) == 3
    assert by_pattern["layers.3.mlp.down_proj"].ran == {"fprop": "FP8", "dgrad": "FP8", "wgrad": "BF16"}
    assert sum(group.flops for group in groups) == 3 * 2 * 1000 * (4 * PER_LAYER + HEAD)


def test_exceptions_are_those_outside_fp8_the_largest_first() -> None:
    assert [group.pattern for group in exceptions(group_linears(make_coverage("blockwise")))] == [
        "layers.3.mlp.down_proj",
        "lm_head",
    ]


def test_gemm_planned_in_fp8_that_ran_outside_it_is_broken() -> None:
    coverage = make_coverage("blockwise", layers=1)
    coverage["linears"][0]["gemms"]["dgrad"] |= {"fp8_rows": 750, "other_rows": 250}
    group = group_linears(coverage)[0]
    assert group.broken == ["dgrad"] and group.ran["dgrad"] == "FP8 75.0 %" and not group.fp8["dgrad"]


@pytest.mark.parametrize(
    ("fqns", "wanted"),
    [
        (["layers.0.q", "layers.1.q", "layers.3.q"], "0-1, 3"),
        (["model.layers.7.q"], "7"),
        (["lm_head"], ""),
        (["layers.0.experts.1.w", "layers.0.experts.2.w"], ""),
    ],
    ids=["ranges", "one", "none", "two numbers"],
)
def test_layer_numbers(fqns: list[str], wanted: str) -> None:
    assert layer_numbers(fqns) == wanted


def test_refused_kernels_are_a_sentence_or_nothing() -> None:
    text = "refused on its machine, so that others took their place: gemm a: it hung; gemm b: it crashed"
    assert refused_kernels({"refused_kernels": ["gemm a: it hung", "gemm b: it crashed"]}) == text
    assert refused_kernels({"refused_kernels": []}) == refused_kernels({}) == ""


def test_what_changed_a_linear_during_the_run_stands_for_its_rules_reason() -> None:
    coverage = make_coverage("blockwise")
    linear = next(row for row in coverage["linears"] if row["gemms"]["fprop"]["fp8_rows"])
    linear["changed"] = "an alarm put it in BF16 after step 5: loss or gradient is not finite"
    (group,) = [group for group in group_linears(coverage) if linear["fqn"] in group.fqns]
    assert group.fqns == [linear["fqn"]] and group.reason == linear["changed"] and group.changed
    linear["gemms"]["fprop"] |= {"fp8_rows": 500, "other_rows": 500}
    (group,) = [group for group in group_linears(coverage) if linear["fqn"] in group.fqns]
    assert group.ran["fprop"] == "FP8 50.0 %" and not group.broken and group in exceptions(group_linears(coverage))


def test_coverage_of_several_seeds_is_their_sum_and_names_what_only_one_of_them_did() -> None:
    one, two, three = (make_coverage("blockwise", layers=2, rows=100) for _ in range(3))
    demoted = next(linear for linear in two["linears"] if linear["fqn"] == "layers.0.mlp.down_proj")
    demoted["changed"] = "an alarm at step 20"
    for gemm in demoted["gemms"].values():
        gemm |= {"fp8_rows": 40, "other_rows": 60}
    three |= {"refused_kernels": ["gemm x: wrong sums"], "decoded": ["gemm"]}
    merged = merged_coverage({1: one, 2: two, 3: three})
    shares, alone = gemm_shares(merged), gemm_shares(one)
    assert [share.flops for share in shares] == [3 * share.flops for share in alone]
    wanted = 3 * alone[0].fp8_flops - 2 * 60 * DOWN
    assert shares[0].fp8_flops == wanted
    changed = [group for group in group_linears(merged) if group.changed]
    assert [group.reason for group in changed] == ["seed 2: an alarm at step 20"]
    assert changed[0].ran["fprop"] == "FP8 80.0 %"
    assert refused_kernels(merged) == (
        "refused on its machine, so that others took their place: seed 3: gemm x: wrong sums; no FP8 unit multiplied "
        "in seed 3: gemm: FP8 numbers were decoded and multiplied in BF16"
    )
    assert merged_coverage({7: one}) is one and merged_coverage({1: one, 2: one})["refused_kernels"] == []


def test_fallback_of_one_seed_is_not_hidden_by_an_alarm_of_another() -> None:
    one, two = (make_coverage("blockwise", layers=1) for _ in range(2))
    linears = [
        next(linear for linear in own["linears"] if linear["fqn"] == "layers.0.mlp.up_proj") for own in (one, two)
    ]
    linears[0]["gemms"]["fprop"] |= {"fp8_rows": 990, "other_rows": 10}
    linears[1]["changed"] = "an alarm at step 20"
    (group,) = (g for g in group_linears(merged_coverage({1: one, 2: two})) if g.pattern == "layers.0.mlp.up_proj")
    assert group.broken == ["fprop"] and group.reason == "seed 2: an alarm at step 20"
