"""Gluon variants of the blockwise FP8 GEMMs for Hopper: warps are specialised by hand, not by Triton.

The operation, its formula and its operands are those of gemm.py (b in blocks of 128x128: fprop, dgrad) and of
gemm_wgrad.py (b in blocks of 1x128: wgrad); these are their entries with MATH_GROUPS, gemm_gluon_launch.py starts them.

One TMA producer warp fills a ring of STAGES slots of shared memory; each of MATH_GROUPS warpgroups multiplies its 64
rows of a, or its WAVES of 64, by BLOCK_N rows of b in a slot. ABREAST of them have the same rows of a, and each its own
of b: a tile is that many times as wide and as low, for results of few rows. full[slot] completes when the bytes of a
slot have come, empty[slot] when every warpgroup has read it; nobody waits for empty[STAGES], which takes what a
warpgroup gives back before it has had a slot. Both sides take the slots in turn, also across the tiles of a program
(next_slot). IN_FLIGHT = 2 starts a second block of K before the first is promoted. AHEAD: the K loop waits for the slot
after this one, and the producer ends with a slot without bytes, so that there is one; with b in blocks of 1x128 only.
The loops are in gemm_gluon_sum.py. Structure as in DeepGEMM. Figures, compiled and measured: kernels/README.md.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from fp8train.kernels.gemm_gluon_sum import (
    BOX_M,
    next_slot,
    quad_layout,
    sum_ahead,
    sum_layout,
    sum_of_blocks,
    sum_of_waves,
)
from fp8train.kernels.gemm_tile import BLOCK_K, num_blocks, tile_at

# renamed between Triton 3.6 and 3.9, where the old names raise; the second, or the last line, goes with Triton 3.6
_load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_store_box = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
_UNDERSCORED = gl.constexpr(not hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def _produce(
    a_desc, b_desc, b_scale_desc, ring, M, N, K, group_m,
    BOXES: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, ABREAST: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """Fill the slots: every block of K of every tile of this program.

    With AHEAD, row 64 h + 8 p + 2 q + e of b in a slot is row 16 p + 4 q + 2 h + e of a warpgroup's; b_desc has a
    dimension for each of p, q, h and e, and a box for each h.
    """
    a_smem, b_smem, b_scale_smem, full, empty = ring
    BLOCK_M: gl.constexpr = BOXES * BOX_M
    # of a slot; what lies past an edge counts, as zeros
    TILE_N: gl.constexpr = ABREAST * BLOCK_N
    BYTES: gl.constexpr = (BLOCK_M + TILE_N) * BLOCK_K + (0 if b_scale_desc is None else 4 * TILE_N)
    slot = 0
    phase = 1  # of barriers that have completed nothing, this parity counts as complete: the first round does not wait
    for index in range(gl.program_id(0), num_blocks(M, BLOCK_M) * num_blocks(N, TILE_N), gl.num_programs(0)):
        tile_m, tile_n = tile_at(index, M, N, BLOCK_M, TILE_N, group_m)
        for k in range(0, num_blocks(K, BLOCK_K)):
            mbarrier.wait(empty.index(slot), phase)
            mbarrier.expect(full.index(slot), BYTES)
            for box in gl.static_range(BOXES):
                row = tile_m * BLOCK_M + box * BOX_M
                _load_box(a_desc, [row, k * BLOCK_K], full.index(slot), a_smem.index(slot * BOXES + box))
            for box in gl.static_range(ABREAST):
                block_n = tile_n * ABREAST + box
                to = slot * ABREAST + box
                if AHEAD:
                    if _UNDERSCORED:
                        halves = b_smem.index(to)._reinterpret(b_desc.dtype, [2] + b_desc.block_shape, b_desc.layout)
                    else:
                        halves = b_smem.index(to).reinterpret(b_desc.dtype, [2] + b_desc.block_shape, b_desc.layout)
                    for half in gl.static_range(2):
                        corner = [block_n * (BLOCK_N // 16), 0, half, 0, k * BLOCK_K]
                        _load_box(b_desc, corner, full.index(slot), halves.index(half))
                else:
                    _load_box(b_desc, [block_n * BLOCK_N, k * BLOCK_K], full.index(slot), b_smem.index(to))
                if b_scale_desc is not None:
                    _load_box(b_scale_desc, [k, block_n * BLOCK_N], full.index(slot), b_scale_smem.index(to))
            slot, phase = next_slot(slot, phase, STAGES)
    if AHEAD:
        mbarrier.wait(empty.index(slot), phase)
        mbarrier.arrive(full.index(slot), count=1)


@gluon.jit
def _store(
    acc, c_desc, c_ptr, bias_ptr, c_smem, row, block_n, M, N, stride_cm,
    BLOCK_N: gl.constexpr, BIAS: gl.constexpr, ACCUMULATE: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """Write 64 rows from `row` on, of block_n's BLOCK_N columns, or add them; what lies past an edge is nobody's.

    The sum is made in L2, to which the numbers are sent and nothing is waited for: read back, added and stored, they
    held up the next tile by a tenth of this one's time (H200, 2026-11-26). L2 rounds as FMA does, but takes numbers
    below 2^-126 for zero (PTX ISA, red.add.f32). Each is added to once in a launch: the order is no question.
    """
    layout: gl.constexpr = quad_layout(BLOCK_N) if AHEAD else sum_layout(BLOCK_N)
    cols = gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))  # of the block: 32-bit numbers fit the registers
    first_col, width = gl.cast(block_n, gl.int64) * BLOCK_N, N - block_n * BLOCK_N
    if BIAS:
        bias = gl.load(bias_ptr + first_col + cols, mask=cols < width, other=0.0).to(gl.float32)
        acc += gl.expand_dims(bias, 0)
    if c_desc is not None:
        tma.store_wait(0)  # what was stored before has been read out of c_smem
        c_smem.store(acc.to(c_desc.dtype))
        fence_async_shared()
        _store_box(c_desc, [row, block_n * BLOCK_N], c_smem)
    else:
        rows = gl.cast(row, gl.int64) + gl.arange(0, BOX_M, gl.SliceLayout(1, layout))
        c_ptrs = gl.expand_dims(c_ptr + first_col + rows * stride_cm, 1) + gl.expand_dims(cols, 0)
        inside = gl.expand_dims(rows < M, 1) & gl.expand_dims(cols < width, 0)
        if ACCUMULATE:
            gl.atomic_add(c_ptrs, acc, mask=inside, sem="relaxed")
        else:
            gl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=inside)


@gluon.jit
def _multiply_waves(
    c_desc, c_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, ring, c_smem, M, N, K, strides, group_m,
    GROUP: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """Rows GROUP * 128 and on of every tile of 256 rows of this program, by one warpgroup; b in blocks of 128x128."""
    stride_cm, stride_sam, stride_sak, stride_sbn, stride_sbk = strides
    layout: gl.constexpr = sum_layout(BLOCK_N)
    zero = gl.zeros([BOX_M, BLOCK_N], gl.float32, layout)
    blocks = num_blocks(K, BLOCK_K)
    a_step, b_step = gl.cast(stride_sak, gl.int64), gl.cast(stride_sbk, gl.int64)
    slot = 0
    phase = 0
    for index in range(gl.program_id(0), num_blocks(M, 4 * BOX_M) * num_blocks(N, BLOCK_N), gl.num_programs(0)):
        tile_m, tile_n = tile_at(index, M, N, 4 * BOX_M, BLOCK_N, group_m)
        row = tile_m * 4 * BOX_M + GROUP * 2 * BOX_M
        rows = gl.cast(row, gl.int64) + gl.arange(0, BOX_M, gl.SliceLayout(1, layout))
        a_scale_ptrs = a_scale_ptr + gl.minimum(rows, M - 1) * stride_sam
        a_scale_ptrs_2 = a_scale_ptr + gl.minimum(rows + BOX_M, M - 1) * stride_sam
        b_scale_ptrs = b_scale_ptr + gl.cast(tile_n, gl.int64) * BLOCK_N // 128 * stride_sbn
        acc, acc_2, slot, phase = sum_of_waves(
            ring, a_scale_ptrs, a_scale_ptrs_2, b_scale_ptrs, a_step, b_step, blocks, slot, phase, zero,
            GROUP, STAGES,
        )  # fmt: skip
        box = c_smem.index(GROUP)
        _store(acc, c_desc, c_ptr, bias_ptr, box, row, tile_n, M, N, stride_cm, BLOCK_N, BIAS, False, False)
        _store(acc_2, c_desc, c_ptr, bias_ptr, box, row + BOX_M, tile_n, M, N, stride_cm, BLOCK_N, BIAS, False, False)
    if c_desc is not None:
        tma.store_wait(0)


@gluon.jit
def _multiply(
    c_desc, c_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, ring, c_smem, M, N, K, strides, group_m,
    GROUP: gl.constexpr, MATH_GROUPS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    IN_FLIGHT: gl.constexpr, B_ROWS: gl.constexpr, BIAS: gl.constexpr, ACCUMULATE: gl.constexpr,
    ABREAST: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """64 rows and BLOCK_N columns of every tile of this program, by one warpgroup: GROUP // ABREAST and GROUP % ABREAST
    say which.
    """
    BLOCK_M: gl.constexpr = MATH_GROUPS // ABREAST * BOX_M
    TILE_N: gl.constexpr = ABREAST * BLOCK_N
    stride_cm, stride_sam, stride_sak, stride_sbn, stride_sbk = strides
    layout: gl.constexpr = quad_layout(BLOCK_N) if AHEAD else sum_layout(BLOCK_N)
    zero = gl.zeros([BOX_M, BLOCK_N], gl.float32, sum_layout(BLOCK_N))
    blocks = num_blocks(K, BLOCK_K)
    a_step, b_step = gl.cast(stride_sak, gl.int64), gl.cast(stride_sbk, gl.int64)
    slot = 0
    phase = 0
    held, held_2 = STAGES, STAGES  # none: a barrier that nobody waits for
    if AHEAD:
        mbarrier.wait(ring[3].index(slot), phase)
    for index in range(gl.program_id(0), num_blocks(M, BLOCK_M) * num_blocks(N, TILE_N), gl.num_programs(0)):
        tile_m, tile_n = tile_at(index, M, N, BLOCK_M, TILE_N, group_m)
        row, block_n = tile_m * BLOCK_M + GROUP // ABREAST * BOX_M, tile_n * ABREAST + GROUP % ABREAST
        rows = gl.cast(row, gl.int64) + gl.arange(0, BOX_M, gl.SliceLayout(1, layout))
        a_scale_ptrs = a_scale_ptr + gl.minimum(rows, M - 1) * stride_sam
        b_scale_ptrs = b_scale_ptr
        if B_ROWS != 1:
            b_scale_ptrs += gl.cast(block_n, gl.int64) * BLOCK_N // B_ROWS * stride_sbn
        if AHEAD:
            acc, slot, phase, held = sum_ahead(
                ring, a_scale_ptrs, a_step, blocks, slot, phase, held, zero,
                GROUP, MATH_GROUPS, BLOCK_N, STAGES, ABREAST,
            )  # fmt: skip
        else:
            acc, slot, phase, held, held_2 = sum_of_blocks(
                ring, a_scale_ptrs, b_scale_ptrs, a_step, b_step, blocks, slot, phase, held, held_2, zero,
                GROUP, MATH_GROUPS, BLOCK_N, STAGES, IN_FLIGHT, B_ROWS, ABREAST,
            )  # fmt: skip
        _store(
            acc, c_desc, c_ptr, bias_ptr, c_smem.index(GROUP), row, block_n, M, N, stride_cm,
            BLOCK_N, BIAS, ACCUMULATE, AHEAD,
        )  # fmt: skip
    if c_desc is not None:
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "K", "group_m"])
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
    MATH_GROUPS: gl.constexpr, WAVES: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    IN_FLIGHT: gl.constexpr, B_ROWS: gl.constexpr, BIAS: gl.constexpr, ACCUMULATE: gl.constexpr,
    ABREAST: gl.constexpr, AHEAD: gl.constexpr, MATH_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    BOXES: gl.constexpr = MATH_GROUPS // ABREAST * WAVES
    a_smem = gl.allocate_shared_memory(a_desc.dtype, [STAGES * BOXES, BOX_M, BLOCK_K], a_desc.layout)
    b_smem = gl.allocate_shared_memory(b_desc.dtype, [STAGES * ABREAST, BLOCK_N, BLOCK_K], a_desc.layout)
    c_smem, b_scale_smem = b_smem, b_smem  # stand-ins where they are not used
    if c_desc is not None:
        c_smem = gl.allocate_shared_memory(c_desc.dtype, [MATH_GROUPS, BOX_M, BLOCK_N], c_desc.layout)
    if b_scale_desc is not None:
        b_scale_smem = gl.allocate_shared_memory(gl.float32, [STAGES * ABREAST, 1, BLOCK_N], b_scale_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=MATH_GROUPS)
    mbarrier.init(empty.index(STAGES), count=MATH_GROUPS)
    fence_async_shared()
    ring = (a_smem, b_smem, b_scale_smem, full, empty)
    strides = (stride_cm, stride_sam, stride_sak, stride_sbn, stride_sbk)
    # fmt: off
    if WAVES == 2:
        gl.warp_specialize([
            (_multiply_waves, (c_desc, c_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, ring, c_smem, M, N, K, strides,
                group_m, 0, BLOCK_N, STAGES, BIAS)),
            (_multiply_waves, (c_desc, c_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, ring, c_smem, M, N, K, strides,
                group_m, 1, BLOCK_N, STAGES, BIAS)),
            (_produce, (a_desc, b_desc, b_scale_desc, ring, M, N, K, group_m, BOXES, BLOCK_N, STAGES, ABREAST, AHEAD)),
        ], [4, 1], [MATH_REGISTERS, PRODUCER_REGISTERS])
    elif MATH_GROUPS == 2:
        gl.warp_specialize([
            (_multiply, (c_desc, c_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, ring, c_smem, M, N, K, strides, group_m, 0,
                MATH_GROUPS, BLOCK_N, STAGES, IN_FLIGHT, B_ROWS, BIAS, ACCUMULATE, ABREAST, AHEAD)),
            (_multiply, (c_desc, c_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, ring, c_smem, M, N, K, strides, group_m, 1,
                MATH_GROUPS, BLOCK_N, STAGES, IN_FLIGHT, B_ROWS, BIAS, ACCUMULATE, ABREAST, AHEAD)),
            (_produce, (a_desc, b_desc, b_scale_desc, ring, M, N, K, group_m, BOXES, BLOCK_N, STAGES, ABREAST, AHEAD)),
        ], [4, 1], [MATH_REGISTERS, PRODUCER_REGISTERS])
    else:
        gl.warp_specialize([
            (_multiply, (c_desc, c_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, ring, c_smem, M, N, K, strides, group_m, 0,
                MATH_GROUPS, BLOCK_N, STAGES, IN_FLIGHT, B_ROWS, BIAS, ACCUMULATE, ABREAST, AHEAD)),
            (_multiply, (c_desc, c_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, ring, c_smem, M, N, K, strides, group_m, 1,
                MATH_GROUPS, BLOCK_N, STAGES, IN_FLIGHT, B_ROWS, BIAS, ACCUMULATE, ABREAST, AHEAD)),
            (_multiply, (c_desc, c_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, ring, c_smem, M, N, K, strides, group_m, 2,
                MATH_GROUPS, BLOCK_N, STAGES, IN_FLIGHT, B_ROWS, BIAS, ACCUMULATE, ABREAST, AHEAD)),
            (_produce, (a_desc, b_desc, b_scale_desc, ring, M, N, K, group_m, BOXES, BLOCK_N, STAGES, ABREAST, AHEAD)),
        ], [4, 4, 1], [MATH_REGISTERS, MATH_REGISTERS, PRODUCER_REGISTERS])
    # fmt: on
