"""Gluon variants of the blockwise FP8 GEMMs for Hopper: warps are specialised by hand, not by Triton.

The operation, its formula and its operands are those of gemm.py (b in blocks of 128x128: fprop, dgrad) and of
gemm_wgrad.py (b in blocks of 1x128: wgrad), whose launchers come here for their entries that have MATH_GROUPS.

One TMA producer warp fills a ring of STAGES slots of shared memory; each of MATH_GROUPS warpgroups multiplies its 64
rows of a by the BLOCK_N rows of b in a slot. full[slot] completes when the bytes of a slot have come, empty[slot] when
every warpgroup has read it. Both sides take the slots in turn, also across the tiles of a program (_next_slot).
IN_FLIGHT = 2 starts a second block of K before the first is promoted.
Structure as in DeepGEMM. Measured: not yet; registers, spills and instructions in kernels/README.md.
"""

from collections.abc import Hashable, Mapping

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fp8train.kernels.gemm_tile import BLOCK_K, multiprocessors, num_blocks, scale_rows, tile_at, tma_reads
from fp8train.kernels.launch import first_launch

BOX_M = gl.constexpr(64)  # rows of a warpgroup
# renamed between Triton 3.6 and 3.9, where the old names raise; the second goes with Triton 3.6
_load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_store_box = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
# Of the 512 registers that a thread of each warpgroup has together: by number of math warpgroups, those of a math
# thread and of the producer's (multiples of 8).
REGISTERS = {2: (232, 40), 3: (160, 32)}


@gluon.constexpr_function
def _sum_layout(BLOCK_N):
    """Of the sums of a warpgroup, as its tensor-core instructions leave them."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 32])


@gluon.jit
def _next_slot(slot, phase, STAGES: gl.constexpr):
    """The slot after this one, and the parity that its barriers complete: it turns when the slots start anew."""
    slot += 1
    if slot == STAGES:
        slot = 0
        phase ^= 1
    return slot, phase


@gluon.jit
def _produce(
    a_desc, b_desc, b_scale_desc, ring, M, N, K, group_m,
    MATH_GROUPS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the slots: every block of K of every tile of this program."""
    a_smem, b_smem, b_scale_smem, full, empty = ring
    BLOCK_M: gl.constexpr = MATH_GROUPS * BOX_M
    # of a slot; what lies past an edge counts, as zeros
    BYTES: gl.constexpr = (BLOCK_M + BLOCK_N) * BLOCK_K + (0 if b_scale_desc is None else 4 * BLOCK_N)
    slot = 0
    phase = 1  # of barriers that have completed nothing, this parity counts as complete: the first round does not wait
    for index in range(gl.program_id(0), num_blocks(M, BLOCK_M) * num_blocks(N, BLOCK_N), gl.num_programs(0)):
        tile_m, tile_n = tile_at(index, M, N, BLOCK_M, BLOCK_N, group_m)
        for k in range(0, num_blocks(K, BLOCK_K)):
            mbarrier.wait(empty.index(slot), phase)
            mbarrier.expect(full.index(slot), BYTES)
            for group in gl.static_range(MATH_GROUPS):
                row = tile_m * BLOCK_M + group * BOX_M
                _load_box(a_desc, [row, k * BLOCK_K], full.index(slot), a_smem.index(slot * MATH_GROUPS + group))
            _load_box(b_desc, [tile_n * BLOCK_N, k * BLOCK_K], full.index(slot), b_smem.index(slot))
            if b_scale_desc is not None:
                _load_box(b_scale_desc, [k, tile_n * BLOCK_N], full.index(slot), b_scale_smem.index(slot))
            slot, phase = _next_slot(slot, phase, STAGES)


@gluon.jit
def _start(ring, slot, phase, zero, GROUP: gl.constexpr, MATH_GROUPS: gl.constexpr):
    """Wait for the bytes of a slot and start its multiplication."""
    a_smem, b_smem, b_scale_smem, full, empty = ring
    mbarrier.wait(full.index(slot), phase)
    a, b = a_smem.index(slot * MATH_GROUPS + GROUP), b_smem.index(slot).permute((1, 0))
    return warpgroup_mma(a, b, zero, use_acc=False, is_async=True)


