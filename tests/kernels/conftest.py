"""The Gluon kernels on a machine without a GPU: run by the model of tests/kernels/gluon_model.py."""

from __future__ import annotations

import importlib.util

import pytest
import torch


@pytest.fixture(autouse=True)
def gluon_is_modelled_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """There, launches of the compiled kernel go to the model, and the launchers believe in a Hopper."""
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return
    from fp8train.kernels import gemm_gluon, gemm_gluon_sum, gemm_launch
    from tests.kernels.gluon_model import Kernel

    monkeypatch.setattr(gemm_launch, "capability", lambda device: (9, 0))
    monkeypatch.setattr(gemm_gluon, "_gemm_gluon_kernel", Kernel(gemm_gluon_sum, gemm_gluon))
