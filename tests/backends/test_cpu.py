"""The CPU backends: codes bit for bit those of the reference, products equal up to the order of FP32 sums."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch import Tensor

from fp8train.backends import cpu
from fp8train.backends.cpu import CpuBackend
from fp8train.backends.device_gemm import SCALE_RANGE
from fp8train.quant import reference
from fp8train.quant.formats import QuantSpec
from fp8train.quant.qtensor import QTensor
from tests.quant.specs import SPECS, arrangements, every_bf16, same_bits, same_codes, specs
from tests.quant.test_reference_gemm import calc_diff, exact, operands, pairs
from tests.shapes import gemms, layouts, matrices, matrix


def backend_of(name: str) -> CpuBackend:
    """`compiled` and `torch` as they are here, or as with BF16 matrix units (oneDNN emulates them)."""
    backend = CpuBackend(compiled=name != "torch")
    if name == "bf16-units":
        backend._bf16_units = True
    return backend


BACKENDS = {name: backend_of(name) for name in ("compiled", "torch", "bf16-units")}
QUANTISERS = ("compiled", "torch")
quantisers = pytest.mark.parametrize("backend", [BACKENDS[name] for name in QUANTISERS], ids=QUANTISERS)
backends = pytest.mark.parametrize("backend", list(BACKENDS.values()), ids=list(BACKENDS))


def test_this_machine_has_a_compiler_so_that_both_paths_are_tested() -> None:
    if BACKENDS["compiled"]._lib is None:
        pytest.skip(f"the C++ quantisers are not tested: {BACKENDS['compiled'].note}")
    assert "built with" in BACKENDS["compiled"].note
    assert BACKENDS["torch"]._lib is None and "asked for torch only" in BACKENDS["torch"].note


def assert_same(made: QTensor, expected: QTensor, what: object) -> None:
    assert same_codes(made, expected), what
    assert made.qdata.is_contiguous() and made.spec == expected.spec, what


@specs
@matrices
def test_codes_equal_the_reference(text: str, rows: int, cols: int) -> None:
    spec = QuantSpec.parse(text)
    for dtype in (torch.bfloat16, torch.float32):
        for layout in ("row-major", "column-major"):
            x = matrix(rows, cols, dtype=dtype, layout=layout)
            for transpose in (False, True):
                expected = reference.quantize(x, spec, transpose=transpose)
                for name in QUANTISERS:
                    made = BACKENDS[name].quantize(x, spec, transpose)
                    assert_same(made, expected, (name, dtype, layout, transpose))


@quantisers
@pytest.mark.parametrize("text", SPECS)
def test_views_are_read_with_their_strides(backend: CpuBackend, text: str) -> None:
    spec = QuantSpec.parse(text)
    x = matrix(300, 700)
    views = {
        "columns of a wider matrix": x[:, 100:403],
        "every second row": x[::2, :257],
        "every second column": x[:, ::2],
        "one row repeated": x[:1].expand(130, 700),
        "one column": x[:, 5:6],
    }
    for name, view in views.items():
        for transpose in (False, True):
            expected = reference.quantize(view.clone(), spec, transpose=transpose)
            assert_same(backend.quantize(view, spec, transpose), expected, (name, transpose))


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
@pytest.mark.parametrize("kind", ["pow2", "fp32"])
@arrangements
def test_every_bf16_number_equals_the_reference(fmt: str, kind: str, arrangement: str) -> None:
    x = every_bf16(arrangement)
    turned = x.T.contiguous()  # blocks along columns, as wgrad has them
    spec = QuantSpec.parse(f"{fmt} 1x128 {kind}")
    expected = reference.quantize(x, spec)
    for name in QUANTISERS:
        backend = BACKENDS[name]
        for dtype in (torch.bfloat16, torch.float32):
            assert_same(backend.quantize(x.to(dtype), spec, False), expected, (name, dtype))
            assert_same(backend.quantize(turned.to(dtype), spec, True), expected, (name, dtype))


@quantisers
@specs
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), 2.0**-149, -0.0, 3e38], ids=str)
def test_special_numbers_equal_the_reference(backend: CpuBackend, text: str, value: float) -> None:
    spec = QuantSpec.parse(text)
    for background in (matrix(140, 270), torch.zeros(140, 270)):
        background[131, 140] = value
        for transpose in (False, True):
            expected = reference.quantize(background, spec, transpose=transpose)
            assert_same(backend.quantize(background, spec, transpose), expected, transpose)


@matrices
@layouts
@pytest.mark.parametrize(
    ("row", "col"),
    [
        ("e4m3 1x128 pow2", "e4m3 1x128 pow2"),
        ("e4m3 1x128 fp32", "e4m3 1x128 pow2"),
        ("e5m2 1x128 pow2", "e5m2 1x128 fp32"),
        ("e4m3 1x128 pow2", "e5m2 1x128 pow2"),
        ("e4m3 row fp32", "e4m3 tensor fp32"),
    ],
    ids=["blockwise", "scales-differ", "e5m2", "formats-differ", "blocks-differ"],
)
def test_dual_copies_equal_two_quantisations_of_the_reference(
    row: str, col: str, rows: int, cols: int, layout: str
) -> None:
    row_spec, col_spec = QuantSpec.parse(row), QuantSpec.parse(col)
    for dtype in (torch.bfloat16, torch.float32):
        x = matrix(rows, cols, dtype=dtype, layout=layout)
        expected, expected_t = reference.quantize(x, row_spec), reference.quantize(x, col_spec, transpose=True)
        for name in QUANTISERS:
            made, made_t = BACKENDS[name].quantize_dual(x, row_spec, col_spec)
            assert_same(made, expected, (name, dtype))
            assert_same(made_t, expected_t, (name, dtype))


@quantisers
def test_dual_copies_of_a_nan_strike_its_two_blocks_only(backend: CpuBackend) -> None:
    spec = QuantSpec.parse("e4m3 1x128")
    x = matrix(256, 256)
    x[130, 200] = float("nan")
    made, made_t = backend.quantize_dual(x, spec, spec)
    assert made.scale_inv.isnan().nonzero().tolist() == [[130, 1]]
    assert made_t.scale_inv.isnan().nonzero().tolist() == [[200, 1]]
    assert int((made_t.qdata.view(torch.uint8) == 0x7F).sum()) == 128


@quantisers
@matrices
@pytest.mark.parametrize("text", ["e4m3 128x128 pow2", "e4m3 128x128 fp32", "e5m2 32x32 pow2", "e4m3 tensor fp32"])
def test_square_copies_are_transposes_of_each_other(backend: CpuBackend, text: str, rows: int, cols: int) -> None:
    spec = QuantSpec.parse(text)
    w = matrix(rows, cols)
    made, made_t = backend.quantize_square(w, spec)
    assert_same(made, reference.quantize(w, spec), "w")
    assert_same(made_t, reference.quantize(w.T.contiguous(), spec), "w.T")


@quantisers
@specs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoding_equals_the_reference(backend: CpuBackend, text: str, dtype: torch.dtype) -> None:
    x = matrix(130, 270)
    q = reference.quantize(x, QuantSpec.parse(text))
    assert torch.equal(backend.dequantize(q, dtype), q.dequantize(dtype))
    if dtype is torch.float32 or q.spec.scale == "pow2":  # a GEMM reads no other as BF16
        assert torch.equal(backend._decode(q, dtype, scaled=True), q.dequantize(dtype))


@quantisers
@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
def test_all_256_codes_are_decoded_exactly(backend: CpuBackend, fmt: str) -> None:
    spec = QuantSpec.parse(f"{fmt} 1x128")
    codes = torch.arange(256, dtype=torch.uint8).view(spec.format.dtype).reshape(2, 128)
    for finite_only in (False, True):
        rows = codes if not finite_only else codes[:, :120].contiguous()
        q = QTensor(rows, torch.ones(2, 1), spec)
        for dtype in (torch.float32, torch.bfloat16):
            made = backend._decode(q, dtype, scaled=False).to(torch.float32)
            assert same_bits(made, rows.to(torch.float32))


@backends
@pairs
@gemms
def test_product_equals_the_reference_up_to_the_order_of_sums(
    backend: CpuBackend, M: int, N: int, K: int, left: str, right: str
) -> None:
    qa, qb = operands(M, N, K, left, right)
    y = backend.scaled_mm(qa, qb, None, None, False, torch.float32)
    expected = reference.scaled_mm(qa, qb, out_dtype=torch.float32)
    # either side adds K exact products in FP32 in any order and rounds scales and partials: (K + 4) * 2^-24 of sum |ab|
    bound = 2 * (K + 4) * 2.0**-24 * exact_magnitudes(qa, qb)
    assert y.shape == (M, N) and y.dtype is torch.float32
    assert bool(((y.double() - expected.double()).abs() <= bound).all())
    assert calc_diff(y, expected) < 1e-12  # as the reference's own distance from FP64
    rounded = backend.scaled_mm(qa, qb, None, None, False, torch.bfloat16)
    assert rounded.dtype is torch.bfloat16 and calc_diff(rounded, expected) < 5e-6  # 1.66e-3^2 / 2, worst case 2^-8.3


def exact_magnitudes(qa: QTensor, qb: QTensor) -> Tensor:
    """sum over K of |a b| in FP64."""
    return qa.dequantize().double().abs() @ qb.dequantize().double().abs().T


@backends
@pytest.mark.parametrize("K", [1024, 4096, 16384])
@pytest.mark.parametrize("kind", ["pow2", "fp32"])
@pytest.mark.parametrize("rows", [1, 16], ids=["vector", "matrix"])
def test_sum_of_positive_products_has_no_bias_however_long(backend: CpuBackend, K: int, kind: str, rows: int) -> None:
    # a kernel for vectors that sums in BF16 would stop growing at 2^8 of its terms; rows = 1 takes that kernel
    generator = torch.Generator().manual_seed(K)
    a, b = torch.rand(rows, K, generator=generator), torch.rand(16, K, generator=generator)
    left = reference.quantize(a, QuantSpec.parse("e4m3 1x128", kind))
    right = reference.quantize(b, QuantSpec.parse("e4m3 128x128", kind))
    expected = exact(left, right)
    for dtype in (torch.float32, torch.bfloat16):
        for one, other, wanted in ((left, right, expected), (right, left, expected.T)):
            y = backend.scaled_mm(one, other, None, None, False, dtype).double()
            assert abs(float((y - wanted).mean() / wanted.mean())) < 1e-3, dtype


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 16], ids=["vector", "matrix"])
def test_high_precision_product_sums_in_fp32(backend: CpuBackend, dtype: torch.dtype, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(size, 4096, generator=generator).to(dtype) for size in (rows, 24))
    expected = a.double() @ b.double().T
    y = backend.mm(a, b, None, None, False, torch.float32)
    # 4096 FP32 additions in any order: 4096 * 2^-24 at worst for terms of one sign
    assert y.dtype is torch.float32 and bool(((y - expected).abs() <= 4100 * 2.0**-24 * expected).all())
    rounded = backend.mm(a, b, None, None, False, torch.bfloat16)
    assert bool(((rounded - expected).abs() <= (2.0**-8 + 2.0**-11) * expected).all())
    # true FP32 products: with operands rounded to BF16 the error would be about 2^-9 / sqrt(4096) of the sum or more
    if dtype is torch.float32:
        assert calc_diff(y, expected) < 1e-12


@backends
def test_fp32_product_ignores_a_global_setting_of_lower_precision(backend: CpuBackend) -> None:
    a, b = matrix(32, 512, seed=1), matrix(32, 512, seed=2)
    before = backend.mm(a, b, None, None, False, torch.float32)
    kept = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        assert torch.equal(backend.mm(a, b, None, None, False, torch.float32), before)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # and restores what it found
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = kept


@backends
def test_bias_out_and_accumulate_equal_the_reference(backend: CpuBackend) -> None:
    for texts in (("e4m3 1x128 pow2", "e4m3 128x128 pow2"), ("e4m3 1x128 fp32", "e4m3 128x128 fp32")):
        qa, qb = operands(33, 40, 300, *texts)
        bias = torch.randn(40, generator=torch.Generator().manual_seed(0))
        plain = backend.scaled_mm(qa, qb, None, None, False, torch.float32)
        assert torch.equal(backend.scaled_mm(qa, qb, bias, None, False, torch.float32), plain + bias)
        assert torch.equal(backend.scaled_mm(qa, qb, bias, None, False, torch.bfloat16), (plain + bias).bfloat16())
        out = torch.full((33, 40), float("nan"))
        assert backend.scaled_mm(qa, qb, None, out, False, torch.float32) is out and torch.equal(out, plain)
        backend.scaled_mm(qa, qb, None, out, True, torch.float32)
        assert torch.equal(out, plain + plain)
        low = torch.zeros(33, 40, dtype=torch.bfloat16)
        backend.scaled_mm(qa, qb, None, low, False, torch.float32)
        assert torch.equal(low, plain.bfloat16())


@backends
@pytest.mark.parametrize("kind", ["pow2", "fp32"])
@pytest.mark.parametrize("exponents", [(100, -100), (-100, 90), (60, 40), (-55, -55), (49, -49)], ids=str)
def test_extreme_scales_give_the_reference_product(backend: CpuBackend, kind: str, exponents: tuple[int, int]) -> None:
    a, b = matrix(20, 300, seed=1), matrix(30, 300, seed=2)
    left = reference.quantize(a * 2.0 ** exponents[0], QuantSpec.parse("e4m3 1x128", kind))
    right = reference.quantize(b * 2.0 ** exponents[1], QuantSpec.parse("e4m3 128x128", kind))
    y = backend.scaled_mm(left, right, None, None, False, torch.float32)
    expected = reference.scaled_mm(left, right, out_dtype=torch.float32)
    # the bound of the order of sums; a product of scales below 2^-126 may lose bits, 2^-149 * 448^2 * 128 a block
    bound = 2 * 304 * 2.0**-24 * exact_magnitudes(left, right) + 3 * 2.0**-149 * 2.0**25
    assert bool(expected.isfinite().all()) and bool(((y.double() - expected.double()).abs() <= bound).all())


def test_scale_range_of_the_bf16_product_is_where_it_is_exact() -> None:
    # a decoded value must be a normal BF16 number; so must be its products, and sums of 2^14 of them, in FP32
    low, high = SCALE_RANGE
    smallest, largest = 2.0**-16 * low, 57344.0 * high
    assert smallest > 2.0**-126 and largest < 2.0**127
    assert largest * largest * 2.0**-4 < 2.0**128  # E5M2 times E5M2 at the top of both ranges
    assert smallest * largest > 2.0**-126


@backends
def test_nan_block_strikes_the_rows_that_read_it_only(backend: CpuBackend) -> None:
    for kind in ("pow2", "fp32"):
        a, b = matrix(20, 300, seed=1), matrix(140, 300, seed=2)
        a[3, 290], b[130, 5] = float("nan"), float("inf")
        qa = reference.quantize(a, QuantSpec.parse("e4m3 1x128", kind))
        qb = reference.quantize(b, QuantSpec.parse("e4m3 128x128", kind))
        for dtype in (torch.float32, torch.bfloat16):
            y = backend.scaled_mm(qa, qb, None, None, False, dtype)
            expected = torch.zeros(20, 140, dtype=torch.bool)
            expected[3] = True
            expected[:, 128:] = True
            assert torch.equal(y.isnan(), expected)


@quantisers
def test_codes_do_not_depend_on_the_number_of_threads(backend: CpuBackend) -> None:
    x = matrix(515, 700)
    spec, square = QuantSpec.parse("e4m3 1x128"), QuantSpec.parse("e4m3 128x128")
    threads = torch.get_num_threads()
    made = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            made.append((*backend.quantize_dual(x, spec, spec), *backend.quantize_square(x, square)))
    finally:
        torch.set_num_threads(threads)
    for one, three in zip(*made, strict=True):
        assert_same(three, one, "threads")


def test_threads_leave_the_precision_of_fp32_matmuls_as_it_was() -> None:
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    seen: list[str] = []

    def work(precision: str) -> None:
        for _ in range(300):
            with cpu._fp32_matmul(precision):
                time.sleep(0)  # gives the other thread its turn
                seen.append(precision if settings.fp32_precision == precision else "another's")

    threads = [threading.Thread(target=work, args=(precision,)) for precision in ("bf16", "ieee")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert settings.fp32_precision == before and set(seen) == {"bf16", "ieee"}