@gluon.jit
def _scales(a_scale_ptrs, b_scale_ptrs, k, blocks, a_step, b_step, B_ROWS: gl.constexpr):
    """Scales of a block of K by global memory; past the last, that one's again, which nobody uses."""
    k = gl.minimum(k, blocks - 1)
    a_scale = gl.load(a_scale_ptrs + k * a_step)
    b_scale = 1.0  # those of b's rows come with the slot
    if B_ROWS != 1:
        b_scale = gl.load(b_scale_ptrs + k * b_step)
    return a_scale, b_scale


@gluon.jit
def _promoted(acc, partial, scale, ring, slot, BLOCK_N: gl.constexpr, B_ROWS: gl.constexpr):
    """acc + partial * RN(a_scale * b_scale), rounded once; the slot, whose multiplication has ended, is given back."""
    a_smem, b_smem, b_scale_smem, full, empty = ring
    if B_ROWS == 1:
        columns: gl.constexpr = gl.SliceLayout(0, _sum_layout(BLOCK_N))
        b_scale = b_scale_smem.index(slot).reshape([BLOCK_N]).load(columns)
        acc = gl.fma(partial, gl.expand_dims(scale, 1) * gl.expand_dims(b_scale, 0), acc)
        mbarrier.arrive(empty.index(slot), count=1)
    else:
        mbarrier.arrive(empty.index(slot), count=1)
        acc = gl.fma(partial, gl.broadcast(gl.expand_dims(scale, 1), acc)[0], acc)
    return acc


@gluon.jit
def _sum(
    ring, a_scale_ptrs, b_scale_ptrs, a_step, b_step, blocks, slot, phase, zero,
    GROUP: gl.constexpr, MATH_GROUPS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    IN_FLIGHT: gl.constexpr, B_ROWS: gl.constexpr,
):  # fmt: skip
    """The promoted sum over all blocks of K, with the slot and phase after them.

    Scales are read while the block before is multiplied, after the product of that one's has been formed: so they need
    no registers of their own, and no instruction that waits for them stands between tensor-core instructions.
    """
    acc = zero
    a_scale, b_scale = _scales(a_scale_ptrs, b_scale_ptrs, 0, blocks, a_step, b_step, B_ROWS)
    if IN_FLIGHT == 2:
        a_scale_2, b_scale_2 = _scales(a_scale_ptrs, b_scale_ptrs, 1, blocks, a_step, b_step, B_ROWS)
        for k in range(0, blocks - 1, 2):
            scale, scale_2 = a_scale * b_scale, a_scale_2 * b_scale_2
            partial = _start(ring, slot, phase, zero, GROUP, MATH_GROUPS)
            slot_2, phase_2 = _next_slot(slot, phase, STAGES)
            partial_2 = _start(ring, slot_2, phase_2, zero, GROUP, MATH_GROUPS)
            a_scale, b_scale = _scales(a_scale_ptrs, b_scale_ptrs, k + 2, blocks, a_step, b_step, B_ROWS)
            a_scale_2, b_scale_2 = _scales(a_scale_ptrs, b_scale_ptrs, k + 3, blocks, a_step, b_step, B_ROWS)
            partial, partial_2 = warpgroup_mma_wait(1, deps=(partial, partial_2))
            acc = _promoted(acc, partial, scale, ring, slot, BLOCK_N, B_ROWS)
            partial_2 = warpgroup_mma_wait(0, deps=(partial_2,))
            acc = _promoted(acc, partial_2, scale_2, ring, slot_2, BLOCK_N, B_ROWS)
            slot, phase = _next_slot(slot_2, phase_2, STAGES)
        if blocks % 2 == 1:
            partial = _start(ring, slot, phase, zero, GROUP, MATH_GROUPS)
            partial = warpgroup_mma_wait(0, deps=(partial,))
            acc = _promoted(acc, partial, a_scale * b_scale, ring, slot, BLOCK_N, B_ROWS)
            slot, phase = _next_slot(slot, phase, STAGES)
    else:
        for k in range(0, blocks):
            scale = a_scale * b_scale
            partial = _start(ring, slot, phase, zero, GROUP, MATH_GROUPS)
            a_scale, b_scale = _scales(a_scale_ptrs, b_scale_ptrs, k + 1, blocks, a_step, b_step, B_ROWS)
            partial = warpgroup_mma_wait(0, deps=(partial,))
            acc = _promoted(acc, partial, scale, ring, slot, BLOCK_N, B_ROWS)
            slot, phase = _next_slot(slot, phase, STAGES)
    return acc, slot, phase


