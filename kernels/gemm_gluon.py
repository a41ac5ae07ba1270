"""Gluon variants of the blockwise FP8 GEMMs for Hopper: warps are specialised by hand, not by Triton.

The operation, its formula and its operands are those of gemm.py (b in blocks of 128x128: fprop, dgrad) and of
gemm_wgrad.py (b in blocks of 1x128: wgrad); these are their entries with MATH_GROUPS, gemm_gluon_launch.py starts them.

One TMA producer warp fills a ring of STAGES slots of shared memory; each of MATH_GROUPS warpgroups multiplies its 64
rows of a, or its WAVES of 64, by the BLOCK_N rows of b in a slot. full[slot] completes when the bytes of a slot have
come, empty[slot] when every warpgroup has read it; nobody waits for empty[STAGES], which takes what a warpgroup gives
back before it has had a slot. Both sides take the slots in turn, also across the tiles of a program (_next_slot).
IN_FLIGHT = 2 starts a second block of K before the first is promoted.
Structure as in DeepGEMM. Figures, compiled and measured: kernels/README.md.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fp8train.kernels.gemm_tile import BLOCK_K, num_blocks, tile_at

BOX_M = gl.constexpr(64)  # rows of a warpgroup
# renamed between Triton 3.6 and 3.9, where the old names raise; the second goes with Triton 3.6
_load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_store_box = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


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
    BOXES: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the slots: every block of K of every tile of this program."""
    a_smem, b_smem, b_scale_smem, full, empty = ring
    BLOCK_M: gl.constexpr = BOXES * BOX_M
    # of a slot; what lies past an edge counts, as zeros
    BYTES: gl.constexpr = (BLOCK_M + BLOCK_N) * BLOCK_K + (0 if b_scale_desc is None else 4 * BLOCK_N)
    slot = 0
    phase = 1  # of barriers that have completed nothing, this parity counts as complete: the first round does not wait
    for index in range(gl.program_id(0), num_blocks(M, BLOCK_M) * num_blocks(N, BLOCK_N), gl.num_programs(0)):
        tile_m, tile_n = tile_at(index, M, N, BLOCK_M, BLOCK_N, group_m)
        for k in range(0, num_blocks(K, BLOCK_K)):
            mbarrier.wait(empty.index(slot), phase)
            mbarrier.expect(full.index(slot), BYTES)
            for box in gl.static_range(BOXES):
                row = tile_m * BLOCK_M + box * BOX_M
                _load_box(a_desc, [row, k * BLOCK_K], full.index(slot), a_smem.index(slot * BOXES + box))
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
    """acc + partial * RN(a_scale * b_scale), rounded once.

    Here the scales of b that came with the slot are read; a slot that brought none, whose multiplication has ended, is
    given back.
    """
    a_smem, b_smem, b_scale_smem, full, empty = ring
    if B_ROWS == 1:
        columns: gl.constexpr = gl.SliceLayout(0, _sum_layout(BLOCK_N))
        b_scale = b_scale_smem.index(slot).reshape([BLOCK_N]).load(columns)
        acc = gl.fma(partial, gl.expand_dims(scale, 1) * gl.expand_dims(b_scale, 0), acc)
    else:
        mbarrier.arrive(empty.index(slot), count=1)
        acc = gl.fma(partial, gl.broadcast(gl.expand_dims(scale, 1), acc)[0], acc)
    return acc


@gluon.jit
def _give_back(ring, held, slot, B_ROWS: gl.constexpr):
    """Give back the slot that is held, behind the start of the next multiplication, whose slot is held from here on.

    A barrier of the warpgroup does not wait for what its warps have asked of shared memory: scales that were asked for
    just before came from the block that TMA had put in their place (H200, 2026-11-26: a few columns of 16 rows in some
    tiles of every product, while other warpgroups added to c). A multiplication overwrites the registers of the last
    product: when it has been started, that product has been promoted, and the scales for it have come. That ptxas keeps
    this order is looked up in its code (tests/kernels/sm90.py).
    """
    a_smem, b_smem, b_scale_smem, full, empty = ring
    if B_ROWS == 1:
        mbarrier.arrive(empty.index(held), count=1)
        held = slot
    return held


