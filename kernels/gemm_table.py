"""Which launch entries a GEMM takes: entries of CONFIGS of gemm.py and gemm_wgrad.py, by device and shape.

A small table instead of a racing autotune: the same shape takes the same kernel in every run. It holds, per device, the
rate of each entry while all multiprocessors are busy; the time of a GEMM is then that of the waves of tiles which the
multiprocessors work through, and entries are tried in the order of these times. An entry is listed only if it compiles
without spills for aligned operands (kernels/README.md), and used only after a check on the device
(fp8train/backends/admission.py). Where the table has none, or none passes, the plain ones are tried (PLAIN), and torch
multiplies where none of these passes either. Rates that were measured on a machine itself
(fp8train/backends/launch_rates.py) stand in for these there.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

Rates = Mapping[str, tuple[int, int, float]]  # entry -> rows, columns of its tile, TFLOP/s of full waves

# by operation and major compute capability
# M, N, K = 8192, Triton 3.6.0, 2026-11-26: gluon_* on an NVIDIA H200, those of gemm in groups of 8 rows of tiles, those
# of gemm_wgrad in one run (kernels/results/2026-11-26-h200-3.json); the others on an H100 80GB HBM3
TABLE: dict[tuple[str, int], Rates] = {
    ("gemm", 9): {
        "gluon_192x128_s4": (192, 128, 1307),
        "gluon_256x128_s4": (256, 128, 1298),
        "gluon_128x128_k2_s6": (128, 128, 1271),
        "tma_128x128_s4": (128, 128, 895),
        "tma_64x128_s4": (64, 128, 732),
    },
    ("gemm_wgrad", 9): {
        "gluon_192x128_ahead_s5": (192, 128, 1031),
        "gluon_128x128_k2_s6": (128, 128, 954),
        "ws_128x128_s4": (128, 128, 736),
        "tma_64x128_s4": (64, 128, 423),
    },
}


def listed(capability: tuple[int, int]) -> list[tuple[str, str]]:
    """Operation and entry of all that the table has for a device."""
    return [
        (operation, entry) for (operation, major), rows in TABLE.items() if major == capability[0] for entry in rows
    ]


def table_rates(operation: str, capability: tuple[int, int]) -> Rates:
    """The table's for such a device; {} where only the plain entry runs."""
    return TABLE.get((operation, capability[0]), {})


def waves(rows: int, cols: int, M: int, N: int, multiprocessors: int) -> int:
    """How often the multiprocessors take a tile of a result [M, N] each."""
    return -(-(-(-M // rows) * -(-N // cols)) // multiprocessors)


def ordered(rates: Rates, M: int, N: int, multiprocessors: int) -> tuple[str, ...]:
    """The entries for a result [M, N], the fastest first."""

    def time(entry: str) -> float:
        rows, cols, rate = rates[entry]
        return waves(rows, cols, M, N, multiprocessors) * rows * cols / rate

    return tuple(sorted(rates, key=time))


def device_entries(
    operation: str, device: torch.device, M: int, N: int, measured: Rates | None = None
) -> tuple[str, ...]:
    """As ordered, for a CUDA device, by the table's rates or by those that were measured there."""
    if device.type != "cuda":
        return ()
    properties = torch.cuda.get_device_properties(device)
    rates = measured or table_rates(operation, (properties.major, properties.minor))
    return ordered(rates, M, N, properties.multi_processor_count)