@gluon.jit
def _multiply(
    c_desc, c_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, ring, c_smem, M, N, K, strides, group_m,
    GROUP: gl.constexpr, MATH_GROUPS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    IN_FLIGHT: gl.constexpr, B_ROWS: gl.constexpr, BIAS: gl.constexpr, ACCUMULATE: gl.constexpr,
):  # fmt: skip
    """Rows GROUP * 64 and on of every tile of this program, by one warpgroup."""
    BLOCK_M: gl.constexpr = MATH_GROUPS * BOX_M
    stride_cm, stride_sam, stride_sak, stride_sbn, stride_sbk = strides
    layout: gl.constexpr = _sum_layout(BLOCK_N)
    zero = gl.zeros([BOX_M, BLOCK_N], gl.float32, layout)
    blocks = num_blocks(K, BLOCK_K)
    a_step, b_step = gl.cast(stride_sak, gl.int64), gl.cast(stride_sbk, gl.int64)
    slot = 0
    phase = 0
    for index in range(gl.program_id(0), num_blocks(M, BLOCK_M) * num_blocks(N, BLOCK_N), gl.num_programs(0)):
        tile_m, tile_n = tile_at(index, M, N, BLOCK_M, BLOCK_N, group_m)
        first = gl.cast(tile_m, gl.int64) * BLOCK_M + GROUP * BOX_M
        rows = first + gl.arange(0, BOX_M, gl.SliceLayout(1, layout))
        cols = gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))  # of the tile: 32-bit numbers fit the registers
        first_col, width = gl.cast(tile_n, gl.int64) * BLOCK_N, N - tile_n * BLOCK_N
        a_scale_ptrs = a_scale_ptr + gl.minimum(rows, M - 1) * stride_sam
        b_scale_ptrs = b_scale_ptr
        if B_ROWS != 1:
            b_scale_ptrs += first_col // B_ROWS * stride_sbn
        acc, slot, phase = _sum(
            ring, a_scale_ptrs, b_scale_ptrs, a_step, b_step, blocks, slot, phase, zero,
            GROUP, MATH_GROUPS, BLOCK_N, STAGES, IN_FLIGHT, B_ROWS,
        )  # fmt: skip
        if BIAS:
            bias = gl.load(bias_ptr + first_col + cols, mask=cols < width, other=0.0).to(gl.float32)
            acc += gl.expand_dims(bias, 0)
        if c_desc is not None:
            tma.store_wait(0)  # the tile before has been read out of c_smem
            c_smem.index(GROUP).store(acc.to(c_desc.dtype))
            fence_async_shared()
            _store_box(c_desc, [tile_m * BLOCK_M + GROUP * BOX_M, tile_n * BLOCK_N], c_smem.index(GROUP))
        else:
            c_ptrs = gl.expand_dims(c_ptr + first_col + rows * stride_cm, 1) + gl.expand_dims(cols, 0)
            inside = gl.expand_dims(rows < M, 1) & gl.expand_dims(cols < width, 0)
            if ACCUMULATE:
                acc += gl.load(c_ptrs, mask=inside, other=0.0)
            gl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=inside)
    if c_desc is not None:
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["group_m"])
def _gemm_gluon_kernel(
    a_desc,  # [M, K] fp8, boxes of 64x128
    b_desc,  # [N, K] fp8, boxes of BLOCK_Nx128
    b_scale_desc,  # [ceil(K/128), N], boxes of 1xBLOCK_N; None: b_scale_ptr, of blocks of 128x128
    c_desc,  # [M, N] bf16, boxes of 64xBLOCK_N; None: c is written through c_ptr
    c_ptr,  # [M, N] bf16 or fp32
    a_scale_ptr,  # [M, ceil(K/128)]
    b_scale_ptr,  # [ceil(N/128), ceil(K/128)]
    bias_ptr,  # [N]
    M, N, K, stride_cm, stride_sam, stride_sak, stride_sbn, stride_sbk,
    group_m,  # rows of tiles that follow each other, a column at a time
    MATH_GROUPS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    IN_FLIGHT: gl.constexpr, B_ROWS: gl.constexpr, BIAS: gl.constexpr, ACCUMULATE: gl.constexpr,
    MATH_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    a_smem = gl.allocate_shared_memory(a_desc.dtype, [STAGES * MATH_GROUPS, BOX_M, BLOCK_K], a_desc.layout)
    b_smem = gl.allocate_shared_memory(b_desc.dtype, [STAGES, BLOCK_N, BLOCK_K], b_desc.layout)
    c_smem, b_scale_smem = b_smem, b_smem  # stand-ins where they are not used
    if c_desc is not None:
        c_smem = gl.allocate_shared_memory(c_desc.dtype, [MATH_GROUPS, BOX_M, BLOCK_N], c_desc.layout)
    if b_scale_desc is not None:
        b_scale_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_N], b_scale_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=MATH_GROUPS)
    fence_async_shared()
    ring = (a_smem, b_smem, b_scale_smem, full, empty)
    strides = (stride_cm, stride_sam, stride_sak, stride_sbn, stride_sbk)
    # fmt: off
    if MATH_GROUPS == 2:
        gl.warp_specialize([
            (_multiply, (c_desc, c_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, ring, c_smem, M, N, K, strides, group_m, 0,
                MATH_GROUPS, BLOCK_N, STAGES, IN_FLIGHT, B_ROWS, BIAS, ACCUMULATE)),
            (_multiply, (c_desc, c_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, ring, c_smem, M, N, K, strides, group_m, 1,
                MATH_GROUPS, BLOCK_N, STAGES, IN_FLIGHT, B_ROWS, BIAS, ACCUMULATE)),
            (_produce, (a_desc, b_desc, b_scale_desc, ring, M, N, K, group_m, MATH_GROUPS, BLOCK_N, STAGES)),
        ], [4, 1], [MATH_REGISTERS, PRODUCER_REGISTERS])
    else:
        gl.warp_specialize([
            (_multiply, (c_desc, c_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, ring, c_smem, M, N, K, strides, group_m, 0,
                MATH_GROUPS, BLOCK_N, STAGES, IN_FLIGHT, B_ROWS, BIAS, ACCUMULATE)),
            (_multiply, (c_desc, c_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, ring, c_smem, M, N, K, strides, group_m, 1,
                MATH_GROUPS, BLOCK_N, STAGES, IN_FLIGHT, B_ROWS, BIAS, ACCUMULATE)),
            (_multiply, (c_desc, c_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, ring, c_smem, M, N, K, strides, group_m, 2,
                MATH_GROUPS, BLOCK_N, STAGES, IN_FLIGHT, B_ROWS, BIAS, ACCUMULATE)),
            (_produce, (a_desc, b_desc, b_scale_desc, ring, M, N, K, group_m, MATH_GROUPS, BLOCK_N, STAGES)),
        ], [4, 4, 1], [MATH_REGISTERS, MATH_REGISTERS, PRODUCER_REGISTERS])
    # fmt: on


