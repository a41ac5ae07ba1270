"""What Triton's CPU interpreter needs to be exact; tests of kernels use it where there is no GPU.

Triton 3.6 to 3.9 (TRITON_INTERPRET=1) round FP32 to FP8 half away from zero, lose the carry into the exponent (1.9868
becomes 1.0), do not saturate, and truncate to BF16. The device rounds to nearest even, saturates at the largest finite
number and keeps NaN. This replaces the one function that is wrong; it can go when triton-lang/triton issue 8322 is
fixed in every version of the range in pyproject.toml. Besides, Triton 3.6 makes an integer of an array of one element,
which NumPy refuses since 2.4.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def make_exact() -> None:
    """Make the interpreter cast between FP32, FP16, BF16, E4M3 and E5M2 as the device does. Idempotent."""
    import triton.language as tl
    from triton.runtime import interpreter

    stock = interpreter._convert_float
    if getattr(stock, "exact", False):
        return
    dtypes = {
        tl.float32: torch.float32,
        tl.float16: torch.float16,
        tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.float8e5: torch.float8_e5m2,
    }

    def convert(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        toward_zero = rounding is not None and "RTZ" in str(rounding)
        if source not in dtypes or target not in dtypes or toward_zero:
            return stock(data, source, target, rounding)
        return _cast(data, dtypes[source], dtypes[target])

    convert.exact = True  # type: ignore[attr-defined]
    interpreter._convert_float = convert
    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch


def _cast(data: np.ndarray, source: torch.dtype, target: torch.dtype) -> np.ndarray:
    """Cast the bit patterns `data` of `source` numbers to unsigned bit patterns of `target` numbers."""
    signed = {1: np.int8, 2: np.int16, 4: np.int32}[source.itemsize]
    x = torch.from_numpy(np.ascontiguousarray(data).view(signed)).view(source).to(torch.float32)
    if target in (torch.float8_e4m3fn, torch.float8_e5m2):
        limit = torch.finfo(target).max
        x = x.clamp(-limit, limit)  # keeps NaN
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[target.itemsize]
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[target.itemsize]
    return x.to(target).view(bits).numpy().view(unsigned).reshape(data.shape)
