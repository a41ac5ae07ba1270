"""What the launchers of the quantisers share: their results allocated, constants of a tile, checks of arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from fp8train.kernels.launch import SIZE_LIMIT

BLOCK = 128
MAX_BITS = {torch.float8_e4m3fn: 0x43E00000, torch.float8_e5m2: 0x47600000}  # largest number of a format, as FP32
NUM_WARPS = 8  # of a tile of which a column copy is written; 4 warps hold twice as much a thread
ROW_WARPS = 8  # of one of which none is
WORD_REGISTERS = 64  # of a tile made as words (tile_words.py): four programs of NUM_WARPS on an SM


def empty_codes(x: Tensor, rows: int, cols: int, dtype: torch.dtype, multiple: int) -> Tensor:
    """[rows, cols] with a leading stride that is a multiple of `multiple`: TMA wants 16 bytes, whole tiles 128."""
    padded = -(-cols // multiple) * multiple
    made = torch.empty(rows, padded, dtype=dtype, device=x.device)
    return made if padded == cols else made[:, :cols]


def empty_scales(x: Tensor, rows: int, cols: int) -> Tensor:
    """[rows, ceil(cols/128)] fp32, rows contiguous."""
    blocks, padded = -(-cols // BLOCK), scale_stride(rows)
    return torch.empty(blocks * padded, dtype=torch.float32, device=x.device).as_strided((rows, blocks), (1, padded))


def scale_stride(rows: int) -> int:
    """From one block's scales to the next's: a GEMM tile of up to 256 rows may read beyond the last row."""
    return -(-(rows + 255) // 16) * 16


def empty_copies(
    x: Tensor, fp8_dtype: torch.dtype, columns: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Row copy and column copy of x [M, K], each with its scales; without `columns` the last two are None."""
    M, K = x.shape
    row = empty_codes(x, M, K, fp8_dtype, 16), empty_scales(x, M, K)
    return (*row, empty_codes(x, K, M, fp8_dtype, BLOCK), empty_scales(x, K, M)) if columns else (*row, None, None)


def tiling(
    packs: bool, columns: bool, keep: bool, num_warps: int, whole: bool, max_registers: int | None = None
) -> tuple[dict[str, object], dict[str, object]]:
    """Constants and options of a launch: of each of 64 / num_warps strips a thread holds 8 numbers.

    packs: the numbers are BF16; others are not kept. max_registers: None where fewer than the compiler wants spill.
    """
    if not columns:
        return {"STRIPS": 4, "KEEP": False, "WHOLE": whole}, {"num_warps": ROW_WARPS}
    limit: dict[str, object] = {"maxnreg": max_registers} if max_registers else {}
    constants = {"STRIPS": 64 // num_warps, "KEEP": keep and packs, "WHOLE": whole}
    return constants, {"num_warps": num_warps} | limit


def word_tiling(
    packs: bool, columns: bool, keep: bool, whole: bool, fits: bool, words: bool, max_registers: int
) -> tuple[dict[str, object], dict[str, object]]:
    """As tiling, with WORDS: whether to take the way of tile_words.py, which is wanted (`words`) and serves (`fits`).

    max_registers: of the other way, where both would serve; elsewhere such a limit spills.
    """
    words = words and fits and columns
    limit = WORD_REGISTERS if words else max_registers if fits else None
    constants, options = tiling(packs, columns, keep, NUM_WARPS, whole, limit)
    return constants | {"WORDS": words}, options


def as_words(bf16: bool, columns: bool, whole: bool, pow2: bool, *inputs: Tensor) -> bool:
    """Whether tile_words.py serves a launch: both copies of whole BF16 tiles, all scales powers of two.

    inputs: they must begin where 16 bytes do.
    """
    return bf16 and columns and whole and pow2 and all(x.data_ptr() % 16 == 0 for x in inputs)


def are_whole(M: int, K: int, *strides: int) -> bool:
    """Tiles of 128x128 fill the matrix, and rows begin where 16 bytes do."""
    return M % BLOCK == K % BLOCK == 0 and all(stride % 16 == 0 for stride in strides)


def tiles(rows: int, cols: int, parts: int = 1) -> tuple[int]:
    """Grid with `parts` programs to each tile of 128x128."""
    return (parts * -(-rows // BLOCK) * -(-cols // BLOCK),)


def leading_strides(
    row: Tensor | None, row_scale: Tensor | None, col: Tensor | None, col_scale: Tensor | None
) -> list[int]:
    """Strides of both copies as the kernels take them; 0 for what is not there."""
    axes = ((row, 0), (row_scale, 1), (col, 0), (col_scale, 1))
    return [0 if tensor is None else tensor.stride(axis) for tensor, axis in axes]


def max_bits(name: str, fp8_dtype: torch.dtype) -> int:
    """As MAX_BITS; raises ValueError for a format that the kernels do not serve."""
    if fp8_dtype not in MAX_BITS:
        wanted = " or ".join(map(str, MAX_BITS))
        raise ValueError(f"{name}: fp8_dtype is {fp8_dtype}; needs {wanted}. Choose one of them.")
    return MAX_BITS[fp8_dtype]


def check_matrix(name: str, label: str, x: Tensor, sizes: str = "[M, K]") -> None:
    """Raise ValueError unless x is a matrix in bf16 or fp32, row-major, with dimensions that offsets can hold."""
    if x.dim() != 2 or x.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(
            f"{name}: {label} is {list(x.shape)} {x.dtype}; needs {sizes} in torch.bfloat16 or torch.float32. "
            "Reshape or cast it."
        )
    if x.shape[1] > 1 and x.shape[0] > 0 and x.stride(1) != 1:
        raise ValueError(f"{name}: {label} has strides {x.stride()}; needs (any, 1). Pass {label}.contiguous().")
    if max(x.shape) >= SIZE_LIMIT:
        raise ValueError(f"{name}: {label} is {list(x.shape)}; needs dimensions below 2^31 - 4096. Split it.")


def check_vector(name: str, label: str, vector: Tensor, size: int, remedy: str) -> None:
    """Raise ValueError unless it is [size] fp32, contiguous."""
    if vector.shape != (size,) or vector.dtype is not torch.float32 or not vector.is_contiguous():
        got = f"{list(vector.shape)} {vector.dtype}, strides {vector.stride()}"
        raise ValueError(f"{name}: {label} is {got}; needs [{size}] torch.float32, contiguous. {remedy}.")


def check_statistics(name: str, stats: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless it is int64 of that shape, contiguous, or None."""
    if stats is not None and (stats.shape != shape or stats.dtype is not torch.int64 or not stats.is_contiguous()):
        got = f"{list(stats.shape)} {stats.dtype}, strides {stats.stride()}"
        remedy = f"Pass torch.zeros({list(shape)}, dtype=torch.int64)"
        raise ValueError(f"{name}: stats is {got}; needs {list(shape)} torch.int64, contiguous. {remedy}.")
