"""Backends for GPUs, as far as a machine without one can show: who serves what, why not, what a vendor is handed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8train.backends import get_backend, select_backend, torchao
from fp8train.backends.interface import Backend
from fp8train.backends.kernel_codes import codes_like
from fp8train.backends.triton import BELOW, OLDEST
from fp8train.backends.vendor import imported
from fp8train.errors import BackendError
from fp8train.quant import reference
from fp8train.quant.formats import BF16, BLOCKWISE, GemmPrecision, LinearPrecision, QuantSpec
from fp8train.quant.qtensor import QTensor
from tests.backends import vendor_doubles
from tests.hardware import requires_gpu
from tests.quant.specs import same_codes
from tests.quant.test_reference_gemm import calc_diff, exact, operands
from tests.shapes import matrix
from tests.source_tree import ROOT

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # before a fixture says that there is a GPU
GPU_BACKENDS = ("triton", "cublaslt", "te", "deepgemm", "torchao")
VENDORS = ("cublaslt", "te", "deepgemm", "torchao")
BLOCK_PAIRS = {
    "fprop": ("e4m3 1x128 pow2", "e4m3 128x128 pow2"),
    "fprop-fp32": ("e4m3 1x128 fp32", "e4m3 128x128 fp32"),
    "wgrad": ("e4m3 1x128 pow2", "e4m3 1x128 pow2"),
}
WHOLE_PAIRS = {
    "tensorwise": ("e4m3 tensor fp32", "e4m3 tensor fp32"),
    "rowwise": ("e4m3 row fp32", "e4m3 row fp32"),
}
block_pairs = pytest.mark.parametrize(("left", "right"), list(BLOCK_PAIRS.values()), ids=list(BLOCK_PAIRS))
shapes = pytest.mark.parametrize(
    ("M", "N", "K"), [(128, 128, 128), (33, 50, 300), (4, 144, 272), (0, 5, 128), (5, 6, 0)]
)
BF16_CALC_DIFF = 5e-6  # rounding to BF16 costs 1.3e-6


def precision(text: str, other: str | None = None) -> LinearPrecision:
    gemm = GemmPrecision(QuantSpec.parse(text), QuantSpec.parse(other or text))
    return LinearPrecision("fp8", fprop=gemm, dgrad=gemm, wgrad=gemm)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """torch sees one GPU of the compute capability in the marker's parameter, Hopper by default."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: getattr(request, "param", (9, 0)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Test GPU")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "12.9")


@pytest.mark.parametrize("name", GPU_BACKENDS)
def test_a_model_on_a_cpu_is_refused(name: str) -> None:
    with pytest.raises(
        BackendError, match=f"{name} cannot be used: it computes on NVIDIA GPUs, and the model is on cpu"
    ):
        select_backend(name, "cpu", [BLOCKWISE])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")
@pytest.mark.parametrize("name", [*GPU_BACKENDS, "dequant_bf16"])
def test_a_machine_without_a_gpu_is_refused(name: str) -> None:
    with pytest.raises(BackendError, match=f"{name} cannot be used: torch .* finds no CUDA GPU"):
        select_backend(name, "cuda", [BLOCKWISE])


@pytest.mark.parametrize("gpu", [(8, 6)], indirect=True)
@pytest.mark.parametrize("name", ["triton", "cublaslt"])
def test_a_gpu_without_fp8_is_refused_by_name(gpu: None, name: str) -> None:
    with pytest.raises(BackendError, match="NVIDIA Test GPU is sm_86; needs sm_89 or newer"):
        select_backend(name, "cuda", [BLOCKWISE])


@pytest.mark.parametrize("gpu", [(8, 0)], indirect=True)
def test_auto_on_a_gpu_without_fp8_decodes_to_bf16_and_says_why(gpu: None) -> None:
    chosen = select_backend("auto", "cuda", [BLOCKWISE, BF16])
    assert chosen.backend.name == "dequant_bf16"
    assert "triton: NVIDIA Test GPU is sm_80" in chosen.reason and "nothing is faster than BF16" in chosen.reason


def test_auto_on_hopper_is_triton(gpu: None) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    for wanted in (
        BLOCKWISE,
        precision("e4m3 tensor"),
        precision("e4m3 row fp32"),
        precision("e5m2 1x128", "e4m3 128x128"),
    ):
        assert select_backend("auto", "cuda", [wanted, BF16]).backend.name == "triton"


def test_auto_without_kernels_for_a_recipe_names_the_gemm(gpu: None) -> None:
    chosen = select_backend("auto", "cuda", [precision("e4m3 1x32")])
    assert chosen.backend.name == "dequant_bf16"
    assert "no FP8 GEMM for fprop of 'fp8', e4m3 1x32 pow2 * e4m3 1x32 pow2; it has 1x128 * 128x128" in chosen.reason


