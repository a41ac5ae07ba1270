"""The Triton backend on the kernels themselves, interpreted where there is no GPU; and through the operators."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="needs Triton: pip install fp8train[triton]")
from fp8train.backends import get_backend, triton  # noqa: E402
from fp8train.backends import ops as _ops  # noqa: E402, F401  registers torch.ops.fp8train
from fp8train.backends.triton import TritonBackend  # noqa: E402
from fp8train.nn.linear import Float8Linear  # noqa: E402
from fp8train.quant import reference  # noqa: E402
from fp8train.quant.formats import BLOCKWISE, QuantSpec  # noqa: E402
from tests.backends.test_gpu_backends import assert_products  # noqa: E402
from tests.kernels.products import DEVICE, assert_product, quantized  # noqa: E402
from tests.quant.specs import SPECS, same_codes  # noqa: E402
from tests.shapes import matrix  # noqa: E402

TRITON = get_backend("triton")


@pytest.mark.skipif(
    DEVICE != "cpu", reason="the products' tolerances are those of the interpreter; the kernels' own tests ran"
)
@pytest.mark.parametrize("right", ["e4m3 128x128", "e4m3 1x128", "e4m3 1x32"])
@pytest.mark.parametrize(("M", "N", "K"), [(64, 48, 144), (33, 50, 300), (0, 5, 128), (5, 6, 0)])
def test_products_with_every_output(M: int, N: int, K: int, right: str) -> None:
    assert_products(TRITON, M, N, K, "e4m3 1x128", right)


@pytest.mark.parametrize(("text", "layout"), [(text, "row-major") for text in SPECS] + [(SPECS[4], "column-major")])
def test_codes_of_every_granularity_equal_the_reference(text: str, layout: str) -> None:
    spec = QuantSpec.parse(text)
    x = matrix(140, 270, layout=layout)
    for transpose in (False, True):
        made = TRITON.quantize(x.to(DEVICE), spec, transpose)
        assert same_codes(_to_cpu(made), reference.quantize(x, spec, transpose=transpose))
    made, turned = TRITON.quantize_dual(x.to(DEVICE), spec, spec)
    assert same_codes(_to_cpu(made), reference.quantize(x, spec))
    assert same_codes(_to_cpu(turned), reference.quantize(x, spec, transpose=True))
    if spec.transposable:
        made, turned = TRITON.quantize_square(x.to(DEVICE), spec)
        assert same_codes(_to_cpu(turned), _to_cpu(made).transpose())


def _to_cpu(q: reference.QTensor) -> reference.QTensor:
    return reference.QTensor(q.qdata.cpu(), q.scale_inv.cpu(), q.spec)


def test_operators_reach_the_kernels() -> None:
    row, square = "e4m3 1x128 pow2", "e4m3 128x128 pow2"
    a, b = quantized(33, 144, row, 1), quantized(40, 144, square, 2)
    operands = (a.qdata, a.scale_inv, row, b.qdata, b.scale_inv, square)
    y = torch.ops.fp8train.scaled_mm(*operands, None, torch.float32, "triton", 0, "fprop")
    assert_product(y, a, b)
    c = quantized(40, 144, row, 3)
    out = torch.ones(33, 40, device=DEVICE)
    torch.ops.fp8train.scaled_mm_add_(out, *operands[:3], c.qdata, c.scale_inv, row, "triton", 0, "wgrad")
    assert_product(out, a, c, torch.ones(33, 40, device=DEVICE))


def test_a_bias_that_is_a_column_of_a_matrix_is_added_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonBackend, "unavailable", lambda self, device_type: None)
    plain, column, made = torch.nn.Linear(144, 40, device=DEVICE), matrix(40, 2)[:, 0].to(DEVICE), []
    for bias in (column, column.clone()):
        plain.bias = torch.nn.Parameter(bias)
        assert plain.bias.stride() == bias.stride()
        made.append(Float8Linear.from_linear(plain, BLOCKWISE, "triton")(matrix(33, 144).to(DEVICE)))
    assert column.stride() == (2,) and torch.equal(made[0], made[1])


@pytest.mark.parametrize(("rows", "cols"), [(128, 128), (140, 270), (33, 16), (1, 300)])
@pytest.mark.parametrize("text", ["e4m3 1x128 pow2", "e4m3 128x128 pow2", "e4m3 row fp32"])
def test_fakes_promise_the_strides_that_the_kernels_return(text: str, rows: int, cols: int) -> None:
    x = matrix(rows, cols).to(DEVICE)
    for op, arguments in (
        (torch.ops.fp8train.quantize, (text, False, "triton")),
        (torch.ops.fp8train.quantize, (text, True, "triton")),
        (torch.ops.fp8train.quantize, (text, False, "triton:pointer_64x64_s3")),
        (torch.ops.fp8train.quantize_dual, (text, text, "triton")),
    ):
        made = op(x, *arguments)
        with FakeTensorMode() as mode:
            promised = op(mode.from_tensor(x), *arguments)
        for real, fake in zip(made, promised, strict=True):
            assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


class Verdicts:
    """In place of Admission: answers from a table, and counts what it is asked. None: there is no verdict."""

    def __init__(self, admitted: dict[str, bool | None]) -> None:
        self.admitted, self.asked = admitted, []

    @property
    def refused(self) -> list[str]:
        return [f"gemm {entry}: it hung" for entry, good in self.admitted.items() if good is False]

    def admits(self, operation: str, entry: str, device: torch.device) -> bool:
        self.asked.append(entry)
        return bool(self.admitted.get(entry.split()[0]))


@pytest.fixture
def chooser(monkeypatch: pytest.MonkeyPatch) -> TritonBackend:
    """A backend that may take tma_128x128_s4, and to which ws_128x128_s4 is refused."""
    monkeypatch.setattr(triton, "_table_entries", lambda *shape: ("ws_128x128_s4", "tma_128x128_s4"))
    monkeypatch.setattr(triton, "_measured", lambda device: None)
    backend = TritonBackend()
    backend._admission = Verdicts({"ws_128x128_s4": False, "tma_128x128_s4": True})  # type: ignore[assignment]
    return backend


def operand(rows: int, cols: int, **properties: Any) -> Any:
    """As much of a QTensor on a GPU as the choice of an entry looks at."""
    device, spec = torch.device("cuda", 0), QuantSpec.parse(f"{properties.get('format', 'e4m3')} 1x128")

    def matrix(stride: int, address: int) -> Any:
        layout = {"shape": (rows, cols), "stride": lambda *axis: (stride, 1)[axis[0]] if axis else (stride, 1)}
        return SimpleNamespace(device=device, dtype=spec.format.dtype, data_ptr=lambda: address, **layout)

    codes = matrix(properties.get("stride", cols), properties.get("address", 0))
    scale = matrix(1, properties.get("scale_address", 0))
    return SimpleNamespace(qdata=codes, scale_inv=scale, shape=(rows, cols), spec=spec)


def test_entry_is_chosen_once_for_operands_of_a_kind(chooser: TritonBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    looks: list[str] = []
    monkeypatch.setattr(triton.kernel("gemm"), "refusal", lambda entry, *operands: looks.append(entry))
    for _ in range(3):
        assert chooser._entry("gemm", operand(256, 512), operand(384, 512)) == "tma_128x128_s4"
    asked = chooser._admission.asked  # type: ignore[attr-defined]
    assert asked == looks == ["ws_128x128_s4", "tma_128x128_s4"]
    assert chooser.note == "own FP8 kernels; refused on this machine: gemm ws_128x128_s4: it hung"
    del chooser.note  # written where something is refused, and not in every call
    chooser._entry("gemm", operand(256, 512), operand(384, 512))
    assert "note" not in vars(chooser)


@pytest.mark.parametrize(
    "other",
    [{"stride": 520}, {"address": 8}, {"scale_address": 4}, {"rows": 300}, {"format": "e5m2"}],
    ids=["stride", "alignment", "scale's alignment", "size", "format"],
)
def test_operands_of_another_kind_are_looked_at_anew(
    other: dict[str, Any], chooser: TritonBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    looks: list[str] = []
    for name in ("gemm", "gemm_wgrad"):
        monkeypatch.setattr(triton.kernel(name), "refusal", lambda entry, *operands: looks.append(entry))
    chooser._entry("gemm", operand(256, 512), operand(384, 512))
    chooser._entry("gemm", operand(256, 512), operand(**{"rows": 384, "cols": 512} | other))
    assert len(looks) == 4
    chooser._entry("gemm_wgrad", operand(256, 512), operand(384, 512))
    chooser._entry("gemm", operand(256, 512), operand(384, 512))
    assert len(looks) == 6 and len(chooser._entries) == 3


def test_what_a_captured_graph_takes_is_not_kept(chooser: TritonBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    # an entry without a verdict is not checked while a graph is captured; afterwards it is
    verdicts = chooser._admission.admitted  # type: ignore[attr-defined]
    monkeypatch.setattr(triton.kernel("gemm"), "refusal", lambda entry, *operands: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    verdicts.update({"ws_128x128_s4": None, "tma_128x128_s4": None})
    assert chooser._entry("gemm", operand(256, 512), operand(384, 512)) is None
    assert chooser._entries == {} and chooser.note == "own FP8 kernels"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    verdicts["ws_128x128_s4"] = True
    assert chooser._entry("gemm", operand(256, 512), operand(384, 512)) == "ws_128x128_s4"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: pytest.fail("asked again"))
    assert chooser._entry("gemm", operand(256, 512), operand(384, 512)) == "ws_128x128_s4"


@pytest.mark.parametrize(
    ("cols", "admitted", "asked"),
    [
        (272, "tma_128x128_s4", ["ws_128x128_s4", "tma_128x128_s4"]),
        (272, "pointer_64x64_s3", ["ws_128x128_s4", "tma_128x128_s4", "pointer_64x64_s3"]),
        (272, None, ["ws_128x128_s4", "tma_128x128_s4", "pointer_64x64_s3"]),
        (303, "pointer_64x64_s3", ["pointer_64x64_s3"]),
        (303, None, ["pointer_64x64_s3"]),
    ],
)
def test_no_refused_entry_multiplies(
    cols: int, admitted: str | None, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the table's entries the plain ones are asked; where all are refused, torch multiplies."""
    monkeypatch.setattr(triton, "_table_entries", lambda *shape: ("ws_128x128_s4",))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name, right in (("gemm", "e4m3 128x128"), ("gemm_wgrad", "e4m3 1x128")):
        backend, module, launched = TritonBackend(), triton.kernel(name), []
        verdicts = dict.fromkeys(("ws_128x128_s4", *module.PLAIN), False) | ({admitted: True} if admitted else {})
        backend._admission = Verdicts(verdicts)  # type: ignore[assignment]
        run = getattr(module, name)

        def launch(*operands: Any, config: str, run: Any = run, launched: Any = launched, **options: Any) -> Any:
            launched.append(config)
            return run(*operands, config=config, **options)

        monkeypatch.setattr(module, name, launch)
        a, b = quantized(40, cols, "e4m3 1x128", 1), quantized(33, cols, right, 2)
        for kind in ("pow2", "fp32"):
            out = torch.ones(40, 33, device=DEVICE)
            specs = [
                QuantSpec(q.spec.format, q.spec.block, kind) for q in (a, b)
            ]  # pow2: decoded whole; fp32: by block
            scaled = [reference.QTensor(q.qdata, q.scale_inv, s) for q, s in zip((a, b), specs, strict=True)]
            assert_product(backend.scaled_mm(*scaled, None, None, False, torch.float32), a, b)
            assert_product(backend.scaled_mm(*scaled, None, out, True, torch.float32), a, b, torch.ones_like(out))
        assert launched == [admitted] * 4 if admitted else not launched
        assert backend._admission.asked == asked  # type: ignore[attr-defined]
        assert backend.note.endswith(f"; {name} by torch on decoded operands") is (admitted is None)
        assert backend.decoded == ((name,) if admitted is None else ())


def test_choices_are_forgotten_before_they_fill_the_memory(
    chooser: TritonBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    # batches of ever other lengths
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(triton.kernel("gemm"), "refusal", lambda entry, *operands: None)
    monkeypatch.setattr(triton, "MOST_SHAPES", 3)
    for rows in range(1, 9):
        assert chooser._entry("gemm", operand(rows, 512), operand(384, 512)) == "tma_128x128_s4"
        assert len(chooser._entries) <= 3
