"""What takes the place of a kernel that was refused is right, and the backend says which were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install fp8train[triton]")
from fp8train.backends import get_backend  # noqa: E402
from fp8train.backends.admission import Admission  # noqa: E402
from fp8train.backends.kernel_codes import kernel  # noqa: E402
from fp8train.backends.producers import rotated  # noqa: E402
from fp8train.backends.reference import ReferenceBackend  # noqa: E402
from fp8train.backends.triton import TritonBackend  # noqa: E402
from fp8train.errors import BackendError  # noqa: E402
from fp8train.quant import reference  # noqa: E402
from fp8train.quant.formats import QuantSpec  # noqa: E402
from fp8train.quant.qtensor import QTensor  # noqa: E402
from tests.kernels.products import quantized  # noqa: E402
from tests.quant.specs import same_codes  # noqa: E402
from tests.shapes import matrix  # noqa: E402


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, reasons: dict[str, str | None]) -> list[str]:
    """Verdicts as if operands on the CPU were on a GPU; which were asked for."""
    asked: list[str] = []

    def admits(self: Admission, operation: str, entry: str, device: torch.device) -> bool:
        asked.append(entry)
        self._verdicts[operation, entry, 0] = reasons[entry]
        return reasons[entry] is None

    monkeypatch.setattr(Admission, "admits", admits)
    return asked


def test_the_backend_takes_the_next_entry_and_says_which_were_refused(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = on_a_gpu(monkeypatch, {"ws_128x128_s4": "it hung", "tma_64x128_s4": None, "pointer_64x64_s3": None})
    monkeypatch.setattr("fp8train.backends.triton._table_entries", lambda *shape: ("ws_128x128_s4", "tma_64x128_s4"))
    backend = TritonBackend()
    a, b = quantized(64, 128, "e4m3 1x128", 1), quantized(64, 128, "e4m3 128x128", 2)
    assert backend._entry("gemm", a, b) == "tma_64x128_s4" and backend._entry("gemm", a, b) == "tma_64x128_s4"
    assert asked == ["ws_128x128_s4", "tma_64x128_s4"]
    assert backend.note == "own FP8 kernels; refused on this machine: gemm ws_128x128_s4: it hung"
    a, b = quantized(64, 33, "e4m3 1x128", 1), quantized(64, 33, "e4m3 128x128", 2)
    assert backend._entry("gemm", a, b) == "pointer_64x64_s3" and asked[2:] == ["pointer_64x64_s3"], (
        "what fits is asked"
    )


def test_a_backend_of_one_entry_takes_it_or_says_why_not(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, {"ws_128x128_s4": None, "tma_64x128_s4": "it hung"})
    a, b = quantized(64, 128, "e4m3 1x128", 1), quantized(64, 128, "e4m3 128x128", 2)
    chosen = get_backend("triton:ws_128x128_s4")
    assert isinstance(chosen, TritonBackend) and chosen.note == "own FP8 kernels, GEMMs by ws_128x128_s4 only"
    assert chosen._entry("gemm", a, b) == "ws_128x128_s4"
    with pytest.raises(BackendError, match="backend: triton:tma_64x128_s4: gemm tma_64x128_s4: it hung"):
        TritonBackend("tma_64x128_s4")._entry("gemm", a, b)
    with pytest.raises(BackendError, match="backend: triton:ws_1x1: config is 'ws_1x1'; needs one of pointer"):
        TritonBackend("ws_1x1")._entry("gemm", a, b)


def test_refused_quantisers_give_way_to_what_is_right(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever kernels are refused, codes, scales and strides are the definition's; so is what fused ones compute."""
    row, square = QuantSpec.parse("e4m3 1x128"), QuantSpec.parse("e4m3 128x128")
    x, gate, up = (matrix(140, 270, seed=seed).bfloat16() for seed in range(3))
    weight, plain = torch.linspace(0.5, 1.5, 270), ReferenceBackend()
    h, dgate, dup = plain.swiglu(gate, up), *plain.swiglu_backward(x, gate, up)
    rstd = plain.rstd(x, 1e-5)
    norm, total = plain.rms_norm(x, weight, rstd, torch.bfloat16), plain.add_rstd(gate, up, 1e-5)
    gradients = plain.rms_norm_backward(up, x.float(), weight, rstd, gate.float(), torch.bfloat16)

    def everything(backend: TritonBackend) -> list[QTensor]:
        norm = backend.rmsnorm_quantize(x, weight, rstd, torch.bfloat16, row, row)
        dgate, dup, h_t = backend.swiglu_backward_quantize(x, gate, up, row, row, row)
        made = [*backend.quantize_dual(x, row, row), *backend.quantize_square(x.float(), square), *norm]
        return [*made, *backend.swiglu_quantize(gate, up, row, row), *dgate, *dup, h_t]

    by_kernels = everything(TritonBackend())
    sources = (norm, h, dgate, dup)
    fused = [reference.quantize(source, row, transpose=turned) for source in sources for turned in (False, True)]
    wanted = [*by_kernels[:4], *fused, fused[3]]
    for admitted in ([], [("quantize", "rows"), ("quantize_weight", "two_launches")]):
        asked = []

        def admits(
            self: Admission, op: str, name: str, device: torch.device, admitted: object = admitted, asked: Any = asked
        ) -> bool:
            asked.append((op, name))
            right = (op, name) in admitted  # type: ignore[operator]
            self._verdicts[op, name, 0] = None if right else "it loses bytes"
            return right

        monkeypatch.setattr(Admission, "admits", admits)
        backend = TritonBackend()
        for q, right, by_kernel in zip(everything(backend), wanted, by_kernels, strict=True):
            assert same_codes(q, right)
            assert (q.qdata.stride(), q.scale_inv.stride()) == (by_kernel.qdata.stride(), by_kernel.scale_inv.stride())
        made = (backend.rms_norm(x, weight, rstd, torch.bfloat16), backend.rstd(x, 1e-5), backend.swiglu(gate, up))
        made += (*backend.swiglu_backward(x, gate, up), *backend.add_rstd(gate, up, 1e-5))
        made += backend.rms_norm_backward(up, x.float(), weight, rstd, gate.float(), torch.bfloat16)
        assert all(map(torch.equal, made, (norm, rstd, h, dgate, dup, *total, *gradients)))
        assert (backend.counters(x, row) is None) is (not admitted) and backend.counters(x.float(), square) is None
        assert len(asked) == len(set(asked)), "each is asked once"
        assert "swiglu_quantize bf16: it loses bytes" in backend.note