def compile_cases(operation, configs):
    """Their Gluon entries as launched on aligned operands: (name, kernel, signature, constexprs, options)."""
    scalars = ("M", "N", "K", "stride_cm", "stride_sak", "stride_sbk")
    signature = {"c_ptr": "*fp32", "a_scale_ptr": "*fp32", "b_scale_ptr": "*fp32"} | dict.fromkeys(scalars, "i32")
    signature |= {"group_m": "i32"}
    if operation == "gemm":
        signature |= {"stride_sbn": "i32"}
        outputs = {"bf16": {"c_ptr": "*bf16", "c_desc": ("bf16", BOX_M.value, 128)}, "fp32 bias": {"bias_ptr": "*fp32"}}
        flags = {"B_ROWS": 128, "ACCUMULATE": False}
    else:
        outputs = {"": {"b_scale_desc": ("fp32", 1, 128)}}
        flags = {"B_ROWS": 1, "ACCUMULATE": True, "stride_sbn": 1}
    cases = []
    for name, entry in configs.items():
        if "MATH_GROUPS" not in entry:
            continue
        for output, types in outputs.items():
            boxes = {"a_desc": ("fp8e4nv", BOX_M.value, 128), "b_desc": ("fp8e4nv", entry["BLOCK_N"], 128)} | types
            made = signature | {key: kind if isinstance(kind, str) else _box_type(*kind) for key, kind in boxes.items()}
            constants = entry | _registers(entry) | flags | {"stride_sam": 1, "BIAS": "bias_ptr" in types}
            constants = {key: value for key, value in constants.items() if key != "GROUP_M"}
            options = {"gluon": True, "num_warps": 4, "enable_fp_fusion": True, "odd": ("group_m",)}
            cases.append((f"{operation} {name} {output}".rstrip(), _gemm_gluon_kernel, made, constants, options))
    return cases


