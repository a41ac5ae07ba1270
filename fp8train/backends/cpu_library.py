"""Builds cpu_kernels.cpp once per machine with the C++ compiler at hand, and loads it.

The library is kept under the user's cache folder, named by a hash of source, compiler, flags and processor. Without a
compiler, or where the build fails, the CPU backend computes the same codes in torch, more slowly; the reason is kept
for the run to report.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fp8train.backends.user_cache import cache_folder

SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
COMPILERS = ("c++", "g++", "clang++")
# no fast-math flag: each operation must stay one IEEE operation. The last two only drop errno and floating-point traps.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
LINK = ("-fopenmp", "-shared", "-fPIC")
BUILD_SECONDS = 120

_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_MATRIX = (_POINTER, _INT, _SIZE, _SIZE, _SIZE)  # x, bf16, rows, cols, stride
_SIGNATURES = {
    "fp8_quantize_rows": (*_MATRIX, _SIZE, _INT, _INT, _POINTER, _POINTER, _INT),
    "fp8_quantize_columns": (*_MATRIX, _SIZE, _INT, _INT, _POINTER, _POINTER, _INT),
    "fp8_quantize_dual": (*_MATRIX, _INT, _INT, _INT, _POINTER, _POINTER, _POINTER, _POINTER, _INT),
    "fp8_quantize_square": (*_MATRIX, _SIZE, _INT, _INT, _POINTER, _POINTER, _POINTER, _POINTER, _INT),
    "fp8_decode": (_POINTER, _POINTER, _SIZE, _SIZE, _SIZE, _SIZE, _INT, _INT, _POINTER, _INT),
}


@dataclass(frozen=True, slots=True)
class CpuLibrary:
    """The compiled kernels, or the reason why there are none."""

    functions: ctypes.CDLL | None
    reason: str


@functools.cache
def load() -> CpuLibrary:
    """Load the kernels, building them on first use (about 5 seconds, then kept in the user's cache folder)."""
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        return CpuLibrary(None, f"no C++ compiler found (looked for {', '.join(COMPILERS)})")
    try:
        library = cache_folder() / f"cpu_kernels_{_fingerprint(compiler)}.so"
        if not library.is_file():
            _build(compiler, library)
        functions = ctypes.CDLL(str(library))
    except subprocess.CalledProcessError as error:
        return CpuLibrary(None, f"{compiler} could not build {SOURCE.name}: {_first_line(error.stderr)}")
    except (OSError, subprocess.TimeoutExpired) as error:
        return CpuLibrary(None, f"{SOURCE.name} could not be built or loaded: {_first_line(str(error))}")
    for name, signature in _SIGNATURES.items():
        function = getattr(functions, name)
        function.argtypes, function.restype = signature, None
    return CpuLibrary(functions, f"{SOURCE.name} built with {Path(compiler).name}")


def _build(compiler: str, path: Path) -> None:
    """Compile to a temporary file and rename it, so that another process cannot see half a library."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(built), *LINK]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS)
        built.replace(path)


def _fingerprint(compiler: str) -> str:
    version = subprocess.run(
        [compiler, "--version"], check=True, capture_output=True, text=True, timeout=BUILD_SECONDS
    ).stdout
    parts = [SOURCE.read_text(), compiler, version, " ".join(FLAGS + LINK), platform.machine(), _processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """Instruction sets that -march=native may use: a home folder can be shared by different machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no message")
