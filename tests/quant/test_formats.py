"""Formats and the specifications of precision."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fp8train.quant.formats import (
    BF16,
    BLOCKWISE,
    E4M3,
    E5M2,
    FORMATS,
    FP32,
    Format,
    GemmPrecision,
    LinearPrecision,
    QuantSpec,
)
from tests.quant.oracle import MAGNITUDES

formats = pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)


@formats
def test_all_256_codes_decode_to_the_table_written_by_hand(fmt: Format) -> None:
    table = MAGNITUDES[fmt.name]
    values = torch.arange(256, dtype=torch.uint8).view(fmt.dtype).to(torch.float64).numpy()
    finite = len(table)
    assert finite == {"e4m3": 127, "e5m2": 124}[fmt.name]
    assert np.array_equal(values[:finite], table)
    assert np.array_equal(values[128 : 128 + finite], -table)
    assert np.signbit(values[128])  # -0 is code 0x80
    if fmt is E4M3:  # no Inf: a single magnitude is spent on NaN
        assert np.isnan(values[[0x7F, 0xFF]]).all()
    else:
        assert values[0x7C] == np.inf and values[0xFC] == -np.inf
        assert np.isnan(values[[0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]]).all()


@formats
def test_limits_of_a_format_are_those_of_its_table(fmt: Format) -> None:
    table = MAGNITUDES[fmt.name]
    assert fmt.max == table[-1] == torch.finfo(fmt.dtype).max
    assert torch.tensor(fmt.nan_code, dtype=torch.uint8).view(fmt.dtype).float().isnan()
    assert FORMATS[fmt.name] is fmt


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("e4m3 1x128", QuantSpec(E4M3, (1, 128), "pow2")),
        ("e4m3 128x128 fp32", QuantSpec(E4M3, (128, 128), "fp32")),
        ("e5m2 tensor pow2", QuantSpec(E5M2, "tensor", "pow2")),
        ("e4m3 row fp32", QuantSpec(E4M3, "row", "fp32")),
        ("e5m2 1x32", QuantSpec(E5M2, (1, 32), "pow2")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_specification_is_read_from_its_text_and_written_back(text: str, spec: QuantSpec) -> None:
    assert QuantSpec.parse(text) == spec
    assert QuantSpec.parse(str(spec)) == spec
    assert hash(QuantSpec.parse(str(spec))) == hash(spec)


def test_word_in_the_text_overrides_the_scale_given_beside_it() -> None:
    assert QuantSpec.parse("e4m3 1x128", scale="fp32").scale == "fp32"
    assert QuantSpec.parse("e4m3 1x128 pow2", scale="fp32").scale == "pow2"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("e4m3", "1 word"),
        ("e4m3 1x128 pow2 fp32", "4 word"),
        ("e3m4 1x128", "e3m4"),
        ("e4m3 1by128", "1by128"),
        ("e4m3 1x128 floor", "floor"),
        ("e4m3 0x128", "0, 128"),
        ("E4M3 1x128", "E4M3"),
    ],
)
def test_text_that_is_no_specification_is_refused_by_the_word_that_is_wrong(text: str, names: str) -> None:
    with pytest.raises(ValueError, match=names) as error:
        QuantSpec.parse(text)
    assert "needs" in str(error.value)


@pytest.mark.parametrize("block", ["col", "xy", 5, (0, 1), (1, -1), (1,), (1, 2, 3), (1.5, 2), None], ids=str)
def test_block_that_is_none_is_refused(block: object) -> None:
    with pytest.raises(ValueError, match="QuantSpec: block is .*; needs"):
        QuantSpec(E4M3, block)  # type: ignore[arg-type]


def test_block_given_as_a_list_equals_the_tuple() -> None:
    assert QuantSpec(E4M3, [1, 128]) == QuantSpec(E4M3, (1, 128))  # type: ignore[arg-type]
    assert hash(QuantSpec(E4M3, [1, 128])) == hash(QuantSpec(E4M3, (1, 128)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("block", "sizes", "shape"),
    [
        ("tensor", (303, 300), (1, 1)),
        ("row", (303, 300), (303, 1)),
        ((1, 128), (303, 300), (303, 3)),
        ((128, 128), (303, 300), (3, 3)),
        ((1, 32), (7, 33), (7, 2)),
        ((1, 128), (0, 300), (0, 3)),
        ((128, 128), (300, 0), (3, 0)),
        ("tensor", (0, 300), (0, 1)),
        ("row", (3, 0), (3, 0)),
    ],
    ids=str,
)
def test_last_short_block_has_a_scale_of_its_own(block, sizes, shape) -> None:  # type: ignore[no-untyped-def]
    assert QuantSpec(E4M3, block).scale_shape(*sizes) == shape


def test_only_square_and_tensor_blocks_can_be_transposed_as_bytes() -> None:
    blocks = {"tensor": True, "row": False, (128, 128): True, (1, 128): False, (32, 32): True}
    assert {block: QuantSpec(E4M3, block).transposable for block in blocks} == blocks


def test_gemm_is_fp8_only_if_both_operands_are() -> None:
    spec = QuantSpec(E4M3, (1, 128))
    assert GemmPrecision(spec, spec).fp8
    assert not GemmPrecision(spec, None).fp8 and not GemmPrecision(None, spec).fp8 and not GemmPrecision().fp8


def test_precisions_are_hashable_and_cannot_be_edited() -> None:
    assert len({BF16, FP32, BLOCKWISE, LinearPrecision("bf16")}) == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        BLOCKWISE.name = "other"  # type: ignore[misc]


def test_default_precision_is_the_recipe_of_deepseek_v3_with_power_of_two_scales() -> None:
    words = {gemm: BLOCKWISE.describe(gemm) for gemm in BLOCKWISE.gemms}
    assert words == {
        "fprop": "e4m3 1x128 pow2 * e4m3 128x128 pow2",
        "dgrad": "e4m3 1x128 pow2 * e4m3 128x128 pow2",
        "wgrad": "e4m3 1x128 pow2 * e4m3 1x128 pow2",
    }
    assert BLOCKWISE.wgrad_source == "dual" and BLOCKWISE.any_fp8
    assert BF16.describe("fprop") == "bf16" and FP32.describe("wgrad") == "fp32" and not BF16.any_fp8


@pytest.mark.parametrize("missing", ["fprop", "wgrad"])
def test_requantised_wgrad_operand_without_an_fp8_copy_is_refused(missing: str) -> None:
    with pytest.raises(ValueError, match="requant"):
        dataclasses.replace(BLOCKWISE, wgrad_source="requant", **{missing: GemmPrecision()})
