"""Which launch entries a GEMM takes: entries of CONFIGS of gemm.py and gemm_wgrad.py, by device and shape.

A small table instead of a racing autotune: the same shape takes the same kernel in every run. It holds, per device, the
rate of each entry while all multiprocessors are busy; the time of a GEMM is then that of the waves of tiles which the
multiprocessors work through, and entries are tried in the order of these times. An entry is listed only if it compiles
without spills (kernels/README.md), and used only after a check on the device (fp8train/backends/admission.py). Where
the table has none, or none passes, the launcher's plain variant runs.
"""

from __future__ import annotations

import torch

# (operation, major compute capability) -> entry -> (rows, columns of its tile, TFLOP/s of full waves)
# M, N, K = 8192, Triton 3.6.0, 2026-11-26: gluon_* on an NVIDIA H200, in groups of 8 rows of tiles, the others on an
# H100 80GB HBM3
TABLE = {
    ("gemm", 9): {
        "gluon_192x128_s4": (192, 128, 1307),
        "gluon_256x128_s4": (256, 128, 1298),
        "gluon_128x128_k2_s6": (128, 128, 1271),
        "tma_128x128_s4": (128, 128, 895),
        "tma_64x128_s4": (64, 128, 732),
    },
    ("gemm_wgrad", 9): {
        "gluon_192x128_s5": (192, 128, 955),
        "gluon_128x128_k2_s6": (128, 128, 943),
        "ws_128x128_s4": (128, 128, 736),
        "tma_64x128_s4": (64, 128, 423),
    },
}


def listed(capability: tuple[int, int]) -> list[tuple[str, str]]:
    """Operation and entry of all that the table has for a device."""
    return [
        (operation, entry) for (operation, major), rows in TABLE.items() if major == capability[0] for entry in rows
    ]


def entries(operation: str, capability: tuple[int, int], M: int, N: int, multiprocessors: int) -> tuple[str, ...]:
    """Entries for a result [M, N] on such a device, the fastest first; () where only the plain one runs."""

    def time(entry: str) -> float:
        rows, cols, rate = listed_here[entry]
        waves = -(-(-(-M // rows) * -(-N // cols)) // multiprocessors)
        return waves * rows * cols / rate

    listed_here = TABLE.get((operation, capability[0]), {})
    return tuple(sorted(listed_here, key=time))


def device_entries(operation: str, device: torch.device, M: int, N: int) -> tuple[str, ...]:
    """As entries, for a CUDA device."""
    if device.type != "cuda":
        return ()
    properties = torch.cuda.get_device_properties(device)
    return entries(operation, (properties.major, properties.minor), M, N, properties.multi_processor_count)
