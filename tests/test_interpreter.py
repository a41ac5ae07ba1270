from __future__ import annotations

import os

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton: pip install fp8train[triton]")
import triton.language as tl  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run on the GPU here; the interpreter is not in use"
)

FORMATS = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
formats = pytest.mark.parametrize("dtype", list(FORMATS), ids=["e4m3", "e5m2"])


@triton.jit
def _cast_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at).to(y_ptr.dtype.element_ty))


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.zeros(x.shape, dtype=dtype)
    _cast_kernel[(x.numel() // 4096,)](x, y, BLOCK=4096)
    return y


def all_bf16() -> torch.Tensor:
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).to(torch.float32)


@formats
def test_interpreted_cast_to_fp8_rounds_to_nearest_even_and_saturates(dtype: torch.dtype) -> None:
    x = all_bf16()
    numbers = ~x.isnan()
    want = x.clamp(-FORMATS[dtype], FORMATS[dtype]).to(dtype).view(torch.uint8)
    got = cast(x, dtype)
    assert torch.equal(got.view(torch.uint8)[numbers], want[numbers])
    assert got.to(torch.float32)[~numbers].isnan().all()


@formats
def test_interpreted_cast_from_fp8_is_exact(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).repeat(16).view(dtype)
    assert torch.equal(cast(codes, torch.float32).nan_to_num(7e7), codes.to(torch.float32).nan_to_num(7e7))


def test_interpreted_cast_to_bf16_rounds_to_nearest_even() -> None:
    x = torch.randn(65536, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cast(x, torch.bfloat16), x.to(torch.bfloat16))
