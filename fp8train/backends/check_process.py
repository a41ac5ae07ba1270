"""The check of one kernel in a process of its own: how it is started, and what its end says of the kernel.

A wrong result, an error of the kernel's, a crash and a hang decide against the kernel. Where the check could not be
made (no memory, no GPU to be seen, a package that is not found, a process that was ended from outside), nothing is
decided.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import torch

from fp8train.backends.admission_checks import check
from fp8train.backends.machine import no_gpu

SECONDS = 180.0  # of which about 30 for the imports and the compilations; the arithmetic takes milliseconds
# Exit statuses of the check: the result is wrong, the kernel raised an error; and no fault of the kernel's, like 1, an
# error before it began.
WRONG, FAILED, NO_GPU, UNDECIDED = 4, 5, 2, 3
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
UNCHECKED = "it could not be checked"
# What an error that is no fault of the kernel's is, or says: too little memory, no compiler for Triton's launchers.
NO_FAULT = (ImportError, OSError, MemoryError, subprocess.SubprocessError, torch.cuda.OutOfMemoryError)
NO_FAULT_WORDS = (
    "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED", "Failed to find C compiler",
)  # fmt: skip
MEMORY_BYTES = 2**29  # that must be free on the GPU for a check to begin
Kernel = tuple[str, str]  # operation and entry


def check_in_child(kernel: Kernel, index: int, seconds: float = SECONDS) -> tuple[str | None, bool]:
    """(reason against the kernel or None, whether that is decided for good); one that takes longer has a reason."""
    # the child finds what this process found, wherever that was put on sys.path, and with -P nothing but that
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    command = ["env", f"PYTHONPATH={paths}", sys.executable, "-P", "-m", "fp8train.backends", *kernel]
    command += ["--device", str(index)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        remedy = "if the machine was busy, `python -m fp8train.backends --again` repeats it"
        return f"its check did not end in {seconds:g} seconds; {remedy}", True
    except OSError as error:
        return f"{UNCHECKED}: no process could be started: {error}", False
    lines = (done.stdout if done.returncode == WRONG else done.stderr).strip().splitlines()
    said = lines[-1] if lines else "no message"
    if done.returncode == 0:
        return None, True
    if done.returncode == WRONG:
        return said, True
    if done.returncode == FAILED:
        return f"its check ended with an error: {said}", True
    if -done.returncode in CRASHES:
        return f"its check ended with status {done.returncode}: {said}", True
    if done.returncode < 0:  # by SIGKILL, a host that runs out of memory ends whichever process it likes
        return f"{UNCHECKED}: another process ended the check by signal {-done.returncode}", False
    return f"{UNCHECKED}: {said}", False


def check_here(kernel: Kernel, index: int) -> int:
    """Check one kernel in this process; its exit status."""
    device = torch.device("cuda", index)
    try:
        if says_no_gpu():
            return NO_GPU
        torch.empty(MEMORY_BYTES, dtype=torch.uint8, device=device)
    except RuntimeError as error:  # also what CUDA says if it cannot begin
        return _ended(UNDECIDED, error)
    try:
        reason = check(*kernel, device)
    except Exception as error:
        no_fault = isinstance(error, NO_FAULT) or any(words in str(error) for words in NO_FAULT_WORDS)
        return _ended(UNDECIDED if no_fault else FAILED, error)
    sys.stdout.write(f"{reason or 'correct'}\n")
    return WRONG if reason else 0


def says_no_gpu() -> bool:
    """Whether there is none for the kernels, and why, on stderr."""
    reason = no_gpu("cuda")
    if reason:
        sys.stderr.write(f"fp8train.backends: {reason}; needs a GPU with FP8 units. Nothing was checked.\n")
    return reason is not None


def _ended(status: int, error: Exception) -> int:
    """Print an error as one line."""
    sys.stderr.write(f"{type(error).__name__}: {' '.join(str(error).split())}\n")
    return status
