"""Which launch configuration a GEMM takes: entries of CONFIGS of gemm.py and gemm_wgrad.py, by device and shape.

A small table instead of a racing autotune: the same shape takes the same kernel in every run. An entry is listed only
if it compiles without spills (kernels/README.md), and used only after a check on the device
(fp8train/backends/admission.py). Where the table has none, or none passes, the launcher's plain variant runs. Order of
preference: not measured on hardware yet; by instructions per K block and pipeline depth. The Gluon entries of CONFIGS
join when `bench gemm backends=[triton:ENTRY]` (launch/gpu_check.sh) has measured them.
"""

import torch

TILE = 128
# (operation, major compute capability) -> class of shapes -> entries in order of preference
TABLE = {
    ("gemm", 9): {
        "few_tiles": ("tma_64x128_s4",),
        "short_k": ("ws_128x128_s3", "tma_128x128_s4"),
        "large": ("ws_128x128_s4", "ws_128x128_s3", "tma_128x128_s4"),
    },
    ("gemm_wgrad", 9): {
        "few_tiles": ("tma_64x128_s4",),
        "short_k": ("ws_128x128_s3", "tma_128x128_s4"),
        "large": ("ws_128x128_s4", "ws_128x128_s3", "tma_128x128_s4"),
    },
}


def shape_class(M: int, N: int, K: int, multiprocessors: int) -> str:
    """few_tiles: half of the multiprocessors would be idle; short_k: four stages are not filled; large: the rest."""
    if -(-M // TILE) * -(-N // TILE) * 2 <= multiprocessors:
        return "few_tiles"
    return "short_k" if K <= 4 * TILE else "large"


def entries(
    operation: str, capability: tuple[int, int], M: int, N: int, K: int, multiprocessors: int
) -> tuple[str, ...]:
    """Entries for a GEMM [M, K] x [N, K] on such a device, in order of preference; () where only the plain one runs."""
    classes = TABLE.get((operation, capability[0]), {})
    return classes.get(shape_class(M, N, K, multiprocessors), ())


def device_entries(operation: str, device: torch.device, M: int, N: int, K: int) -> tuple[str, ...]:
    """As entries, for a CUDA device."""
    if device.type != "cuda":
        return ()
    properties = torch.cuda.get_device_properties(device)
    return entries(operation, (properties.major, properties.minor), M, N, K, properties.multi_processor_count)