@gluon.jit
def _sum(
    ring, a_scale_ptrs, b_scale_ptrs, a_step, b_step, blocks, slot, phase, held, held_2, zero,
    GROUP: gl.constexpr, MATH_GROUPS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    IN_FLIGHT: gl.constexpr, B_ROWS: gl.constexpr,
):  # fmt: skip
    """The promoted sum over all blocks of K, with the slot and phase after them, and the slots that are still held.

    Scales of a are read while the block before is multiplied, after the product of that one's has been formed: so they
    need no registers of their own, and no instruction that waits for them stands between tensor-core instructions.
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
            held, held_2 = _give_back(ring, held, slot, B_ROWS), _give_back(ring, held_2, slot_2, B_ROWS)
            a_scale, b_scale = _scales(a_scale_ptrs, b_scale_ptrs, k + 2, blocks, a_step, b_step, B_ROWS)
            a_scale_2, b_scale_2 = _scales(a_scale_ptrs, b_scale_ptrs, k + 3, blocks, a_step, b_step, B_ROWS)
            partial, partial_2 = warpgroup_mma_wait(1, deps=(partial, partial_2))
            acc = _promoted(acc, partial, scale, ring, slot, BLOCK_N, B_ROWS)
            partial_2 = warpgroup_mma_wait(0, deps=(partial_2,))
            acc = _promoted(acc, partial_2, scale_2, ring, slot_2, BLOCK_N, B_ROWS)
            slot, phase = _next_slot(slot_2, phase_2, STAGES)
        if blocks % 2 == 1:  # the second product of a pair may still be promoted: its slot is held on
            partial = _start(ring, slot, phase, zero, GROUP, MATH_GROUPS)
            held = _give_back(ring, held, slot, B_ROWS)
            partial = warpgroup_mma_wait(0, deps=(partial,))
            acc = _promoted(acc, partial, a_scale * b_scale, ring, slot, BLOCK_N, B_ROWS)
            slot, phase = _next_slot(slot, phase, STAGES)
    else:
        for k in range(0, blocks):
            scale = a_scale * b_scale
            partial = _start(ring, slot, phase, zero, GROUP, MATH_GROUPS)
            held = _give_back(ring, held, slot, B_ROWS)
            a_scale, b_scale = _scales(a_scale_ptrs, b_scale_ptrs, k + 1, blocks, a_step, b_step, B_ROWS)
            partial = warpgroup_mma_wait(0, deps=(partial,))
            acc = _promoted(acc, partial, scale, ring, slot, BLOCK_N, B_ROWS)
            slot, phase = _next_slot(slot, phase, STAGES)
    return acc, slot, phase, held, held_2


@gluon.jit
def _store(
    acc, c_desc, c_ptr, bias_ptr, c_smem, row, tile_n, M, N, stride_cm,
    BLOCK_N: gl.constexpr, BIAS: gl.constexpr, ACCUMULATE: gl.constexpr,
):  # fmt: skip
    """Write the 64 rows of a tile from `row` on."""
    layout: gl.constexpr = _sum_layout(BLOCK_N)
    cols = gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))  # of the tile: 32-bit numbers fit the registers
    first_col, width = gl.cast(tile_n, gl.int64) * BLOCK_N, N - tile_n * BLOCK_N
    if BIAS:
        bias = gl.load(bias_ptr + first_col + cols, mask=cols < width, other=0.0).to(gl.float32)
        acc += gl.expand_dims(bias, 0)
    if c_desc is not None:
        tma.store_wait(0)  # what was stored before has been read out of c_smem
        c_smem.store(acc.to(c_desc.dtype))
        fence_async_shared()
        _store_box(c_desc, [row, tile_n * BLOCK_N], c_smem)
    else:
        rows = gl.cast(row, gl.int64) + gl.arange(0, BOX_M, gl.SliceLayout(1, layout))
        c_ptrs = gl.expand_dims(c_ptr + first_col + rows * stride_cm, 1) + gl.expand_dims(cols, 0)
        inside = gl.expand_dims(rows < M, 1) & gl.expand_dims(cols < width, 0)
        if ACCUMULATE:
            acc += gl.load(c_ptrs, mask=inside, other=0.0)
        gl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=inside)


@gluon.jit
def _sum_of_waves(
    ring, a_scale_ptrs, a_scale_ptrs_2, b_scale_ptrs, a_step, b_step, blocks, slot, phase, zero,
    GROUP: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As _sum, of a warpgroup with 128 rows: two waves of 64 that take turns with the registers of one partial sum.

    The loop over the waves is dynamic and what it promotes stands under a condition: written out, ptxas starts the
    second wave before the first is promoted, in registers of its own, and spills 484 bytes.
    """
    a_smem, b_smem, b_scale_smem, full, empty = ring
    acc = zero
    acc_2 = zero
    a_scale, b_scale = _scales(a_scale_ptrs, b_scale_ptrs, 0, blocks, a_step, b_step, 128)
    a_scale_2 = gl.load(a_scale_ptrs_2)
    for k in range(0, blocks):
        scale, scale_2 = a_scale * b_scale, a_scale_2 * b_scale
        a_scale, b_scale = _scales(a_scale_ptrs, b_scale_ptrs, k + 1, blocks, a_step, b_step, 128)
        a_scale_2 = gl.load(a_scale_ptrs_2 + gl.minimum(k + 1, blocks - 1) * a_step)
        mbarrier.wait(full.index(slot), phase)
        b = b_smem.index(slot).permute((1, 0))
        for wave in range(0, 2):
            a = a_smem.index(slot * 4 + GROUP * 2 + wave)
            partial = warpgroup_mma(a, b, zero, use_acc=False, is_async=True)
            partial = warpgroup_mma_wait(0, deps=(partial,))
            if wave == 0:
                acc = gl.fma(partial, gl.broadcast(gl.expand_dims(scale, 1), acc)[0], acc)
            else:
                acc_2 = gl.fma(partial, gl.broadcast(gl.expand_dims(scale_2, 1), acc_2)[0], acc_2)
        mbarrier.arrive(empty.index(slot), count=1)
        slot, phase = _next_slot(slot, phase, STAGES)
    return acc, acc_2, slot, phase