def launch(
    key: Hashable,
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None,
    entry: Mapping[str, int],
    b_rows: int,
    accumulate: bool,
) -> None:
    """out = a @ b.T + bias, or out += a @ b.T, the first time with operands of these properties.

    Args:
        key: as for first_launch.
        a, b, out, a_scale, b_scale, bias: as gemm_launch.py has checked them.
        entry: of the operation's CONFIGS.
        b_rows: rows of a block of b, 128 or 1.
    """
    (M, K), N = a.shape, b.shape[0]
    constants = {name: value for name, value in entry.items() if name != "GROUP_M"}
    box_n = entry["BLOCK_N"]
    boxes = {"a_desc": _described(a, BOX_M.value, BLOCK_K.value), "b_desc": _described(b, box_n, BLOCK_K.value)}
    tensors = {"a_desc": 0, "b_desc": 1, "c_ptr": 2, "a_scale_ptr": 3, "b_scale_ptr": 4, "bias_ptr": 5}
    if b_rows == 1:
        boxes["b_scale_desc"] = _described(scale_rows(b_scale), 1, box_n)
        tensors["b_scale_desc"] = 4
    if out.dtype is torch.bfloat16 and tma_reads(out):
        boxes["c_desc"] = _described(out, BOX_M.value, box_n)
        tensors["c_desc"] = 2
    tiles = -(-M // (entry["MATH_GROUPS"] * BOX_M.value)) * -(-N // box_n)
    arguments = {
        "b_scale_desc": None, "c_desc": None, **boxes, "c_ptr": out, "a_scale_ptr": a_scale, "b_scale_ptr": b_scale,
        "bias_ptr": bias, "M": M, "N": N, "K": K, "group_m": entry["GROUP_M"], "stride_cm": out.stride(0),
        "stride_sam": a_scale.stride(0), "stride_sak": a_scale.stride(1), "stride_sbn": b_scale.stride(0),
        "stride_sbk": b_scale.stride(1), "B_ROWS": b_rows, "BIAS": bias is not None, "ACCUMULATE": accumulate,
        **constants, **_registers(entry),
    }  # fmt: skip
    grid = (min(tiles, multiprocessors(a.device)),)
    first_launch(key, _gemm_gluon_kernel, grid, arguments, tensors, a.device, num_warps=4, enable_fp_fusion=True)


def _described(x: torch.Tensor, rows: int, cols: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, cols], _box_layout(rows, x.element_size()))


def _box_layout(rows: int, element_size: int) -> gl.NVMMASharedLayout:
    """Boxes of operands and results are swizzled as the tensor cores read them; a row of scales lies as it is."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128 if rows > 1 else 0, element_bitwidth=8 * element_size, rank=2)


def _box_type(kind: str, rows: int, cols: int) -> str:
    size = {"fp8e4nv": 1, "bf16": 2, "fp32": 4}[kind]
    return f"tensordesc<{kind}[{rows}, {cols}],{_box_layout(rows, size)!r}>"


def _registers(entry: Mapping[str, int]) -> dict[str, int]:
    math, producer = REGISTERS[entry["MATH_GROUPS"]]
    return {"MATH_REGISTERS": math, "PRODUCER_REGISTERS": producer}
