"""Checks of the machine: versions that do not go together, each named with both numbers and the remedy."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable

import numpy as np
import torch

from fp8train.backends import cpu_library
from fp8train.backends.machine import FP8_CAPABILITY, major_minor
from fp8train.backends.triton import BELOW, OLDEST
from fp8train.checkup.outcome import Outcome
from fp8train.trainer.environment import installed

OLDEST_TORCH = (2, 11)


def driver_cuda_version() -> str | None:
    """The newest CUDA that the installed driver serves, as nvidia-smi says it; None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        said = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"CUDA Version:\s*([\d.]+)", said)
    return found[1] if found else None


def _torch() -> Outcome:
    return Outcome(
        passed=major_minor(torch.__version__) >= OLDEST_TORCH,
        first=f"torch {torch.__version__}",
        second=f"needs {'.'.join(map(str, OLDEST_TORCH))} or newer",
        meaning="an older torch casts to FP8 without saturating. pip install --upgrade torch.",
    )


def _numpy() -> Outcome:
    """torch built for NumPy 1 cannot hand arrays to NumPy 2, and says so only when it is asked."""
    wrong = ""
    try:
        torch.from_numpy(np.arange(3)).numpy()
    except (RuntimeError, TypeError) as error:
        wrong = str(error).splitlines()[0]
    return Outcome(
        passed=not wrong,
        first=f"numpy {np.__version__}",
        second=f"torch {torch.__version__}",
        detail=wrong or "arrays pass both ways",
        meaning="torch was built for another major version of NumPy. Install that of launch/constraints.txt.",
    )


def _compiler() -> Outcome:
    library = cpu_library.load()
    return Outcome(
        passed=True,
        first="compiled" if library.functions else "in torch: slower, the same codes",
        second=library.reason,
    )


def _driver() -> Outcome | None:
    if not torch.cuda.is_available():
        return None
    driver = driver_cuda_version()
    return Outcome(
        passed=driver is not None and major_minor(driver)[0] >= major_minor(torch.version.cuda)[0],
        first=f"driver serves CUDA {driver or 'unknown'}",
        second=f"torch was built for CUDA {torch.version.cuda}",
        meaning="kernels of a newer CUDA than the driver's do not load. Update the driver, or take a torch built for "
        "its CUDA.",
    )


def _triton() -> Outcome | None:
    if not torch.cuda.is_available():
        return None
    found = installed("triton")
    return Outcome(
        passed=found is not None and OLDEST <= major_minor(found) < BELOW,
        first=f"triton {found or 'is not installed'}",
        second=f"needs {OLDEST[0]}.{OLDEST[1]} to {BELOW[0]}.{BELOW[1] - 1}",
        meaning="the FP8 kernels are compiled with other versions; backend=auto falls back to cublaslt or BF16 units. "
        "Install the Triton that came with torch.",
    )


def _capability() -> Outcome | None:
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_capability()
    return Outcome(
        passed=found >= FP8_CAPABILITY,
        first=f"{torch.cuda.get_device_name()}: compute capability {found[0]}.{found[1]}",
        second=f"FP8 from {FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]}",
        meaning="this GPU computes the same numbers on BF16 units, and no faster than BF16.",
    )


def _unseen_gpu() -> Outcome | None:
    driver = driver_cuda_version()
    if driver is None or torch.cuda.is_available():
        return None
    return Outcome(
        passed=False,
        first=f"driver serves CUDA {driver}",
        second=f"torch {torch.__version__} sees no GPU (built for CUDA {torch.version.cuda})",
        meaning="torch was built without CUDA, or for a newer one than the driver's. Install a torch for this CUDA.",
    )


# None: there is nothing to check here; the last four concern a GPU
CHECKS: dict[str, Callable[[], Outcome | None]] = {
    "torch": _torch,
    "numpy": _numpy,
    "cpu_kernels": _compiler,
    "driver": _driver,
    "triton": _triton,
    "fp8_units": _capability,
    "gpu": _unseen_gpu,
}
