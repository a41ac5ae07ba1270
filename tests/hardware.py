"""What a test needs of the machine. A skip always says what is missing."""

from __future__ import annotations

import pytest
import torch


def requires_gpu(sm: int = 0) -> pytest.MarkDecorator:
    """Skip unless a CUDA GPU of compute capability `sm` (90 = Hopper) or newer is there."""
    if not torch.cuda.is_available():
        return pytest.mark.skipif(True, reason=f"needs a CUDA GPU of sm_{sm or 'any'}; this machine has none")
    major, minor = torch.cuda.get_device_capability()
    found = 10 * major + minor
    return pytest.mark.skipif(found < sm, reason=f"needs sm_{sm}; {torch.cuda.get_device_name()} is sm_{found}")


def devices() -> list[str]:
    """Devices that a shared CPU and GPU test body runs on here."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