def test_pyproject_asks_for_the_versions_of_triton_that_are_served() -> None:
    oldest, below = (".".join(map(str, version)) for version in (OLDEST, BELOW))
    assert f'"triton>={oldest},<{below};' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("version", "message"),
    [("3.5.1", "Triton 3.5.1 is too old; needs 3.6 to 3.9"), ("3.10.0", "Triton 3.10.0 is newer")],
)
def test_other_versions_of_triton_are_refused(
    gpu: None, monkeypatch: pytest.MonkeyPatch, version: str, message: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(BackendError, match=message):
        select_backend("triton", "cuda", [BLOCKWISE])
    assert select_backend("auto", "cuda", [BLOCKWISE]).backend.name == (
        "cublaslt" if hasattr(torch.nn.functional, "scaled_mm") else "dequant_bf16"
    )


def test_missing_triton_is_refused(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"Triton is not installed; pip install fp8train\[triton\]"):
        select_backend("triton", "cuda", [BLOCKWISE])


def test_cublaslt_before_cuda_12_9_serves_no_blocks(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(BackendError, match="built for CUDA 12.8; needs 12.9"):
        select_backend("cublaslt", "cuda", [BLOCKWISE])
    assert select_backend("cublaslt", "cuda", [precision("e4m3 row fp32")])


@pytest.mark.parametrize("gpu", [(10, 0)], indirect=True)
def test_cublaslt_blocks_need_hopper(gpu: None) -> None:
    with pytest.raises(BackendError, match=r"NVIDIA Test GPU is not a Hopper GPU"):
        select_backend("cublaslt", "cuda", [BLOCKWISE])


@pytest.mark.parametrize("name", ["triton", "cublaslt"])
def test_e5m2_by_e5m2_has_no_tensorwise_gemm(gpu: None, name: str) -> None:
    with pytest.raises(BackendError, match="cuBLASLt multiplies no E5M2 by E5M2"):
        select_backend(name, "cuda", [precision("e5m2 tensor")])


def test_missing_vendors_are_named_with_their_remedy(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_gemm", None)
    monkeypatch.setitem(sys.modules, "transformer_engine_torch", None)
    with pytest.raises(BackendError, match="import of deep_gemm|deep_gemm is not installed.*DeepGEMM"):
        select_backend("deepgemm", "cuda", [BLOCKWISE])
    with pytest.raises(BackendError, match="pip install --no-build-isolation 'transformer-engine"):
        select_backend("te", "cuda", [BLOCKWISE])


def test_an_import_that_fails_in_any_way_is_a_reason(
    gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "transformer_engine_torch.py").write_text(
        "raise RuntimeError('Found empty meta package installed.\\nhelp')"
    )
    (tmp_path / "deep_gemm.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        BackendError, match=r"import of transformer_engine_torch failed: Found empty meta package installed\.;"
    ):
        select_backend("te", "cuda", [BLOCKWISE])
    with pytest.raises(BackendError, match="has no fp8_gemm_nt; needs DeepGEMM 2.0"):
        select_backend("deepgemm", "cuda", [BLOCKWISE])
    sys.modules.pop("deep_gemm", None)


@pytest.fixture
def torchao_is_not_loaded(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)


def test_missing_torchao_is_named_with_its_remedy(torchao_is_not_loaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    wanted = r"torchao cannot be used: torchao.* is not installed; pip install fp8train\[triton\] 'torchao>=0.17'"
    with pytest.raises(BackendError, match=wanted):
        select_backend("torchao", "cuda", [BLOCKWISE])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"torchao\.prototype is not installed; pip install .*'torchao>=0.17'"),
        ("raise ValueError('key contains names that are not kernel arguments: num_elements')",  # 0.16 with Triton 3.9
         r"import of torchao\..*\.kernels failed: key contains names .*; pip install .*'torchao>=0.17'"),
    ],
    ids=["0.11", "0.16"],
)  # fmt: skip
def test_versions_of_torchao_that_cannot_be_imported_are_refused(
    torchao_is_not_loaded: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(BackendError, match=message):
        select_backend("torchao", "cuda", [BLOCKWISE])
    sys.modules.pop("torchao", None)


def test_a_torchao_without_the_gemms_is_refused(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType(torchao.KERNELS)
    module.triton_fp8_gemm_1x128_128x128 = None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, torchao.KERNELS, module)
    with pytest.raises(BackendError, match="has no triton_fp8_gemm_1x128_128x1; needs torchao 0.17 or newer"):
        select_backend("torchao", "cuda", [BLOCKWISE])


@pytest.fixture
def vendors(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All vendors are there, as doubles that read memory as the real ones do."""
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", vendor_doubles.scaled_mm)
    monkeypatch.setitem(sys.modules, "deep_gemm", vendor_doubles.deep_gemm())
    monkeypatch.setitem(sys.modules, torchao.KERNELS, vendor_doubles.torchao_kernels())
    for name, module in vendor_doubles.transformer_engine().items():
        monkeypatch.setitem(sys.modules, name, module)


def assert_products(backend: Backend, M: int, N: int, K: int, left: str, right: str) -> None:
    a, b = operands(M, N, K, left, right)
    expected, bias, before = exact(a, b), matrix(1, N, seed=3)[0], matrix(M, N, seed=4)
    low = backend.scaled_mm(a, b, None, None, False, torch.bfloat16)
    assert low.shape == (M, N) and low.dtype is torch.bfloat16 and calc_diff(low, expected) < BF16_CALC_DIFF

    def close(y: Tensor, plus: Tensor) -> bool:
        # FP32 sums of codes and a few roundings of the result: 1e-7 relative, squared
        return y.dtype is torch.float32 and calc_diff(y, expected + plus.double()) < 1e-12

    assert close(backend.scaled_mm(a, b, bias, None, False, torch.float32), bias)
    out = torch.full((M, N), float("nan"))
    assert backend.scaled_mm(a, b, None, out, False, torch.float32) is out and close(out, torch.zeros(()))
    out = before.clone()
    assert backend.scaled_mm(a, b, None, out, True, torch.float32) is out and close(out, before)
    rounded = backend.scaled_mm(a, b, bias, None, False, torch.bfloat16)
    assert calc_diff(rounded, expected + bias.double()) < BF16_CALC_DIFF


@block_pairs
@shapes
@pytest.mark.parametrize("name", VENDORS)
def test_vendors_are_handed_operands_in_their_layout(
    vendors: None, name: str, M: int, N: int, K: int, left: str, right: str
) -> None:
    assert get_backend(name).unavailable("cuda") is None
    assert_products(get_backend(name), M, N, K, left, right)


@pytest.mark.parametrize(("N", "K"), [(200, 60), (60, 300)])
@pytest.mark.parametrize("name", VENDORS)
def test_vendors_take_a_transposed_weight_whose_scales_have_other_strides(
    vendors: None, name: str, N: int, K: int
) -> None:
    """Of one block the stride says nothing: [ceil(N/128), 1] turned round has strides (1, ceil(N/128))."""
    a, _ = operands(33, N, K, *BLOCK_PAIRS["fprop"])
    b = reference.quantize(matrix(K, N, seed=2), QuantSpec.parse("e4m3 128x128 pow2")).transpose()
    y = get_backend(name).scaled_mm(a, b, None, None, False, torch.bfloat16)
    assert y.shape == (33, N) and calc_diff(y, exact(a, b)) < BF16_CALC_DIFF


@block_pairs
def test_torchao_reads_scales_of_our_kernels_in_place(
    vendors: None, monkeypatch: pytest.MonkeyPatch, left: str, right: str
) -> None:
    def in_place(q: QTensor) -> QTensor:
        codes, scale_inv = codes_like(q.scale_inv, q.spec, *q.shape, False)
        return QTensor(codes.copy_(q.qdata), scale_inv.copy_(q.scale_inv), q.spec)

    handed: list[Tensor] = []

    def watch(*tensors: Tensor, **options: Any) -> Tensor:
        handed.extend(tensors)
        return multiply(*tensors, **options)

    kernels = sys.modules[torchao.KERNELS]
    name = torchao.SQUARE if "128x128" in right else torchao.ROWS
    multiply = getattr(kernels, name)
    monkeypatch.setattr(kernels, name, watch)
    a, b = map(in_place, operands(300, 200, 256, left, right))
    assert calc_diff(get_backend("torchao").scaled_mm(a, b, None, None, False, torch.float32), exact(a, b)) < 1e-12
    ours = (a.qdata, b.qdata, a.scale_inv, b.scale_inv)
    assert [tensor.data_ptr() for tensor in handed] == [tensor.data_ptr() for tensor in ours]


@pytest.mark.parametrize(("M", "N", "K"), [(257, 5, 4), (5, 257, 4), (200, 200, 4)], ids=["left", "right", "product"])
def test_torchao_is_handed_nothing_that_its_offsets_cannot_reach(
    vendors: None, monkeypatch: pytest.MonkeyPatch, M: int, N: int, K: int
) -> None:
    """They are 32 bits wide, here 15. Without its GEMMs the product can only be the decoded one."""
    monkeypatch.setattr(torchao, "ADDRESSED", 2**15)
    monkeypatch.setitem(sys.modules, torchao.KERNELS, ModuleType(torchao.KERNELS))
    assert_products(get_backend("torchao"), M, N, K, *BLOCK_PAIRS["wgrad"])


@block_pairs
@pytest.mark.parametrize(("M", "N", "K"), [(33, 50, 300), (300, 260, 130)])
def test_torchao_itself_returns_what_its_double_does(
    monkeypatch: pytest.MonkeyPatch, M: int, N: int, K: int, left: str, right: str
) -> None:
    """On a GPU as it is; without one by Triton's interpreter, which cannot time six tilings: by the last of them."""
    backend, kernels = get_backend("torchao"), imported(torchao.KERNELS)
    reason = kernels if isinstance(kernels, str) else backend.unavailable("cuda") if DEVICE == "cuda" else None
    if reason:
        pytest.skip(f"needs torchao: {reason}")
    if DEVICE == "cuda":
        a, b = operands(M, N, K, left, right)
        y = backend.scaled_mm(on_gpu(a), on_gpu(b), None, None, False, torch.bfloat16)
        assert y.shape == (M, N) and calc_diff(y.cpu(), exact(a, b)) < BF16_CALC_DIFF
        return
    for name in (torchao.SQUARE, torchao.ROWS):
        kernel = getattr(kernels, f"{name}_kernel")
        monkeypatch.setattr(kernel, "configs", kernel.configs[-1:])
    assert_products(backend, M, N, K, left, right)


@pytest.mark.parametrize(("left", "right"), [*BLOCK_PAIRS.values(), *WHOLE_PAIRS.values(), ("e4m3 1x32", "e5m2 row")])
@shapes
def test_dequant_bf16_products(M: int, N: int, K: int, left: str, right: str) -> None:
    assert_products(get_backend("dequant_bf16"), M, N, K, left, right)


@pytest.mark.parametrize(("left", "right"), list(WHOLE_PAIRS.values()), ids=list(WHOLE_PAIRS))
@shapes
def test_cublas_products_of_whole_tensors_and_rows(M: int, N: int, K: int, left: str, right: str) -> None:
    """On a CPU by torch's own implementation of the same function."""
    if torch.__version__ < "2.13":
        pytest.skip(f"torch {torch.__version__} has no _scaled_mm for CPUs")
    assert_products(get_backend("cublaslt"), M, N, K, left, right)


@requires_gpu(sm=90)
@pytest.mark.parametrize(("left", "right"), [*WHOLE_PAIRS.values(), *BLOCK_PAIRS.values()])
@pytest.mark.parametrize(("M", "N", "K"), [(128, 128, 128), (33, 50, 300), (0, 5, 128)])
def test_cublas_products_on_a_gpu(M: int, N: int, K: int, left: str, right: str) -> None:
    a, b = operands(M, N, K, left, right)
    y = get_backend("cublaslt").scaled_mm(on_gpu(a), on_gpu(b), None, None, False, torch.bfloat16)
    assert y.shape == (M, N) and (0 in y.shape or calc_diff(y.cpu(), exact(a, b)) < BF16_CALC_DIFF)


def on_gpu(q: QTensor) -> QTensor:
    return QTensor(q.qdata.cuda(), q.scale_inv.cuda(), q.spec)


@pytest.mark.parametrize("text", ["e4m3 1x128 pow2", "e4m3 1x128 fp32", "e4m3 128x128 pow2", "e4m3 row fp32"])
@pytest.mark.parametrize(("rows", "cols"), [(128, 256), (303, 300), (0, 128)])
def test_te_quantiser_returns_the_definitions_codes(vendors: None, text: str, rows: int, cols: int) -> None:
    # sizes that TE does not serve go to our own kernels, which on a GPU want x there
    device = DEVICE if rows % 128 else "cpu"
    backend, spec, x = get_backend("te"), QuantSpec.parse(text), matrix(rows, cols).to(device)
    for transpose in (False, True):
        assert same_codes(backend.quantize(x, spec, transpose), reference.quantize(x, spec, transpose=transpose))
    made, turned = backend.quantize_dual(x, spec, spec)
    assert same_codes(made, reference.quantize(x, spec))
    assert same_codes(turned, reference.quantize(x, spec, transpose=True))
    if spec.block == (128, 128):
        made, turned = backend.quantize_square(x, spec)
        assert same_codes(made, reference.quantize(x, spec)) and same_codes(turned, made.transpose())


def test_high_precision_products_sum_in_fp32() -> None:
    a, b = torch.ones(1, 512, dtype=torch.bfloat16), torch.ones(1, 512, dtype=torch.bfloat16)
    a[0, 0] = 2.0**12  # in BF16 4096 + 1 is 4096
    for name in ("dequant_bf16", "triton", "cublaslt"):
        assert float(get_backend(name).mm(a, b, None, None, False, torch.float32)) == 4096 + 511
        out = torch.ones(1, 1)
        assert get_backend(name).mm(a, b, None, out, True, torch.float32) is out and float(out) == 4096 + 512
