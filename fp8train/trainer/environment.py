"""Where a run took place: versions, hardware, code and command line."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import fp8train
from fp8train._layout import CHECKOUT
from fp8train.backends import cpu_library


def device_name(device: torch.device) -> str:
    """Name of the GPU, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, hardware, code and command line of this process; plain values.

    git_commit and git_dirty are null where git says nothing, as for an installed package.
    """
    library = cpu_library.load()
    changes = _git("status", "--porcelain")
    host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    on_gpu = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else host_bytes
    name = device_name(device) if on_gpu else f"{_cpu_name()}, {os.cpu_count()} cores"
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "fp8train": fp8train.__version__,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if changes is None else changes != "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": installed("triton"),
        "platform": platform.platform(),
        "host": platform.node(),
        "device": {"name": name, "memory_bytes": memory},
        "cpu": {"name": _cpu_name(), "count": os.cpu_count(), "memory_bytes": host_bytes},
        "torch_threads": torch.get_num_threads(),
        "cpu_kernels": library.functions is not None,
        "cpu_kernels_reason": library.reason,
    }


def installed(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Output of git about the checkout that this package lies in; None where it is no checkout or there is no git."""
    if CHECKOUT is None or not (CHECKOUT / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(CHECKOUT), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
