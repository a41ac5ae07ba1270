"""The GEMM of wgrad against the FP64 product of the decoded operands; interpreted where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton: pip install fp8train[triton]")
from fp8train.kernels.gemm_wgrad import CONFIGS, GEMM, PLAIN, gemm_wgrad, refusal  # noqa: E402
from fp8train.quant.qtensor import QTensor  # noqa: E402
from tests.kernels.products import (  # noqa: E402
    DEVICE,
    assert_product,
    drawn_shapes,
    has_remedy,
    m_contiguous,
    padded_rows,
    planted,
    quantized,
)
from tests.shapes import matrix  # noqa: E402

SPEC = "e4m3 1x128"
HOPPER = [name for name in CONFIGS if name.startswith("gluon_")]
variants = pytest.mark.parametrize("config", ["pointer_64x64_s3", "tma_128x128_s4", "ws_128x128_s4", *HOPPER])
every_config = pytest.mark.parametrize("config", list(CONFIGS))


def columns(config: str, N: int) -> int:
    """N, or the next that the entry serves."""
    multiple = GEMM.columns_multiple(config)
    return -(-N // multiple) * multiple


def operands(M: int, N: int, K: int, seed: int = 0, scale: str = "pow2") -> tuple[QTensor, QTensor]:
    """dy.T and x.T as the quantisers leave them: rows that TMA can read, M-contiguous scales."""
    made = [quantized(rows, K, f"{SPEC} {scale}", 2 * seed + number) for number, rows in enumerate((M, N))]
    a, b = (QTensor(padded_rows(q.qdata, 16), m_contiguous(q.scale_inv), q.spec) for q in made)
    return a, b


def readable(config: str, b: QTensor) -> QTensor:
    """b with scales that the entry can read: of any strides, but for TMA."""
    return QTensor(b.qdata, m_contiguous(b.scale_inv), b.spec) if config in HOPPER else b


def run(a: QTensor, b: QTensor, **options: object) -> Tensor:
    return gemm_wgrad(a.qdata, b.qdata, a.scale_inv, b.scale_inv, **options)  # type: ignore[arg-type]


@every_config
def test_what_is_added_to_loses_nothing_but_numbers_below_the_smallest_normal_one(config: str) -> None:
    b = quantized(192, 256, SPEC, 1)
    zero = QTensor(torch.zeros_like(b.qdata), b.scale_inv, b.spec)
    before = torch.logspace(-44, 38, 192 * 192).view(192, 192).to(DEVICE)
    y = run(zero, readable(config, b), config=config, out=before.clone(), accumulate=True)
    kept = before >= 2.0**-126
    assert 0 < (~kept).sum() < kept.sum() and torch.equal(y[kept], before[kept])
    flushed = DEVICE == "cuda" and config in HOPPER  # they add in L2
    assert torch.equal(y[~kept], torch.zeros_like(y[~kept]) if flushed else before[~kept])


@variants
@pytest.mark.parametrize("batch", range(4))
def test_product_equals_fp64_on_drawn_shapes(config: str, batch: int) -> None:
    for number, (M, N, K) in enumerate(drawn_shapes(16, seed=100 * batch + 50 + len(config))):
        N = columns(config, N)
        a, b = operands(M, N, K, seed=number, scale=("pow2", "fp32")[number % 2])
        before = matrix(M, N, seed=number).to(DEVICE) if number % 3 == 0 else None
        out = None if before is None else before.clone()
        y = run(a, b, config=config, out=out, accumulate=out is not None)
        assert y.shape == (M, N) and y.dtype is torch.float32
        assert_product(y, a, b, before, (M, N, K))


@every_config
def test_every_entry_computes_several_tiles(config: str) -> None:
    a, b = operands(300, columns(config, 200), 272)
    assert_product(run(a, b, config=config), a, b)


@variants
@pytest.mark.parametrize("at", [0, 127, 128, 260, 299])
def test_planted_one_hot_meets_its_own_scales(config: str, at: int) -> None:
    a, b, expected = planted(270, columns(config, 140), 300, at, b_rows=1)
    a, b = (QTensor(padded_rows(q.qdata, 16), q.scale_inv, q.spec) for q in (a, b))
    assert int((expected != 0).sum()) == 6
    assert torch.equal(run(a, readable(config, b), config=config), expected)


@variants
def test_accumulating_adds_in_fp32_to_the_gradient_and_nothing_beside_it(config: str) -> None:
    N = columns(config, 40)
    a, b = operands(70, N, 144)
    frame = torch.full((72, N + 8), 7.0, device=DEVICE)
    out = frame[1:71, :N]
    before = matrix(70, N).to(DEVICE)
    out.copy_(before)
    assert run(a, b, config=config, out=out, accumulate=True) is out
    assert torch.equal(out, before + run(a, b, config=config))
    run(a, b, config=config, out=out, accumulate=True)
    assert_product(out, a, QTensor(b.qdata, 2 * b.scale_inv, b.spec), before)
    frame[1:71, :N] = 7.0
    assert bool((frame == 7.0).all())


@variants
def test_out_without_accumulate_is_overwritten(config: str) -> None:
    N = columns(config, 40)
    a, b = operands(70, N, 144)
    out = torch.full((70, N), float("nan"), device=DEVICE)
    assert run(a, b, config=config, out=out) is out
    assert_product(out, a, b)


@pytest.mark.parametrize("K", [33, 300])
def test_rows_that_tma_cannot_read_are_read_by_pointers(K: int) -> None:
    a, b = quantized(70, K, SPEC, 1), quantized(50, K, SPEC, 2)
    assert all(refusal(name, a.qdata, b.qdata, b.scale_inv) for name in CONFIGS if not name.startswith("pointer"))
    assert_product(run(a, b), a, b)
    with pytest.raises(ValueError, match=r"reads by TMA; needs rows that start at multiples of 16 bytes"):
        run(a, b, config=PLAIN[0])


@variants
def test_rows_of_a_wider_matrix(config: str) -> None:
    wide, b = quantized(64, 512, SPEC, 3), readable(config, quantized(columns(config, 40), 256, SPEC, 4))
    a = QTensor(wide.qdata[::2, 128:384], wide.scale_inv[::2, 1:3], wide.spec)
    assert_product(run(a, b, config=config), a, b)


@variants
def test_a_nan_scale_strikes_its_row_or_its_column_only(config: str) -> None:
    N = columns(config, 140)
    a, b = operands(130, N, 300)
    a.scale_inv[5, 1] = float("nan")
    b.scale_inv[129, 2] = float("nan")
    struck = torch.zeros(130, N, dtype=torch.bool, device=DEVICE)
    struck[5], struck[:, 129] = True, True
    assert torch.equal(run(a, b, config=config).isnan(), struck)


@pytest.mark.parametrize("left", ["e4m3", "e5m2"])
@pytest.mark.parametrize("right", ["e4m3", "e5m2"])
def test_formats_may_differ(left: str, right: str) -> None:
    a, b = quantized(33, 144, f"{left} 1x128", 5), quantized(20, 144, f"{right} 1x128", 6)
    assert_product(run(a, b), a, b)


@pytest.mark.parametrize(("M", "N", "K"), [(0, 5, 128), (5, 0, 128), (5, 6, 0), (0, 0, 0)])
def test_empty_sizes(M: int, N: int, K: int) -> None:
    a, b = quantized(M, K, SPEC, 1), quantized(N, K, SPEC, 2)
    assert torch.equal(run(a, b), torch.zeros(M, N, device=DEVICE))
    out = torch.ones(M, N, device=DEVICE)
    assert torch.equal(run(a, b, out=out, accumulate=True), torch.ones(M, N, device=DEVICE))


def test_bad_operands_are_refused_with_what_was_got_and_wanted() -> None:
    a, b = quantized(33, 144, SPEC, 5), quantized(20, 144, SPEC, 6)
    good = {"a": a.qdata, "b": b.qdata, "a_scale": a.scale_inv, "b_scale": b.scale_inv}
    memory = torch.zeros(33, 144, device=DEVICE)
    inside = {
        "a": memory.view(torch.float8_e4m3fn)[:, :144], "b": memory.view(torch.float8_e4m3fn)[:20, :144],
        "a_scale": memory[:, 19:21], "b_scale": memory[3:23, :2],
    }  # fmt: skip
    once, twice = torch.zeros(20, device=DEVICE).expand(33, 20), torch.zeros(700, device=DEVICE)
    bad: list[tuple[dict[str, object], str]] = [
        ({"a": a.qdata.to(torch.float32)}, r"a is \[33, 144\] torch.float32; needs a matrix in float8"),
        ({"b": b.qdata[0]}, r"b is \[144\]"),
        ({"b": b.qdata[:, ::2]}, "needs the last to be 1"),
        ({"b": b.qdata[:, :128]}, r"b is \[20, 128\] on .*; needs \[N, 144\]"),
        ({"b_scale": b.scale_inv[:1]}, r"b_scale is \[1, 2\] .*needs \[20, 2\]"),
        ({"a_scale": a.scale_inv.half()}, "a_scale is torch.float16; needs torch.float32"),
        ({"out": torch.zeros(33, 20, device=DEVICE).bfloat16()}, "out is torch.bfloat16; needs torch.float32"),
        ({"out": torch.zeros(20, 33, device=DEVICE).T}, "out has strides"),
        ({"accumulate": True}, "accumulate is set without out"),
        ({"out": once, "accumulate": True}, r"out has strides \(0, 1\), rows of 20 that share memory"),
        ({"out": twice.as_strided((33, 20), (19, 1)), "accumulate": True}, "needs the first to be 20 or more"),
        *(({name: x, "out": memory[:, :20]}, f"out shares memory with {name}; needs") for name, x in inside.items()),
        ({"config": "ws_1x1"}, "config is 'ws_1x1'; needs one of pointer_64x64_s3"),
    ]  # fmt: skip
    for change, message in bad:
        with pytest.raises(ValueError, match=message) as refused:
            gemm_wgrad(**(good | change))  # type: ignore[arg-type]
        assert has_remedy(refused)
