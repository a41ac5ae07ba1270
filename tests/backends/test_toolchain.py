"""Verdicts are of one toolchain: another assembler or driver has none yet."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install fp8train[triton]")
from fp8train.backends import toolchain  # noqa: E402
from fp8train.backends.toolchain import fingerprint  # noqa: E402


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with one GPU."""
    properties = SimpleNamespace(name="NVIDIA Test GPU", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)


def assembler(path: Path, build: int) -> str:
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.{build}'\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("variable", ["TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"])
def test_fingerprint_changes_with_the_assembler(variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = [fingerprint(0)]
    for name, build in (("one", 61), ("one", 93), ("two", 93)):
        monkeypatch.setenv(variable, assembler(tmp_path / name, build))
        found.append(fingerprint(0))
    monkeypatch.setenv("PTXAS_OPTIONS", "--opt-level 1")
    found.append(fingerprint(0))
    assert len(set(found)) == len(found) and found[-1] == fingerprint(0)


def test_fingerprint_changes_with_the_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(toolchain, "KERNEL_MODULE", tmp_path / "version")
    found = [fingerprint(0)]
    for version in ("550.54.15", "570.86.10"):
        (tmp_path / "version").write_text(f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {version}\n")
        found.append(fingerprint(0))

    def library(name: str) -> SimpleNamespace:
        return SimpleNamespace(cuDriverGetVersion=lambda version: setattr(version._obj, "value", 12080))

    monkeypatch.setattr(toolchain.ctypes, "CDLL", library)
    found.append(fingerprint(0))
    assert len(set(found)) == 4


def test_a_missing_assembler_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "ASSEMBLERS", ("ptxas", "of_another_triton"))
    assert toolchain.assemblers()[-1] == "no of_another_triton"
