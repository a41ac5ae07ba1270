"""What the machine code of the kernels, and so a verdict on them, depends on: GPU, driver, compilers, sources."""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import subprocess
from pathlib import Path

import torch

from fp8train._layout import folder

CHECKS = (
    "admission", "admission_checks", "check_process", "code_checks", "interface", "producer_checks", "producers",
    "product_checks",
)  # fmt: skip
ASSEMBLERS = ("ptxas", "ptxas_blackwell")  # knobs of Triton, which takes one or the other by its version and the GPU
OPTIONS = ("ptxas_options", "disable_ptxas_opt", "libdevice_path")
KERNEL_MODULE = Path("/proc/driver/nvidia/version")


def fingerprint(index: int) -> str:
    """Of a GPU, what compiles and assembles for it, and the sources of the kernels and of their checks."""
    triton = importlib.import_module("triton")
    properties = torch.cuda.get_device_properties(index)
    parts = [
        properties.name, f"{properties.major}.{properties.minor}", torch.__version__, str(torch.version.cuda),
        triton.__version__, *assemblers(), *driver(),
    ]  # fmt: skip
    own = [Path(__file__).with_name(f"{name}.py") for name in CHECKS]
    sources = [*sorted(folder("kernels").glob("*.py")), *own]
    parts += [path.read_text() for path in sources]  # kernels share code
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def assemblers() -> list[str]:
    """Path and version of each ptxas that Triton may run, wherever TRITON_PTXAS_PATH points, and its options."""
    knobs = importlib.import_module("triton.knobs").nvidia
    said = [str(getattr(knobs, name, None)) for name in OPTIONS]
    for name in ASSEMBLERS:
        try:
            path = getattr(knobs, name).path
            version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True, timeout=60)
            said += [path, version.stdout]
        except (AttributeError, RuntimeError, OSError, subprocess.SubprocessError):
            said.append(f"no {name}")  # not in this Triton, or not where it should be
    return said


def driver() -> list[str]:
    """The driver's kernel module, and the CUDA of the library that programs load, which may be of another version."""
    said = [KERNEL_MODULE.read_text()] if KERNEL_MODULE.is_file() else []
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return said
    return [*said, str(version.value)]
