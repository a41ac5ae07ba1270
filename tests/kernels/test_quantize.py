"""The quantiser of x and dy against the definition, bit for bit; interpreted where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton: pip install fp8train[triton]")
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from fp8train.kernels.quantize import STATISTICS, quantize_columns, quantize_dual, quantize_rows  # noqa: E402
from fp8train.kernels.tile import losses  # noqa: E402
from fp8train.kernels.tile_launch import MAX_BITS  # noqa: E402
from fp8train.quant import reference  # noqa: E402
from fp8train.quant.formats import E4M3, E5M2, FORMATS, Format, QuantSpec  # noqa: E402
from fp8train.quant.qtensor import QTensor  # noqa: E402
from tests.kernels.products import DEVICE, has_remedy  # noqa: E402
from tests.quant.specs import same_codes  # noqa: E402
from tests.shapes import matrices, matrix  # noqa: E402

dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
formats = pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=list(FORMATS))
kinds = pytest.mark.parametrize("scale", ["pow2", "fp32"])


def options(spec: QuantSpec) -> dict[str, object]:
    return {"fp8_dtype": spec.format.dtype, "pow2": spec.scale == "pow2"}


def dual(x: Tensor, spec: QuantSpec, **more: object) -> tuple[QTensor, QTensor]:
    q, s, qt, st = quantize_dual(x, **options(spec), **more)  # type: ignore[arg-type]
    return QTensor(q, s, spec), QTensor(qt, st, spec)


def assert_as_defined(x: Tensor, spec: QuantSpec) -> None:
    row, col = dual(x, spec)
    assert same_codes(row, reference.quantize(x, spec))
    assert same_codes(col, reference.quantize(x, spec, transpose=True))


def block_magnitudes(rows: int, cols: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """N(0, 1) numbers where every block of 128x128 has a magnitude of its own, from 2^-60 to 2^60."""
    x = matrix(rows, cols, dtype=torch.float32)
    exponents = torch.randint(-60, 61, (-(-rows // 128), -(-cols // 128)), generator=torch.Generator().manual_seed(1))
    return (x * 2.0 ** exponents.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :cols]).to(DEVICE, dtype)


@formats
@pytest.mark.parametrize("turned", [False, True], ids=["blocks of one exponent", "blocks of all exponents"])
@pytest.mark.parametrize("finite", [True, False], ids=["finite", "all"])
def test_words_have_the_codes_of_every_bf16_number(finite: bool, turned: bool, fmt: Format) -> None:
    x = torch.arange(-(2**15), 2**15, device=DEVICE).to(torch.int16).view(256, 256).view(torch.bfloat16)
    x = torch.where(x.isfinite() | (not finite), x, 0.0)
    x, spec = x.t().contiguous() if turned else x, QuantSpec(fmt, (1, 128))
    assert_as_defined(x, spec)
    for mine, plain in zip(dual(x, spec), dual(x, spec, words=False), strict=True):
        assert same_codes(mine, plain) and mine.qdata.stride() == plain.qdata.stride()


def test_words_are_taken_where_they_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[bool] = []

    def note(kernel: object, choices: object, tensors: object, rest: Callable[[], tuple[Any, ...]]) -> None:
        launched.append(rest()[2]["WORDS"])

    monkeypatch.setattr("fp8train.kernels.quantize.launch", note)
    x, spec = matrix(256, 272, dtype=torch.bfloat16).to(DEVICE), QuantSpec(E4M3, (1, 128))
    whole = x[:, :256]
    dual(whole, spec)
    assert launched.pop()
    stats = torch.zeros(2, 5, dtype=torch.int64, device=DEVICE)
    for other, kind, more in (
        (x[:, 8:264], spec, {}), (x[:, 4:260], spec, {"words": False}), (x, spec, {}), (x[:250, :256], spec, {}),
        (whole.float(), spec, {}), (whole, QuantSpec(E4M3, (1, 128), "fp32"), {}), (whole, spec, {"col_pow2": False}),
        (whole, spec, {"words": False}), (whole, spec, {"stats": stats}), (x[:, 4:260], spec, {}),
    ):  # fmt: skip
        dual(other, kind, **more)
        assert launched.pop() is (other.data_ptr() == x.data_ptr() + 16 and not more)
    quantize_rows(whole, **options(spec))  # type: ignore[arg-type]
    quantize_columns(whole, **options(spec))  # type: ignore[arg-type]
    assert launched == [False, False]


@matrices
def test_codes_are_the_references_for_every_shape(rows: int, cols: int) -> None:
    assert_as_defined(matrix(rows, cols, dtype=torch.bfloat16).to(DEVICE), QuantSpec(E4M3, (1, 128)))


@dtypes
@formats
@kinds
def test_codes_are_the_references_for_every_dtype_format_and_scale(dtype: torch.dtype, fmt: Format, scale: str) -> None:
    assert_as_defined(block_magnitudes(130, 139, dtype), QuantSpec(fmt, (1, 128), scale))  # type: ignore[arg-type]


@kinds
def test_one_copy_alone_equals_the_one_of_the_pair(scale: str) -> None:
    x, spec = block_magnitudes(131, 70), QuantSpec(E4M3, (1, 128), scale)  # type: ignore[arg-type]
    row, col = dual(x, spec)
    assert same_codes(QTensor(*quantize_rows(x, **options(spec)), spec), row)  # type: ignore[arg-type]
    assert same_codes(QTensor(*quantize_columns(x, **options(spec)), spec), col)  # type: ignore[arg-type]


def test_copies_may_have_scales_of_different_kinds() -> None:
    x, spec = block_magnitudes(64, 150), QuantSpec(E4M3, (1, 128), "fp32")
    _, col = dual(x, spec, col_pow2=True)
    assert same_codes(
        QTensor(col.qdata, col.scale_inv, spec), reference.quantize(x, QuantSpec(E4M3, (1, 128)), transpose=True)
    )


@pytest.mark.parametrize("view", ["columns-of-a-wider-matrix", "every-third-row", "offset-by-one", "one-row-repeated"])
def test_any_leading_stride_is_read(view: str) -> None:
    x = block_magnitudes(400, 160, torch.bfloat16)
    views = {
        "columns-of-a-wider-matrix": x[:140, 16:144],
        "every-third-row": x[::3],
        "offset-by-one": x.view(-1)[1 : 1 + 130 * 130].view(130, 130),
        "one-row-repeated": x[:1].expand(40, 160),
    }
    assert_as_defined(views[view], QuantSpec(E4M3, (1, 128)))


@kinds
@pytest.mark.parametrize("bits", [0x7FC00000, -0x400000, 0x7F800000, -0x800000], ids=["nan", "-nan", "inf", "-inf"])
def test_one_non_finite_number_poisons_its_blocks_and_no_other(bits: int, scale: str) -> None:
    x = block_magnitudes(20, 140)
    x.view(torch.int32)[3, 5] = bits
    spec = QuantSpec(E4M3, (1, 128), scale)  # type: ignore[arg-type]
    assert_as_defined(x, spec)
    row, col = dual(x, spec)
    assert row.scale_inv.isnan().nonzero().tolist() == [[3, 0]] and col.scale_inv.isnan().nonzero().tolist() == [[5, 0]]
    assert (row.qdata[3, :128].view(torch.uint8) == spec.format.nan_code).all()


@formats
@kinds
def test_scales_are_the_references_at_every_exponent_and_around_every_step(fmt: Format, scale: str) -> None:
    """One number a block: zeros, subnormals, and for each exponent the neighbours of max * 2^k and of 2^k."""
    exponents = torch.arange(0, 255, dtype=torch.int32) << 23
    step = torch.tensor(fmt.max).view(torch.int32).item() & 0x7FFFFF
    near = torch.tensor([0, 1, 2, 0x7FFFFF, step - 1, step, step + 1, step + 2], dtype=torch.int32)
    numbers = (exponents[:, None] + near[None, :]).view(torch.float32).to(DEVICE)
    x = numbers.reshape(-1, 1)
    spec = QuantSpec(fmt, (1, 128), scale)  # type: ignore[arg-type]
    row = QTensor(*quantize_rows(x, **options(spec)), spec)  # type: ignore[arg-type]
    assert same_codes(row, reference.quantize(x, spec))


def test_every_bf16_number_beside_others_gets_the_references_code() -> None:
    finite = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = finite[finite.to(torch.float32).isfinite()]
    order = torch.randperm(finite.numel(), generator=torch.Generator().manual_seed(0))
    assert_as_defined(finite[order][: 510 * 128].view(510, 128).to(DEVICE), QuantSpec(E4M3, (1, 128)))


def test_a_number_planted_in_a_block_is_found_at_its_place_and_scale() -> None:
    x = torch.zeros(260, 270)
    places = [(0, 0), (127, 127), (128, 129), (259, 269), (131, 2), (5, 256)]
    for number, (i, j) in enumerate(places):
        x[i, j] = 2.0**number * 3
    row, col = dual(x.to(DEVICE), QuantSpec(E4M3, (1, 128)))
    assert torch.equal(row.dequantize().cpu(), x) and torch.equal(col.dequantize().T.cpu(), x)
    assert (row.scale_inv != 1).nonzero().tolist() == sorted([i, j // 128] for i, j in places)
    assert (col.scale_inv != 1).nonzero().tolist() == sorted([j, i // 128] for i, j in places)


def test_layout_is_what_gemms_read() -> None:
    row, col = dual(matrix(130, 300, dtype=torch.bfloat16).to(DEVICE), QuantSpec(E4M3, (1, 128)))
    assert row.qdata.stride() == (304, 1) and col.qdata.stride() == (256, 1)
    assert row.scale_inv.stride() == (1, 400) and col.scale_inv.stride() == (1, 560)


@dtypes
@kinds
def test_statistics_count_what_each_copy_loses(dtype: torch.dtype, scale: str) -> None:
    x = matrix(40, 150, dtype=dtype).to(DEVICE)
    x[:, 3] *= 1e-7
    x[0, :6] = torch.tensor([-0.0, 0.0, float("nan"), float("inf"), -float("inf"), 0.5])
    x[:, 140] = -0.0
    spec = QuantSpec(E4M3, (1, 128), scale)  # type: ignore[arg-type]
    stats = torch.zeros(2, len(STATISTICS), dtype=torch.int64, device=DEVICE)
    copies = dual(x, spec, stats=stats)
    finite = x.float().isfinite()
    for copy, counted in zip((copies[0].qdata, copies[1].qdata.T), stats.tolist(), strict=True):
        flushed = finite & (x != 0) & ((copy.view(torch.uint8) & 0x7F) == 0)
        amax = x.float()[finite].abs().max().view(torch.int32)
        assert counted == [int(amax), int(flushed.sum()), 0, 3, x.numel()]  # 0 saturated: see STATISTICS
    assert stats[0, 1] != stats[1, 1], "the copies have other blocks, so they lose other numbers"


@triton.jit
def _losses_kernel(x_ptr, amax_ptr, counts_ptr, encode_scale, FP8: tl.constexpr, MAX_BITS: tl.constexpr):
    rows, cols = tl.arange(0, 32), tl.arange(0, 128)
    x = tl.load(x_ptr + rows[:, None] * 128 + cols[None, :])
    inside = (rows < 31)[:, None] & (cols < 127)[None, :]
    amax_bits, counts = losses(x, tl.full([32, 1], encode_scale, tl.float32), inside, FP8, MAX_BITS)
    tl.store(amax_ptr + rows, amax_bits)
    tl.store(counts_ptr + rows, counts)


@formats
@pytest.mark.parametrize("encode_scale", [1.0, 2.0**-7, 2.0**9])
def test_what_a_scale_takes_beyond_the_maximum_is_counted_as_saturated(fmt: Format, encode_scale: float) -> None:
    """By a scale that is not the block's own: of those none does it."""
    limit = torch.tensor(fmt.max).view(torch.int32)
    steps = torch.tensor([-1, 0, 1, 4, 5, 6, 1 << 23], dtype=torch.int32)  # last places beyond; the last is a double
    scaled = torch.cat([(limit + steps).view(torch.float32), torch.tensor([float("inf"), float("nan"), 0.0])])
    x = torch.zeros(32, 128)
    x[3, :10], x[5, 20:30] = scaled / encode_scale, -scaled / encode_scale
    x[31, :10], x[7, 127] = scaled / encode_scale, 2 * fmt.max / encode_scale  # outside
    amax, counts = (torch.zeros(32, dtype=torch.int32, device=DEVICE) for _ in range(2))
    fp8 = {"e4m3": tl.float8e4nv, "e5m2": tl.float8e5}[fmt.name]
    _losses_kernel[(1,)](x.to(DEVICE), amax, counts, encode_scale, FP8=fp8, MAX_BITS=MAX_BITS[fmt.dtype])
    wanted = torch.zeros(32, 3, dtype=torch.int32)  # flushed, saturated, not finite
    wanted[[3, 5]] = torch.tensor([0, 3, 2], dtype=torch.int32)
    assert torch.stack([counts & 0x3FF, counts >> 10 & 0x3FF, counts >> 20], dim=1).tolist() == wanted.tolist()
    largest = (2 * limit.view(torch.float32) / encode_scale).view(torch.int32)
    assert amax.nonzero().flatten().tolist() == [3, 5] and (amax[[3, 5]].cpu() == largest).all()


