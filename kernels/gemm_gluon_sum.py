"""The K loops of the Gluon GEMMs: one warpgroup's sum over all blocks of K of a tile; the rest is in gemm_gluon.py.

sum_of_blocks and sum_of_waves start a multiplication as soon as its slot has come. sum_ahead keeps what stands between
two multiplications short: while one runs, it waits for the slot of the next, gives back the last one and reads a's
scales; b's are read by fours.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

BOX_M = gl.constexpr(64)  # rows of a warpgroup


@gluon.constexpr_function
def sum_layout(BLOCK_N):
    """Of the sums of a warpgroup, as its tensor-core instructions leave them."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 32])


@gluon.constexpr_function
def quad_layout(BLOCK_N):
    """Of the sums of a warpgroup by the columns of the matrix, where b's rows came in quads (in_order)."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0], *([0, 1 << bit] for bit in range(4, BLOCK_N.bit_length() - 1))],
        lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, BLOCK_N],
    )


@gluon.jit
def in_order(x, BLOCK_N: gl.constexpr):
    """A product with rows of b in quads, by the columns of the matrix; no instruction, since they change their names.

    A tensor-core instruction leaves pairs of columns to a thread, 8 apart. TMA brings the rows of b (gemm_gluon.py) in
    such an order that two such pairs, 64 apart, are four neighbours: their scales are one read of shared memory, and
    they are written, and added to, in units of 16 bytes.
    """
    x = x.reshape([BOX_M, 2, BLOCK_N // 16, 4, 2]).permute((0, 2, 3, 1, 4)).reshape([BOX_M, BLOCK_N])
    return gl.convert_layout(x, quad_layout(BLOCK_N))


@gluon.jit
def next_slot(slot, phase, STAGES: gl.constexpr):
    """The slot after this one, and the parity that its barriers complete: it turns when the slots start anew."""
    slot += 1
    if slot == STAGES:
        slot = 0
        phase ^= 1
    return slot, phase


@gluon.jit
def _multiplied(ring, slot, zero, GROUP: gl.constexpr, MATH_GROUPS: gl.constexpr, ABREAST: gl.constexpr):
    """Start the multiplication of a slot whose bytes have come: of a warpgroup's rows of a by its rows of b."""
    a_smem, b_smem, b_scale_smem, full, empty = ring
    a = a_smem.index(slot * (MATH_GROUPS // ABREAST) + GROUP // ABREAST)
    b = b_smem.index(slot * ABREAST + GROUP % ABREAST)
    return warpgroup_mma(a, b.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _start(ring, slot, phase, zero, GROUP: gl.constexpr, MATH_GROUPS: gl.constexpr, ABREAST: gl.constexpr):
    """Wait for the bytes of a slot and start its multiplication."""
    mbarrier.wait(ring[3].index(slot), phase)
    return _multiplied(ring, slot, zero, GROUP, MATH_GROUPS, ABREAST)


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
def _promoted(
    acc, partial, scale, ring, slot, GROUP: gl.constexpr, BLOCK_N: gl.constexpr, B_ROWS: gl.constexpr,
    ABREAST: gl.constexpr,
):  # fmt: skip
    """acc + partial * RN(a_scale * b_scale), rounded once.

    Here the scales of b that came with the slot are read; a slot that brought none, whose multiplication has ended, is
    given back.
    """
    a_smem, b_smem, b_scale_smem, full, empty = ring
    if B_ROWS == 1:
        columns: gl.constexpr = gl.SliceLayout(0, sum_layout(BLOCK_N))
        b_scale = b_scale_smem.index(slot * ABREAST + GROUP % ABREAST).reshape([BLOCK_N]).load(columns)
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
def sum_of_blocks(
    ring, a_scale_ptrs, b_scale_ptrs, a_step, b_step, blocks, slot, phase, held, held_2, zero,
    GROUP: gl.constexpr, MATH_GROUPS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    IN_FLIGHT: gl.constexpr, B_ROWS: gl.constexpr, ABREAST: gl.constexpr,
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
            partial = _start(ring, slot, phase, zero, GROUP, MATH_GROUPS, ABREAST)
            slot_2, phase_2 = next_slot(slot, phase, STAGES)
            partial_2 = _start(ring, slot_2, phase_2, zero, GROUP, MATH_GROUPS, ABREAST)
            held, held_2 = _give_back(ring, held, slot, B_ROWS), _give_back(ring, held_2, slot_2, B_ROWS)
            a_scale, b_scale = _scales(a_scale_ptrs, b_scale_ptrs, k + 2, blocks, a_step, b_step, B_ROWS)
            a_scale_2, b_scale_2 = _scales(a_scale_ptrs, b_scale_ptrs, k + 3, blocks, a_step, b_step, B_ROWS)
            partial, partial_2 = warpgroup_mma_wait(1, deps=(partial, partial_2))
            acc = _promoted(acc, partial, scale, ring, slot, GROUP, BLOCK_N, B_ROWS, ABREAST)
            partial_2 = warpgroup_mma_wait(0, deps=(partial_2,))
            acc = _promoted(acc, partial_2, scale_2, ring, slot_2, GROUP, BLOCK_N, B_ROWS, ABREAST)
            slot, phase = next_slot(slot_2, phase_2, STAGES)
        if blocks % 2 == 1:  # the second product of a pair may still be promoted: its slot is held on
            partial = _start(ring, slot, phase, zero, GROUP, MATH_GROUPS, ABREAST)
            held = _give_back(ring, held, slot, B_ROWS)
            partial = warpgroup_mma_wait(0, deps=(partial,))
            acc = _promoted(acc, partial, a_scale * b_scale, ring, slot, GROUP, BLOCK_N, B_ROWS, ABREAST)
            slot, phase = next_slot(slot, phase, STAGES)
    else:
        for k in range(0, blocks):
            scale = a_scale * b_scale
            partial = _start(ring, slot, phase, zero, GROUP, MATH_GROUPS, ABREAST)
            held = _give_back(ring, held, slot, B_ROWS)
            a_scale, b_scale = _scales(a_scale_ptrs, b_scale_ptrs, k + 1, blocks, a_step, b_step, B_ROWS)
            partial = warpgroup_mma_wait(0, deps=(partial,))
            acc = _promoted(acc, partial, scale, ring, slot, GROUP, BLOCK_N, B_ROWS, ABREAST)
            slot, phase = next_slot(slot, phase, STAGES)
    return acc, slot, phase, held, held_2


@gluon.jit
def sum_of_waves(
    ring, a_scale_ptrs, a_scale_ptrs_2, b_scale_ptrs, a_step, b_step, blocks, slot, phase, zero,
    GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As sum_of_blocks, of a warpgroup with 128 rows: two waves of 64 take turns with the registers of one partial sum.

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
        slot, phase = next_slot(slot, phase, STAGES)
    return acc, acc_2, slot, phase


@gluon.jit
def sum_ahead(
    ring, a_scale_ptrs, a_step, blocks, slot, phase, held, zero,
    GROUP: gl.constexpr, MATH_GROUPS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    ABREAST: gl.constexpr,
):  # fmt: skip
    """As sum_of_blocks where b's scales come with the slot, but the bytes of `slot` have come, and when it ends those
    of the slot after have, too; the result is by the columns of the matrix (in_order).
    """
    a_smem, b_smem, b_scale_smem, full, empty = ring
    columns: gl.constexpr = gl.SliceLayout(0, quad_layout(BLOCK_N))
    acc = in_order(zero, BLOCK_N)
    a_scale = gl.load(a_scale_ptrs)
    for k in range(1, blocks + 1):
        scale = a_scale
        partial = _multiplied(ring, slot, zero, GROUP, MATH_GROUPS, ABREAST)
        mbarrier.arrive(empty.index(held), count=1)
        held = slot
        slot, phase = next_slot(slot, phase, STAGES)
        mbarrier.wait(full.index(slot), phase)
        a_scale_ptrs += gl.where(k < blocks, a_step, a_step * 0)  # past the last block that one's again: nobody uses it
        a_scale = gl.load(a_scale_ptrs)
        partial = warpgroup_mma_wait(0, deps=(partial,))
        b_scale = b_scale_smem.index(held * ABREAST + GROUP % ABREAST).reshape([BLOCK_N]).load(columns)
        acc = gl.fma(in_order(partial, BLOCK_N), gl.expand_dims(scale, 1) * gl.expand_dims(b_scale, 0), acc)
    return acc, slot, phase, held
