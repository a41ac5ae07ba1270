"""The transpose of codes, byte for byte; interpreted where there is no GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install fp8train[triton]")
from fp8train.backends.admission_checks import check_transposes  # noqa: E402
from fp8train.backends.code_checks import MATRICES  # noqa: E402
from fp8train.kernels import transpose_codes as module  # noqa: E402
from fp8train.kernels.quantize_weight import quantize_weight  # noqa: E402
from fp8train.kernels.transpose_codes import FP8, transpose_codes  # noqa: E402
from tests.kernels.products import DEVICE, has_remedy  # noqa: E402
from tests.shapes import matrices, matrix  # noqa: E402


def every_byte(rows: int, cols: int, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of all kinds, NaN and negative zero too, and a scale of its own for each block."""
    generator = torch.Generator().manual_seed(rows + 1000 * cols)
    codes = torch.randint(0, 256, (rows, cols), dtype=torch.uint8, generator=generator).to(DEVICE).view(dtype)
    blocks = -(-rows // 128), -(-cols // 128)
    return codes, torch.arange(1.0, 1.0 + blocks[0] * blocks[1], device=DEVICE).view(blocks)


@matrices
def test_bytes_and_scales_are_transposed_for_every_shape(rows: int, cols: int) -> None:
    for dtype in FP8:
        codes, scale_inv = every_byte(rows, cols, dtype)
        turned, scale_inv_t = transpose_codes(codes, scale_inv)
        assert (turned.dtype, turned.stride(1) if rows > 1 else 1) == (dtype, 1)
        assert torch.equal(turned.view(torch.uint8), codes.view(torch.uint8).t())
        assert torch.equal(scale_inv_t, scale_inv.t()) and scale_inv_t.is_contiguous()


def test_it_is_what_quantising_a_weight_writes_beside_its_codes() -> None:
    w = matrix(300, 200).to(DEVICE)
    made = quantize_weight(w, fp8_dtype=torch.float8_e4m3fn, pow2=True)
    turned, scale_inv_t = transpose_codes(*made[:2])
    wanted, wanted_scale = made[2:]
    assert turned.stride() == wanted.stride() and torch.equal(turned.view(torch.uint8), wanted.view(torch.uint8))
    assert torch.equal(scale_inv_t, wanted_scale)


def test_rows_that_are_part_of_longer_ones_are_read_alone() -> None:
    codes, scale_inv = every_byte(200, 160)
    wide = torch.full((200, 250), 0x7F, dtype=torch.uint8, device=DEVICE)
    wide[:, 7:167] = codes.view(torch.uint8)
    turned, _ = transpose_codes(wide[:, 7:167].view(torch.float8_e4m3fn), scale_inv)
    assert torch.equal(turned.view(torch.uint8), codes.view(torch.uint8).t())


def test_what_fills_the_rows_is_zero() -> None:
    codes, scale_inv = every_byte(130, 5)
    turned, _ = transpose_codes(codes, scale_inv)
    whole = turned.view(torch.uint8).as_strided((5, turned.stride(0)), (turned.stride(0), 1))
    assert turned.stride(0) == 256 and not bool(whole[:, 130:].any())


def test_the_check_before_the_first_use_passes_and_sees_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device(DEVICE)
    assert check_transposes(device, MATRICES) is None

    def wrong(codes: torch.Tensor, scale_inv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        turned, scale_inv_t = transpose_codes(codes, scale_inv)
        turned.view(torch.uint8)[-1, -1] ^= 1
        return turned, scale_inv_t

    monkeypatch.setattr(module, "transpose_codes", wrong)
    reason = check_transposes(device, MATRICES)
    assert reason == "its codes or scales are not those of the transpose for [256, 384] float8_e4m3fn"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda q, s: (q.view(torch.uint8), s), r"qdata is \[256, 300\] torch.uint8; needs \[N, K\] in torch.float8"),
        (lambda q, s: (q.t(), s), r"qdata has strides \(1, 300\); needs \(any, 1\)"),
        (lambda q, s: (q, s.t()), r"scale_inv is \[3, 2\] torch.float32, strides \(1, 3\); needs \[2, 3\]"),
        (lambda q, s: (q, s.double()), r"scale_inv is \[2, 3\] torch.float64"),
    ],
)
def test_other_arguments_are_refused(fault: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"transpose_codes: {message}") as error:
        transpose_codes(*fault(*every_byte(256, 300)))  # type: ignore[operator]
    assert has_remedy(error)
