"""The quantiser of weights against the definition, bit for bit; interpreted where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton: pip install fp8train[triton]")
from fp8train.kernels.quantize_weight import quantize_weight  # noqa: E402
from fp8train.quant import reference  # noqa: E402
from fp8train.quant.formats import E4M3, E5M2, FORMATS, Format, QuantSpec  # noqa: E402
from fp8train.quant.qtensor import QTensor  # noqa: E402
from tests.kernels.products import DEVICE, has_remedy  # noqa: E402
from tests.quant.specs import same_codes  # noqa: E402
from tests.shapes import matrices, matrix  # noqa: E402

SPEC = QuantSpec(E4M3, (128, 128))
Copies = tuple[Tensor, Tensor, Tensor, Tensor]


def run(w: Tensor, spec: QuantSpec = SPEC, **more: object) -> Copies:
    options = {"fp8_dtype": spec.format.dtype, "pow2": spec.scale == "pow2"}
    return quantize_weight(w, **options, **more)  # type: ignore[arg-type]


def assert_as_defined(copies: Copies, w: Tensor, spec: QuantSpec = SPEC) -> None:
    straight, transposed = QTensor(*copies[:2], spec), QTensor(*copies[2:], spec)
    assert same_codes(straight, reference.quantize(w, spec))
    assert same_codes(transposed, reference.quantize(w, spec).transpose())
    assert copies[1].is_contiguous() and copies[3].is_contiguous()


@matrices
def test_codes_are_the_references_for_every_shape(rows: int, cols: int) -> None:
    w = matrix(rows, cols).to(DEVICE)
    assert_as_defined(run(w), w)


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=list(FORMATS))
@pytest.mark.parametrize("scale", ["pow2", "fp32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_codes_are_the_references_for_every_dtype_format_and_scale(dtype: torch.dtype, scale: str, fmt: Format) -> None:
    w, spec = matrix(140, 200, dtype=dtype).to(DEVICE), QuantSpec(fmt, (128, 128), scale)  # type: ignore[arg-type]
    assert_as_defined(run(w, spec), w, spec)


def test_blocks_of_zeros_subnormals_and_non_finite_numbers_stay_apart() -> None:
    w = matrix(256, 384).to(DEVICE)
    w[:128, :128], w[:128, 128:256] = 0.0, 1e-41
    w[130, 10], w[255, 383] = -float("nan"), float("inf")
    copies = run(w)
    assert_as_defined(copies, w)
    assert copies[1].isnan().tolist() == [[False, False, False], [True, False, True]]


def test_leading_strides_are_read() -> None:
    w = matrix(300, 200).to(DEVICE)
    assert_as_defined(run(w[1::2, 3:150]), w[1::2, 3:150])


def test_two_launches_write_the_same() -> None:
    w = matrix(150, 40).to(DEVICE)
    assert_as_defined(run(w, two_launches=True), w)


def test_buffers_are_rewritten_in_place() -> None:
    first, second = matrix(150, 140).to(DEVICE), matrix(150, 140, seed=1).to(DEVICE)
    buffers = run(first)
    returned = run(second, out=buffers)
    assert all(got is buffer for got, buffer in zip(returned, buffers, strict=True))
    assert_as_defined(buffers, second)


def test_statistics_count_what_is_lost() -> None:
    w = matrix(150, 140).to(DEVICE)
    w[0, :4] = torch.tensor([-0.0, 1e-30, float("nan"), float("inf")])
    stats = torch.zeros(5, dtype=torch.int64, device=DEVICE)
    q = run(w, stats=stats)[0]
    finite = w.isfinite()
    flushed = finite & (w != 0) & ((q.view(torch.uint8) & 0x7F) == 0)
    # none is saturated: see quantize.STATISTICS
    assert stats.tolist() == [int(w[finite].abs().max().view(torch.int32)), int(flushed.sum()), 0, 2, w.numel()]
    assert stats[1] > 0


def test_buffers_that_do_not_fit_are_refused() -> None:
    w = torch.zeros(100, 64, device=DEVICE)
    q, s, qt, st = run(w)
    with pytest.raises(ValueError, match="out is .* needs"):
        run(w, out=(q, s, qt, st[:0]))
    with pytest.raises(ValueError, match=r"out is on \[.*'meta'.*needs .*, as w"):
        run(w, out=(q, s, qt.to("meta"), st))
    with pytest.raises(ValueError, match="whole rows of 128"):
        run(w, out=(q, s, qt.contiguous(), st))
    with pytest.raises(ValueError, match="shares memory"):
        run(w, out=(q, s, qt, s.view(1, 1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": torch.zeros(4)}, r"w is \[4\]"),
        ({"w": torch.zeros(4, 4, dtype=torch.float64)}, "torch.float64; needs"),
        ({"w": torch.zeros(4, 8).T}, r"strides \(1, 8\)"),
        ({"w": torch.empty(0, 2**31, device="meta")}, "below 2\\^31"),
        ({"fp8_dtype": torch.int8}, "fp8_dtype is torch.int8"),
        ({"stats": torch.zeros(2, 5, dtype=torch.int64)}, r"stats is \[2, 5\]"),
    ],
    ids=["vector", "fp64", "column-major", "too-large", "int8", "stats"],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    arguments = {"w": torch.zeros(4, 4), "fp8_dtype": torch.float8_e4m3fn, "pow2": True} | change
    with pytest.raises(ValueError, match=f"quantize_weight: .*{message}") as refused:
        quantize_weight(**arguments)  # type: ignore[arg-type]
    assert has_remedy(refused)


@pytest.mark.parametrize("shape", [(256, 384), (140, 200), (1, 300)])
def test_each_copy_can_be_made_alone(shape: tuple[int, int]) -> None:
    w = matrix(*shape).to(DEVICE)
    both, alone = run(w), (run(w, transposed=False), run(w, straight=False))
    assert alone[0][2:] == (None, None) == alone[1][:2]
    for made, wanted in zip((*alone[0][:2], *alone[1][2:]), both, strict=True):
        assert made.stride() == wanted.stride() and torch.equal(made.view(torch.uint8), wanted.view(torch.uint8))
    again = run(w + 1, transposed=False, out=alone[0])
    assert again[0] is alone[0][0] and torch.equal(again[0].view(torch.uint8), run(w + 1)[0].view(torch.uint8))
    with pytest.raises(ValueError, match="quantize_weight: out is"):
        run(w, out=alone[0])
