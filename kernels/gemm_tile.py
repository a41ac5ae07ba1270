"""What the GEMM kernels share: the order of their tiles, and what their launchers ask of memory and device."""

import torch
import triton
import triton.language as tl

BLOCK_K = tl.constexpr(128)  # also the block of K that shares a scale
TILE_ORDER = {"GROUP_M": 8}  # neighbouring tiles share rows of a and b in L2
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@triton.jit
def num_blocks(size, BLOCK: tl.constexpr):
    """Number of blocks in size >= 1. Not tl.cdiv: size + BLOCK - 1 would overflow just below 2^31."""
    return (size - 1) // BLOCK + 1


@triton.jit
def tile_at(index, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column of the tile with that index: columns of GROUP_M tiles, one after the other."""
    width = GROUP_M * num_blocks(N, BLOCK_N)
    first = index // width * GROUP_M
    height = min(num_blocks(M, BLOCK_M) - first, GROUP_M)
    return first + index % width % height, index % width // height


def refusal(config: str, configs: dict[str, dict[str, object]], a: torch.Tensor, b: torch.Tensor) -> str | None:
    """Why an entry of these CONFIGS cannot multiply a and b, or None."""
    if config not in configs:
        return f"config is {config!r}; needs one of {', '.join(configs)}"
    if config.startswith("pointer"):
        return None
    if "MATH_GROUPS" in configs[config] and capability(a.device)[0] != 9:
        return f"config {config!r} is Gluon for Hopper, which no CPU interprets; needs a GPU of sm_90"
    if a.is_cuda and capability(a.device) < (9, 0):
        return f"config {config!r} uses TMA; needs sm_90"
    if not (tma_reads(a) and tma_reads(b)):
        return f"config {config!r} reads by TMA; needs rows that start at multiples of 16 bytes"
    return None


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; (0, 0) of a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def tma_reads(x: torch.Tensor) -> bool:
    """Whether the tensor memory accelerator can read or write this matrix."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return aligned and x.stride(1) == 1 and x.stride(0) >= x.shape[1]


def scale_rows(scale: torch.Tensor) -> torch.Tensor:
    """Scales [N, blocks] as rows [blocks, N] for TMA; a size of 1 gets a stride that it takes."""
    (N, blocks), (stride, step) = scale.shape, scale.stride()
    return scale.as_strided((blocks, N), (step if blocks > 1 else -(-N // 4) * 4, stride if N > 1 else 1))


def multiprocessors(device: torch.device) -> int:
    """Programs of a persistent kernel."""
    # three on a CPU, where tests interpret: fewer than tiles, so that a program takes several
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Memory for descriptors made on the device."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def overlap(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether the spans of memory between first and last element meet."""
    spans = []
    for t in (x, y):
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        spans.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size() if t.numel() else t.data_ptr()))
    return spans[0][0] < spans[1][1] and spans[1][0] < spans[0][1]
