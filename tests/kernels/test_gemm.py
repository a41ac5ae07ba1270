"""The GEMM of fprop and dgrad against the FP64 product of the decoded operands; interpreted where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton: pip install fp8train[triton]")
from fp8train.kernels.gemm import CONFIGS, PLAIN, gemm, refusal  # noqa: E402
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

WEIGHT = "e4m3 128x128"
HOPPER = [name for name in CONFIGS if name.startswith("gluon_")]
variants = pytest.mark.parametrize("config", ["pointer_64x64_s3", "tma_128x128_s4", "ws_128x128_s4", *HOPPER])
every_config = pytest.mark.parametrize("config", list(CONFIGS))


def operands(M: int, N: int, K: int, seed: int = 0, scale: str = "pow2") -> tuple[QTensor, QTensor]:
    """x and w as the quantisers leave them: rows that TMA can read, M-contiguous scales."""
    a, b = quantized(M, K, f"e4m3 1x128 {scale}", 2 * seed), quantized(N, K, f"{WEIGHT} {scale}", 2 * seed + 1)
    return (
        QTensor(padded_rows(a.qdata, 16), m_contiguous(a.scale_inv), a.spec),
        QTensor(padded_rows(b.qdata, 16), b.scale_inv, b.spec),
    )


def run(a: QTensor, b: QTensor, **options: object) -> Tensor:
    return gemm(a.qdata, b.qdata, a.scale_inv, b.scale_inv, **options)  # type: ignore[arg-type]


@variants
@pytest.mark.parametrize("batch", range(4))
def test_product_equals_fp64_on_drawn_shapes(config: str, batch: int) -> None:
    for number, (M, N, K) in enumerate(drawn_shapes(16, seed=100 * batch + len(config))):
        a, b = operands(M, N, K, seed=number, scale=("pow2", "fp32")[number % 2])
        bias = matrix(1, N, seed=number)[0].to(DEVICE) if number % 3 == 0 else None
        dtype = torch.bfloat16 if number % 4 < 2 else torch.float32
        y = run(a, b, config=config, bias=bias, out_dtype=dtype)
        assert y.shape == (M, N) and y.dtype is dtype
        assert_product(y, a, b, bias, (M, N, K))


@every_config
def test_every_entry_computes_several_tiles(config: str) -> None:
    a, b = operands(300, 200, 272)
    assert_product(run(a, b, config=config, out_dtype=torch.float32), a, b)


@variants
@pytest.mark.parametrize("at", [0, 127, 128, 260, 299])
def test_planted_one_hot_meets_its_own_scales(config: str, at: int) -> None:
    a, b, expected = planted(270, 140, 300, at, b_rows=128)
    a, b = (
        QTensor(padded_rows(a.qdata, 16), a.scale_inv, a.spec),
        QTensor(padded_rows(b.qdata, 16), b.scale_inv, b.spec),
    )
    assert int((expected != 0).sum()) == 6
    assert torch.equal(run(a, b, config=config, out_dtype=torch.float32), expected)


@pytest.mark.parametrize("K", [33, 300])
def test_rows_that_tma_cannot_read_are_read_by_pointers(K: int) -> None:
    a, b = quantized(70, K, "e4m3 1x128", 1), quantized(50, K, WEIGHT, 2)
    assert all(refusal(name, a.qdata, b.qdata, b.scale_inv) for name in CONFIGS if not name.startswith("pointer"))
    assert_product(run(a, b, out_dtype=torch.float32), a, b)
    with pytest.raises(ValueError, match=r"reads by TMA; needs rows that start at multiples of 16 bytes"):
        run(a, b, config=PLAIN[0])


@variants
def test_rows_of_a_wider_matrix_and_scales_of_any_stride(config: str) -> None:
    wide, b = quantized(64, 512, "e4m3 1x128", 3), quantized(40, 256, WEIGHT, 4)
    a = QTensor(wide.qdata[::2, 128:384], wide.scale_inv[::2, 1:3], wide.spec)
    turned = QTensor(b.qdata, b.scale_inv.T.contiguous().T, b.spec)
    assert_product(run(a, turned, config=config, out_dtype=torch.float32), a, b)


@variants
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_out_is_written_and_nothing_beside_it(config: str, dtype: torch.dtype) -> None:
    a, b = operands(70, 40, 144)
    frame = torch.full((72, 48), 7.0, dtype=dtype, device=DEVICE)
    out = frame[1:71, :40]
    out.fill_(float("nan"))
    assert run(a, b, config=config, out=out) is out
    assert_product(out, a, b)
    frame[1:71, :40] = 7.0
    assert bool((frame == 7.0).all())


@variants
def test_a_nan_scale_strikes_its_row_or_its_columns_only(config: str) -> None:
    a, b = operands(130, 140, 300)
    a.scale_inv[5, 1] = float("nan")
    b.scale_inv[1, 2] = float("nan")
    y = run(a, b, config=config, out_dtype=torch.float32)
    struck = torch.zeros(130, 140, dtype=torch.bool, device=DEVICE)
    struck[5], struck[:, 128:] = True, True
    assert torch.equal(y.isnan(), struck)


@pytest.mark.parametrize("left", ["e4m3", "e5m2"])
@pytest.mark.parametrize("right", ["e4m3", "e5m2"])
def test_formats_may_differ(left: str, right: str) -> None:
    a, b = quantized(33, 144, f"{left} 1x128", 5), quantized(20, 144, f"{right} 128x128", 6)
    assert_product(run(a, b, out_dtype=torch.float32), a, b)


@pytest.mark.parametrize(("M", "N", "K"), [(0, 5, 128), (5, 0, 128), (5, 6, 0), (0, 0, 0)])
def test_empty_sizes(M: int, N: int, K: int) -> None:
    a, b = quantized(M, K, "e4m3 1x128", 1), quantized(N, K, WEIGHT, 2)
    bias = matrix(1, N)[0].to(DEVICE)
    assert torch.equal(run(a, b, out_dtype=torch.float32), torch.zeros(M, N, device=DEVICE))
    assert torch.equal(run(a, b, bias=bias, out_dtype=torch.float32), bias.expand(M, N))


def test_bad_operands_are_refused_with_what_was_got_and_wanted() -> None:
    a, b = quantized(33, 144, "e4m3 1x128", 5), quantized(20, 144, WEIGHT, 6)
    good = {"a": a.qdata, "b": b.qdata, "a_scale": a.scale_inv, "b_scale": b.scale_inv}
    memory = torch.zeros(33, 144, device=DEVICE)
    inside = {
        "a": memory.view(torch.float8_e4m3fn)[:, :144], "b": memory.view(torch.float8_e4m3fn)[:20, :144],
        "a_scale": memory[:, 19:21], "b_scale": memory[3:4, :2], "bias": memory[32, :20],
    }  # fmt: skip
    bad: list[tuple[dict[str, object], str]] = [
        ({"a": a.qdata.to(torch.bfloat16)}, r"a is \[33, 144\] torch.bfloat16; needs a matrix in float8"),
        ({"a": a.qdata[0]}, r"a is \[144\]"),
        ({"a": a.qdata[:, ::2]}, "a has strides .*needs the last to be 1"),
        ({"b": b.qdata[:, :128]}, r"b is \[20, 128\] on .*; needs \[N, 144\]"),
        ({"a_scale": a.scale_inv[:, :1]}, r"a_scale is \[33, 1\] .*needs \[33, 2\]"),
        ({"b_scale": b.scale_inv.double()}, "b_scale is torch.float64; needs torch.float32"),
        ({"b": b.qdata.to("meta")}, r"b is \[20, 144\] on meta; needs \[N, 144\] on .* Pass operands of one product"),
        ({"bias": torch.zeros(33, device=DEVICE)}, r"bias is \[33\] .*needs \[20\]"),
        ({"bias": torch.zeros(40, device=DEVICE)[::2]}, r"bias is .* strides \(2,\); needs .*contiguous. Cast it, or"),
        ({"bias": torch.zeros(20, dtype=torch.int64, device=DEVICE)}, "bias is torch.int64 .*needs torch.float32 or"),
        ({"out": torch.zeros(20, device=DEVICE).expand(33, 20)}, r"out has strides \(0, 1\), rows of 20 that share"),
        ({"out": torch.zeros(700, device=DEVICE).as_strided((33, 20), (19, 1))}, "needs the first to be 20 or more"),
        ({"out": torch.zeros(20, 33, device=DEVICE)}, r"out is \[20, 33\]"),
        ({"out": torch.zeros(20, 33, device=DEVICE).T}, "out has strides"),
        ({"out": torch.zeros(33, 20, dtype=torch.float16, device=DEVICE)}, "needs torch.bfloat16 or torch.float32"),
        *(({name: x, "out": memory[:, :20]}, f"out shares memory with {name}; needs") for name, x in inside.items()),
        ({"config": "ws_1x1"}, "config is 'ws_1x1'; needs one of pointer_64x64_s3"),
    ]  # fmt: skip
    for change, message in bad:
        arguments = good | change
        with pytest.raises(ValueError, match=message) as refused:
            gemm(**arguments)  # type: ignore[arg-type]
        assert has_remedy(refused)


def test_rows_of_one_number_may_lie_anywhere() -> None:
    a, b = quantized(33, 144, "e4m3 1x128", 5), quantized(1, 144, WEIGHT, 6)
    out = torch.zeros(33, 7, device=DEVICE)[:, ::8]
    bias = torch.full((4,), 0.5, device=DEVICE)[::4]
    assert_product(run(a, b, out=out, bias=bias), a, b, bias)
    one = QTensor(a.qdata[:1], a.scale_inv[:1], a.spec)
    assert_product(run(one, b, out=torch.zeros((), device=DEVICE).expand(1, 1)), one, b)
