"""What tests of admission share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fp8train.backends import admission


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with one GPU that uses one kernel, as far as the verdicts look at it; its cache folder."""
    monkeypatch.setattr(admission, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(admission, "fingerprint", lambda index: "of-this-machine")
    monkeypatch.setattr(admission, "_used", lambda index: [("gemm", "ws_128x128_s4")])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Test GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return tmp_path
