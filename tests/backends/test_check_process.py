"""What the end of a check says: the kernel's fault, or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install fp8train[triton]")
from fp8train.backends import check_process  # noqa: E402
from fp8train.backends.admission import main  # noqa: E402
from tests.source_tree import ROOT  # noqa: E402


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_child_finds_the_package_where_this_process_did(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where it was put on sys.path by hand, and another of the name is in the current folder."""
    (tmp_path / "fp8train").mkdir()
    (tmp_path / "fp8train" / "__init__.py").write_text("raise SystemExit('another fp8train')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.syspath_prepend(ROOT)
    reason, decided = check_process.check_in_child(("gemm", "tma_64x128_s4"), 0)
    assert "finds no CUDA GPU; needs a GPU with FP8 units" in str(reason) and not decided


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to\nallocate"), check_process.UNDECIDED),
        (RuntimeError("CUDA error: out of memory"), check_process.UNDECIDED),
        (ModuleNotFoundError("No module named 'numpy'"), check_process.UNDECIDED),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), check_process.FAILED),
        (RuntimeError("out of resource: shared memory, Required: 300000"), check_process.FAILED),
    ],
    ids=str,
)
def test_an_error_in_a_check_is_the_kernels_fault_or_not(
    error: Exception, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(check_process, "no_gpu", lambda device_type: None)
    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: None)
    monkeypatch.setattr(check_process, "check", fails)
    assert main(["gemm", "ws_128x128_s4"]) == status
    assert capsys.readouterr().err == f"{type(error).__name__}: {' '.join(str(error).split())}\n"
    monkeypatch.setattr(torch, "empty", fails)  # where it is no kernel that runs yet
    if isinstance(error, RuntimeError):
        assert main(["gemm", "ws_128x128_s4"]) == check_process.UNDECIDED