def test_statistics_of_calls_add_up() -> None:
    x, spec = matrix(10, 20).to(DEVICE), QuantSpec(E4M3, (1, 128))
    stats = torch.zeros(2, len(STATISTICS), dtype=torch.int64, device=DEVICE)
    dual(x, spec, stats=stats)
    dual(x / 2, spec, stats=stats)
    quantize_columns(x, stats=stats[1], **options(spec))  # type: ignore[arg-type]
    amax = int(x.abs().max().view(torch.int32))
    assert stats[:, 0].tolist() == [amax, amax] and stats[:, 4].tolist() == [400, 600]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4)}, r"x is \[4\]"),
        ({"x": torch.zeros(4, 4, dtype=torch.float16)}, "torch.float16; needs"),
        ({"x": torch.zeros(4, 8).T}, r"strides \(1, 8\)"),
        ({"x": torch.empty(0, 2**31, device="meta")}, "below 2\\^31"),
        ({"fp8_dtype": torch.int8}, "fp8_dtype is torch.int8"),
        ({"stats": torch.zeros(4, dtype=torch.int64)}, r"stats is \[4\]"),
        ({"stats": torch.zeros(5)}, "torch.float32, .*; needs"),
        ({"stats": torch.zeros(10, dtype=torch.int64)[::2]}, r"stats is .* strides \(2,\); needs .* contiguous"),
    ],
    ids=["vector", "fp16", "column-major", "too-large", "int8", "short-stats", "fp32-stats", "strided-stats"],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    arguments = {"x": torch.zeros(4, 4), **options(QuantSpec(E4M3, (1, 128)))} | change
    with pytest.raises(ValueError, match=f"quantize_rows: .*{message}") as refused:
        quantize_rows(**arguments)  # type: ignore[arg-type]
    assert has_remedy(refused)