@gluon.jit
def _multiply_waves(
    c_desc, c_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, ring, c_smem, M, N, K, strides, group_m,
    GROUP: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """Rows GROUP * 128 and on of every tile of 256 rows of this program, by one warpgroup; b in blocks of 128x128."""
    stride_cm, stride_sam, stride_sak, stride_sbn, stride_sbk = strides
    layout: gl.constexpr = _sum_layout(BLOCK_N)
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
        acc, acc_2, slot, phase = _sum_of_waves(
            ring, a_scale_ptrs, a_scale_ptrs_2, b_scale_ptrs, a_step, b_step, blocks, slot, phase, zero,
            GROUP, BLOCK_N, STAGES,
        )  # fmt: skip
        box = c_smem.index(GROUP)
        _store(acc, c_desc, c_ptr, bias_ptr, box, row, tile_n, M, N, stride_cm, BLOCK_N, BIAS, False)
        _store(acc_2, c_desc, c_ptr, bias_ptr, box, row + BOX_M, tile_n, M, N, stride_cm, BLOCK_N, BIAS, False)
    if c_desc is not None:
        tma.store_wait(0)


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
    held, held_2 = STAGES, STAGES  # none: a barrier that nobody waits for
    for index in range(gl.program_id(0), num_blocks(M, BLOCK_M) * num_blocks(N, BLOCK_N), gl.num_programs(0)):
        tile_m, tile_n = tile_at(index, M, N, BLOCK_M, BLOCK_N, group_m)
        first = gl.cast(tile_m, gl.int64) * BLOCK_M + GROUP * BOX_M
        rows = first + gl.arange(0, BOX_M, gl.SliceLayout(1, layout))
        a_scale_ptrs = a_scale_ptr + gl.minimum(rows, M - 1) * stride_sam
        b_scale_ptrs = b_scale_ptr
        if B_ROWS != 1:
            b_scale_ptrs += gl.cast(tile_n, gl.int64) * BLOCK_N // B_ROWS * stride_sbn
        acc, slot, phase, held, held_2 = _sum(
            ring, a_scale_ptrs, b_scale_ptrs, a_step, b_step, blocks, slot, phase, held, held_2, zero,
            GROUP, MATH_GROUPS, BLOCK_N, STAGES, IN_FLIGHT, B_ROWS,
        )  # fmt: skip
        _store(
            acc, c_desc, c_ptr, bias_ptr, c_smem.index(GROUP), tile_m * BLOCK_M + GROUP * BOX_M, tile_n, M, N,
            stride_cm, BLOCK_N, BIAS, ACCUMULATE,
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
    MATH_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    BOXES: gl.constexpr = MATH_GROUPS * WAVES
    a_smem = gl.allocate_shared_memory(a_desc.dtype, [STAGES * BOXES, BOX_M, BLOCK_K], a_desc.layout)
    b_smem = gl.allocate_shared_memory(b_desc.dtype, [STAGES, BLOCK_N, BLOCK_K], b_desc.layout)
    c_smem, b_scale_smem = b_smem, b_smem  # stand-ins where they are not used
    if c_desc is not None:
        c_smem = gl.allocate_shared_memory(c_desc.dtype, [MATH_GROUPS, BOX_M, BLOCK_N], c_desc.layout)
    if b_scale_desc is not None:
        b_scale_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_N], b_scale_desc.layout)
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
            (_produce, (a_desc, b_desc, b_scale_desc, ring, M, N, K, group_m, BOXES, BLOCK_N, STAGES)),
        ], [4, 1], [MATH_REGISTERS, PRODUCER_REGISTERS])
    elif MATH_GROUPS == 2:
        gl.warp_specialize([
            (_multiply, (c_desc, c_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, ring, c_smem, M, N, K, strides, group_m, 0,
                MATH_GROUPS, BLOCK_N, STAGES, IN_FLIGHT, B_ROWS, BIAS, ACCUMULATE)),
            (_multiply, (c_desc, c_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, ring, c_smem, M, N, K, strides, group_m, 1,
                MATH_GROUPS, BLOCK_N, STAGES, IN_FLIGHT, B_ROWS, BIAS, ACCUMULATE)),
            (_produce, (a_desc, b_desc, b_scale_desc, ring, M, N, K, group_m, BOXES, BLOCK_N, STAGES)),
        ], [4, 1], [MATH_REGISTERS, PRODUCER_REGISTERS])
    else:
        gl.warp_specialize([
            (_multiply, (c_desc, c_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, ring, c_smem, M, N, K, strides, group_m, 0,
                MATH_GROUPS, BLOCK_N, STAGES, IN_FLIGHT, B_ROWS, BIAS, ACCUMULATE)),
            (_multiply, (c_desc, c_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, ring, c_smem, M, N, K, strides, group_m, 1,
                MATH_GROUPS, BLOCK_N, STAGES, IN_FLIGHT, B_ROWS, BIAS, ACCUMULATE)),
            (_multiply, (c_desc, c_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, ring, c_smem, M, N, K, strides, group_m, 2,
                MATH_GROUPS, BLOCK_N, STAGES, IN_FLIGHT, B_ROWS, BIAS, ACCUMULATE)),
            (_produce, (a_desc, b_desc, b_scale_desc, ring, M, N, K, group_m, BOXES, BLOCK_N, STAGES)),
        ], [4, 4, 1], [MATH_REGISTERS, MATH_REGISTERS, PRODUCER_REGISTERS])
    # fmt: on