@pytest.mark.parametrize("operation", ["quantize", "rmsnorm_quantize", "swiglu_quantize", "swiglu_backward_quantize"])
def test_a_kernel_that_takes_words_gives_way_to_the_plain_one(
    operation: str, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "dual" if operation == "quantize" else "bf16"
    asked = on_a_gpu(monkeypatch, {name: "it loses bytes", f"{name}_plain": None})
    module, launched, called = kernel(operation), [], "quantize_dual" if operation == "quantize" else operation
    run = getattr(module, called)
    monkeypatch.setattr(module, called, lambda *x, **more: (launched.append(more), run(*x, **more))[1])
    backend, row = TritonBackend(), QuantSpec.parse("e4m3 1x128")
    x, gate, up = (matrix(128, 256, seed=seed).bfloat16() for seed in range(3))
    if operation == "quantize":
        sources, copies = [x], [backend.quantize_dual(x, row, row)]
    elif operation == "rmsnorm_quantize":
        norm = torch.linspace(0.5, 1.5, 256), ReferenceBackend().rstd(x, 1e-5), torch.bfloat16
        sources, copies = [backend.rms_norm(x, *norm)], [backend.rmsnorm_quantize(x, *norm, row, row)]
    elif operation == "swiglu_quantize":
        sources, copies = [backend.swiglu(gate, up)], [backend.swiglu_quantize(gate, up, row, row)]
    else:
        sources = list(backend.swiglu_backward(x, gate, up))
        *copies, h_t = backend.swiglu_backward_quantize(x, gate, up, row, row, row)
        h = kernel("swiglu_quantize").swiglu(gate, up)
        assert same_codes(h_t, reference.quantize(h, row, transpose=True))
    for source, pair in zip(sources, copies, strict=True):
        for q, turned in zip(pair, (False, True), strict=True):
            assert q is not None and same_codes(q, reference.quantize(source, row, transpose=turned))
    assert asked == [name, f"{name}_plain"] and [more["words"] for more in launched] == [False]


@pytest.mark.parametrize("refused", [False, True], ids=["admitted", "refused"])
def test_a_refused_rotation_gives_way_to_the_formula(
    refused: bool, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = on_a_gpu(monkeypatch, {"bf16": "it rounds twice" if refused else None})
    module, launched = kernel("rope"), []
    run = module.rope
    monkeypatch.setattr(module, "rope", lambda *args, **options: (launched.append(1), run(*args, **options))[1])
    backend, x = TritonBackend(), matrix(120, 16, seed=1).bfloat16().view(2, 20, 3, 16).transpose(1, 2)
    cos, sin = matrix(40, 8, seed=2).view(2, 20, 8)
    for inverse in (False, True):
        made = backend.rope(x, cos, sin, torch.bfloat16, inverse)
        wanted = rotated(x, cos, sin, torch.bfloat16, inverse)
        assert torch.equal(made, wanted) and made.stride() == wanted.stride()
    assert asked == ["bf16"] and len(launched) == (0 if refused else 2)
    said = "own FP8 kernels; refused on this machine: rope bf16: it rounds twice" if refused else "own FP8 kernels"
    assert backend.note == said
