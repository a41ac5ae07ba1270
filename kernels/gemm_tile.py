"""What the GEMM kernels share: the order of their tiles, and what their launchers ask of memory and device."""

from collections.abc import Mapping

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


# M and N may be a group's: a grouped launch adds, in every loop over tiles, the search for an index's group and that
# group's first rows. TMA knows no group: c goes out by pointers, masked, and wgrad wants groups of K padded to 128.
@triton.jit
def tile_at(index, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M):
    """Row and column of the tile with that index: columns of GROUP_M tiles, one after the other."""
    width = GROUP_M * num_blocks(N, BLOCK_N)
    first = index // width * GROUP_M
    height = min(num_blocks(M, BLOCK_M) - first, GROUP_M)
    return first + index % width % height, index % width // height


def by_hand(
    *, math_groups: int, stages: int, group_m: int, waves: int = 1, in_flight: int = 1, abreast: int = 1,
    ahead: bool = False,
) -> dict[str, int]:  # fmt: skip
    """A launch entry of gemm_gluon.py, whose constants these are.

    `ahead` is for gemm_wgrad only, `waves` for warpgroups that do not stand abreast.
    """
    tile = {"MATH_GROUPS": math_groups, "WAVES": waves, "ABREAST": abreast, "BLOCK_N": 128, "GROUP_M": group_m}
    return tile | {"STAGES": stages, "IN_FLIGHT": in_flight, "AHEAD": ahead}


def tile_of(entry: Mapping[str, int]) -> tuple[int, int]:
    """Rows and columns of the tile of a launch entry."""
    if "BLOCK_M" in entry:
        return entry["BLOCK_M"], entry["BLOCK_N"]
    abreast = entry["ABREAST"]
    return 64 * entry["MATH_GROUPS"] // abreast * entry["WAVES"], abreast * entry["BLOCK_N"]


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
